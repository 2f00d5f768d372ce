"""Images on the page: as cards with a picture, and as the rows of the table that filters and sorts."""

from __future__ import annotations

from collections.abc import Iterable

from vlmflow.report.html import Html, address, join, number, text
from vlmflow.report.pictures import Pictures
from vlmflow.report.rows import Row
from vlmflow.search.thumbnails import SIDE

SETS = {
    "new": "newly flagged",
    "lowest": "lowest match",
    "label": "example of a label",
    "duplicate": "duplicate",
    "failed": "with errors",
    "sample": "random sample",
}
DECISIONS = ("allow", "review", "block")
STATUSES = ("ok", "partial", "unreadable", "missing", "failed")
_SMALL = 72


class Cards:
    """Writes images with what is known of them; pictures by number, because one may stand in several places."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._numbers = {image_id: number for number, image_id in enumerate(pictures.found)}

    def card(self, row: Row, extra: dict[str, Html] | None = None) -> Html:
        """An image as an item of a list.

        Args:
            extra: further names and values, shown first.
        """
        pairs = dict(extra or {})
        if row.hit.status != "ok":
            pairs["status"] = text(row.hit.status)
        if row.text_itm is not None:
            pairs["title match"] = number(row.text_itm)
        elif row.text_itc is not None:
            pairs["title cosine"] = number(row.text_itc, 3)
        if row.title is not None:
            pairs["title"] = text(row.title)
        if row.caption_itm is not None:
            pairs["caption match"] = number(row.caption_itm)
        elif row.caption_itc is not None:
            pairs["caption cosine"] = number(row.caption_itc, 3)
        if row.hit.caption is not None:
            pairs["caption"] = text(row.hit.caption)
        if row.alt_text is not None:
            pairs["alternative text"] = text(row.alt_text)
        if row.answers:
            pairs["answers"] = text("; ".join(row.answers))
        if row.errors:
            pairs["errors"] = text("; ".join(row.errors))
        pairs["address"] = address(row.hit.uri, may_link=not row.hit.is_flagged)
        facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs.items())
        return Html(
            f'<li class="card {_kind(row)}"><div class="pic">{self._picture(row, SIDE)}</div>'
            f"<p>{decision(row)}</p><dl>{facts}</dl></li>"
        )

    def cards(self, cards: Iterable[Html]) -> Html:
        """Cards side by side."""
        return Html(f'<ul class="cards">{join(cards)}</ul>')

    def line(self, row: Row, *, by_cosine: bool) -> Html:
        """An image as a row of the table. What the script sorts and filters by stands in attributes of our own.

        Args:
            by_cosine: cosines stand where the scores of a matching head would.
        """
        title_match, caption_match = (
            (_score(row.text_itc, 3), _score(row.caption_itc, 3))
            if by_cosine
            else (_score(row.text_itm), _score(row.caption_itm))
        )
        sets = [name for name in SETS if name in row.sets]
        labels = ", ".join(f"{label.name} {label.value or 0:.2f}" for label in row.labels[:5])
        cells = [
            self._picture(row, _SMALL) or text(None),
            decision(row),
            text(labels or None),
            title_match,
            text(row.title),
            caption_match,
            text(row.hit.caption),
            text(row.hit.status if not row.errors else f"{row.hit.status}: {row.errors[0]}"),
            text(", ".join(SETS[name] for name in sets)),
            text(row.hit.ingest_date),
        ]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        return Html(
            f'<tr data-sets="{" ".join(sets)}" data-decision="{_kind(row)}" data-status="{_status(row)}">'
            f'<th scope="row">{address(row.hit.uri, may_link=not row.hit.is_flagged)}</th>{body}</tr>'
        )

    def _picture(self, row: Row, side: int) -> Html:
        """The picture, filled in by the script; of a flagged one, the blurred one within a button."""
        number = self._numbers.get(row.hit.image_id)
        if number is None:
            reason = self._pictures.reasons.get(row.hit.image_id)
            if side == _SMALL:
                return text(None)
            return Html(f"<span>{'no picture on this page' if reason is None else text(reason)}</span>")
        width, height = row.hit.width or 1, row.hit.height or 1
        scale = side / max(width, height)
        size = f'width="{max(1, round(width * scale))}" height="{max(1, round(height * scale))}"'
        name = text(row.hit.uri.rsplit("/", 1)[-1], 60)
        if not row.hit.is_flagged:
            return Html(f'<img data-p="{number}" {size} alt="{name}">')
        return Html(
            f'<button type="button" class="reveal" aria-pressed="false" aria-label="Flagged: show {name}">'
            f'<img data-p="{number}" {size} alt=""><span aria-hidden="true">Flagged: show</span></button>'
        )


def decision(row: Row) -> Html:
    """The decision in its colour, with the reason."""
    reason = "" if row.hit.decision_reason is None else f" {text(row.hit.decision_reason)}"
    return Html(f'<span class="tag {_kind(row)}">{text(row.hit.decision)}</span>{reason}')


def _score(value: float | None, digits: int = 2) -> Html:
    exact = "" if value is None else f"{value:.6f}"
    return Html(f'<span data-v="{exact}">{number(value, digits)}</span>')


def _kind(row: Row) -> str:
    """The decision as a word that may stand in an attribute; any other than ours is one to look at."""
    return row.hit.decision if row.hit.decision in DECISIONS else "review"


def _status(row: Row) -> str:
    return row.hit.status if row.hit.status in STATUSES else "failed"
