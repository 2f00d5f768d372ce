"""The pages of the app, as HTML. Every word from outside goes through the templates' escaping, none around it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from vlmflow.errors import ConfigError, VlmflowError
from vlmflow.moderation.detections import name_of, why_not
from vlmflow.report.rows import label_value
from vlmflow.search.page import link
from vlmflow.search.searcher import Asked
from vlmflow.views_search import printable, sentence
from vlmflow.web.desk import PAGE_SIZE, Desk, Listing
from vlmflow.web.filters import ALL_FACETS, SORTS, Filter, url
from vlmflow.web.pictures import why_unread
from vlmflow.web.sessions import session_of

MAX_QUERY_CHARS = 2_000
_MAX_FOUND = 480
_SHOWN_VALUES = 12  # of a facet
_CUT = 160  # characters of one text on a card
_FULL = 20_000  # on the page of an image
_FACET_NAMES = {
    "decision": "Decision", "label": "Flagged for", "status": "Status", "verdict": "Judged by", "error": "Error",
    "policy": "Policy", "date": "First seen",
}  # fmt: skip
_VALUE_NAMES = {
    ("verdict", "nobody"): "nobody yet",
    ("verdict", "person"): "a person",
    ("verdict", "list"): "a list of known images",
    ("error", ""): "no error",
    ("policy", ""): "not moderated",
}
# On the page of an image these have a place of their own.
_SHOWN_APART = {"labels", "detections", "answers", "errors", "verdict", "source"}


@dataclass(frozen=True)
class Choice:
    """A value of a facet: where a click leads, and how many rows there would be."""

    name: str
    count: int
    href: str
    is_chosen: bool


def make_templates() -> Environment:
    """The templates: everything is escaped, and marks that no one sees are spelled out."""
    templates = Environment(
        loader=PackageLoader("vlmflow.web"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"cut": _cut, "number": _number, "last": _last_part, "address": _address, "full": _full}
    templates.filters["thousands"] = "{:,}".format
    templates.filters["named"] = lambda values, facet: [_VALUE_NAMES.get((facet, value), value) for value in values]
    return templates


class Pages:
    """Answers requests for pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._templates = make_templates()

    def index(self, request: Request) -> Response:
        """The search box, the facets, and rows."""
        query = request.query_params
        pairs = query.multi_items()
        wanted = Filter.of(pairs)
        asked = [(name, query[name].strip()) for name in ("q", "like", "image") if query.get(name, "").strip()]
        if len(asked) > 1 and asked[0][0] == "q":  # a text that was typed in wins over what was asked before
            asked = asked[:1]
        problem = None
        listing: Listing | None = None
        count = _count(query.get("n", ""))
        if asked:
            try:
                listing = self._desk.searched(self._asked(*asked[0]), wanted, count)
            except ConfigError:
                raise
            except VlmflowError as error:
                problem = error
        if listing is None:
            listing = self._desk.listing(wanted, after=query.get("after", ""), before=query.get("before", ""))
        is_searched = bool(asked) and problem is None
        return self._page(
            request,
            "index.html",
            wanted=wanted,
            listing=listing,
            query=dict(asked).get("q", ""),
            other=dict(asked[:1]) if asked and asked[0][0] != "q" else {},
            problem=problem,
            is_searched=is_searched,
            facets=self._facets(wanted, listing, asked),
            sorts=SORTS,
            steps=_steps(wanted, listing, asked, count, is_searched=is_searched),
            clear=url("/", asked),
            review=url("/review", Filter(wanted.chosen, wanted.find, wanted.where, "near").pairs()),
        )

    def image(self, request: Request) -> Response:
        """An image with everything that is known of it."""
        row = self._desk.image(request.path_params["image_id"])
        if row is None:
            return self.error(request, "There is no such image in the catalog.", "It may have been erased.", 404)
        return self._page(request, "image.html", **self._evidence(request, row))

    def review(self, request: Request) -> Response:
        """One image after the other, to be judged."""
        query, session = request.query_params, session_of(request)
        wanted = Filter.of(query.multi_items(), sort="near")
        queue = self._desk.queue(session.key, wanted, at=query.get("at", ""), after=query.get("after", ""))
        home = url("/review", wanted.pairs())
        if queue.row is None:
            return self._page(request, "done.html", wanted=wanted, home=home, queue=queue)
        image_id = queue.row["image_id"]
        before = session.visit(image_id)
        following = url("/review", [*wanted.pairs(), ("after", image_id)])
        back = "" if before is None else url("/review", [*wanted.pairs(), ("at", before)])
        return self._page(
            request,
            "review.html",
            wanted=wanted,
            queue=queue,
            following=following,
            back=back,
            home=home,
            here=url("/review", [*wanted.pairs(), ("at", image_id)]),
            **self._evidence(request, queue.row),
        )

    def error(self, request: Request, message: str, remedy: str, status: int) -> Response:
        """What went wrong, in a sentence, and what to do."""
        return self._page(request, "error.html", status, message=sentence(message), remedy=remedy)

    def _asked(self, kind: str, value: str) -> Asked | str:
        """A query as the catalog sees it; an image by its id.

        Raises:
            VlmflowError: it cannot be looked for.
        """
        from vlmflow.search.query import Query

        if kind == "like":
            return value
        key = f"{kind}:{value}"
        found = self._desk.shelf.asked(key)
        if found is None and kind == "image":
            raise ConfigError("that query image is forgotten", remedy="Choose the file again.")
        if found is None:
            if len(value) > MAX_QUERY_CHARS:
                raise ConfigError(
                    f"the text has {len(value):,} characters", remedy=f"Write at most {MAX_QUERY_CHARS:,}."
                )
            found = self._desk.shelf.ask(key, Query(text=value))
        return found

    def _facets(
        self, wanted: Filter, listing: Listing, asked: Iterable[tuple[str, str]]
    ) -> list[tuple[str, list[Choice], int]]:
        """Name, values, and the number of values that are not shown, of each facet with more than one value."""
        out = []
        for facet in ALL_FACETS:
            counts, chosen = listing.counts[facet], wanted.values(facet)
            if len(counts) < (1 if facet == "label" else 2) and not chosen and facet not in ("decision", "status"):
                continue  # one value for all says nothing; a label need not be that of all
            order = sorted(counts, key=_order_of(facet, counts))
            shown = [name for number, name in enumerate(order) if number < _SHOWN_VALUES or name in chosen]
            choices = [
                Choice(
                    _VALUE_NAMES.get((facet, name), name),
                    counts[name],
                    url("/", [*asked, *wanted.toggled(facet, name).pairs()]),
                    name in chosen,
                )
                for name in shown
            ]
            out.append((_FACET_NAMES[facet], choices, len(order) - len(shown)))
        return out

    def _evidence(self, request: Request, row: dict[str, Any]) -> dict[str, Any]:
        order = ("block", "review", "allow")
        labels = sorted(
            row["labels"] or [],
            key=lambda label: (
                order.index(label["decision"]) if label["decision"] in order else 1,
                -(label_value(label) or 0.0),
            ),
        )
        said = self._desk.said(row)
        session = session_of(request)
        judged = row.get("verdict")
        ruled = (
            (judged["model_decision"], judged["model_reason"])
            if judged
            else (row["decision"], row.get("decision_reason"))
        )
        names = list(dict.fromkeys(label["label"] for label in labels if label["label"]))
        return {
            "row": row,
            "labels": [
                label | {"value": label_value(label), "name": name_of(label), "note": why_not(label, labels, *ruled)}
                for label in labels
            ],
            "names": names,
            "judged": self._desk.judging.labels_of(row["image_id"], row["content_hash"], session.reviewer, names),
            "newest": said,
            "columns": [(name, value) for name, value in row.items() if name not in _SHOWN_APART],
            "source": row.get("source") or {},
            "unread": why_unread(row) if row["content_hash"] is None else "",
        }

    def _page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        session = session_of(request)
        desk = self._desk
        common = {
            "csrf": session.csrf,
            "reviewer": session.reviewer,
            "can_undo": bool(session.given),
            "catalog": desk.shelf.config.uri,
            "version": desk.shelf.version.number,
            "num_rows": len(desk.shelf.version),
            "num_waiting": desk.judging.num_waiting,
        }
        return HTMLResponse(self._templates.get_template(name).render(common | values), status)


def _count(text: str) -> int:
    return min(_MAX_FOUND, max(PAGE_SIZE, int(text))) if text.isdecimal() and len(text) < 6 else PAGE_SIZE


def _steps(
    wanted: Filter, listing: Listing, asked: list[tuple[str, str]], count: int, *, is_searched: bool
) -> dict[str, str]:
    """Where the links to other pages lead."""
    pairs = [*asked, *wanted.pairs()]
    if is_searched:
        more = count + PAGE_SIZE
        return {"more": url("/", [*pairs, ("n", str(more))])} if listing.has_after and more <= _MAX_FOUND else {}
    steps = {}
    if listing.has_before and listing.rows:
        steps["before"] = url("/", [*pairs, ("before", listing.rows[0]["image_id"])])
    if listing.has_after and listing.rows:
        steps["after"] = url("/", [*pairs, ("after", listing.rows[-1]["image_id"])])
    return steps


def _order_of(facet: str, counts: Mapping[str, int]) -> Any:
    """Decisions by gravity, dates with the newest first, others with the most frequent first."""
    if facet == "decision":
        gravity = {"block": 0, "review": 1, "allow": 2}
        return lambda name: (gravity.get(name, 3), name)
    if facet == "date":
        return lambda name: [-ord(character) for character in name]
    return lambda name: (-counts[name], name)


def _shown(value: Any) -> Any:
    """What becomes of a value before it is escaped."""
    if value is None:
        return "–"
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    if isinstance(value, dt.datetime):
        return f"{value:%Y-%m-%d %H:%M:%S} UTC"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


def _cut(value: object, max_chars: int = _CUT) -> str:
    return printable("–" if value is None else str(value), max_chars)


def _full(value: Any) -> str:
    """A value of any type in full, within reason."""
    if isinstance(value, list | tuple | dict | bytes):
        return printable(repr(value), _FULL)
    return printable(str(_shown(value)), _FULL)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _last_part(uri: str) -> str:
    return printable(uri.rstrip("/").rsplit("/", 1)[-1], 60)


def _address(uri: str, may_link: bool) -> Markup:
    """An address; as a link only if a browser may follow it."""
    if may_link and len(uri) <= _CUT * 10:
        return Markup(link(uri))
    return escape(printable(uri, _FULL))
