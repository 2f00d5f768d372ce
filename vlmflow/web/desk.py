"""What pages show of a version: rows in order, counts, and single images, with what was said of them a moment ago.

N: rows of the version.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmflow.catalog.judged import LIST_PREFIX
from vlmflow.catalog.masks import Mask
from vlmflow.catalog.reviews import WITHDRAWN
from vlmflow.config import Job
from vlmflow.search.live import Positions
from vlmflow.search.searcher import Asked
from vlmflow.web.cache import Cache
from vlmflow.web.claims import Claims
from vlmflow.web.facts import DECISIONS, Facts
from vlmflow.web.filters import ALL_FACETS, Filter
from vlmflow.web.judging import Judging, Said
from vlmflow.web.pictures import Pictures
from vlmflow.web.shelf import CARD_COLUMNS, Shelf, Version

PAGE_SIZE = 48
_MAX_SAID_SINCE = 100_000
_DOUBTFUL = ("unreadable", "failed")  # a verdict on what cannot be read any more waits


@dataclass(frozen=True)
class Listing:
    """A page of rows.

    Attributes:
        rows: with :data:`vlmflow.web.shelf.CARD_COLUMNS`, and ``score`` where they were searched for.
        num_matching: rows in all.
        counts: by facet, how many rows a value would give, the other filters as they are.
        has_before, has_after: whether there are pages on either side.
        notes: what a person should know, a sentence each.
    """

    version: int
    rows: list[dict[str, Any]]
    num_rows: int
    num_matching: int
    counts: Mapping[str, Mapping[str, int]]
    has_before: bool = False
    has_after: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Queue:
    """What is left to review of the rows that a filter leaves.

    Attributes:
        row: the image to look at, with all its columns; None: there is none from here on.
        num_open: images that nobody has judged and that can be judged.
        num_elsewhere: of these, images that others are looking at.
        num_unread: images that were never read: nobody can judge them.
    """

    row: dict[str, Any] | None
    num_open: int
    num_elsewhere: int
    num_unread: int


class Desk:
    """Brings together the catalog, the verdicts and the pictures.

    Args:
        job: of maps; None: the profile of the newest run.
    """

    def __init__(self, shelf: Shelf, judging: Judging, pictures: Pictures, job: Job | None = None) -> None:
        self.shelf, self.judging, self.pictures, self.job = shelf, judging, pictures, job
        self.claims = Claims()
        self._facts: Cache[Facts] = Cache(2)
        # Of what was said since, by version, image, bytes and verdict: each row is read once, however many wait.
        self._said_since: Cache[tuple[str, str]] = Cache(_MAX_SAID_SINCE)
        self._counts: Cache[tuple[int, dict[str, dict[str, int]]]] = Cache(256)

    def facts(self, version: Version) -> Facts:
        """The facts of a version, with what was said since."""
        key = (version.number, self.judging.changes)
        return self._facts.get_or_make(key, lambda: version.facts.with_verdicts(self._changes(version)))

    def listing(self, wanted: Filter, *, after: str = "", before: str = "") -> Listing:
        """Rows in the order of the filter, from beside a row on.

        Args:
            after, before: id of the row; empty: from the beginning.

        Raises:
            ConfigError: the condition cannot be used.
        """
        version = self.shelf.version
        facts = self.facts(version)
        mask = self.mask(version, facts, wanted)
        num_matching, counts = self.counts(version, facts, wanted)
        order, places = version.orders[wanted.sort]
        edge, notes = self._edge(version, places, before or after)
        is_back = bool(before) and not notes
        found = _page(order, mask, edge if is_back else edge + 1, is_back=is_back)
        # Rows leave the filter as they are judged: where none is left on that side, the page on the other one is shown.
        is_edge = not len(found)
        if is_edge:
            is_back = not is_back
            found = _page(order, mask, edge + 1 if is_back else edge, is_back=is_back)
        if is_back:
            has_before, has_after, shown = len(found) > PAGE_SIZE, not is_edge, found[-PAGE_SIZE:]
        else:
            has_before = bool(after) and not notes
            has_after, shown = len(found) > PAGE_SIZE, found[:PAGE_SIZE]
        rows = self.cards(version, shown)
        return Listing(version.number, rows, len(version), num_matching, counts, has_before, has_after, notes)

    def cards(self, version: Version, positions: Positions) -> list[dict[str, Any]]:
        """What cards show of rows."""
        fresh = self.judging.fresh(version.number)
        return [_up_to_date(row, fresh) for row in self.shelf.rows(version, positions, CARD_COLUMNS)]

    def searched(self, asked: Asked | str, wanted: Filter, count: int) -> Listing:
        """The rows that a filter leaves and that are nearest to a query, the nearest first.

        Args:
            asked: or the id of an image.

        Raises:
            ConfigError: there is no such image, or the condition cannot be used.
            SearchError: the image has no embedding.
        """
        version, found, num_matching, notes = self.shelf.nearest(
            asked, lambda version: self.mask(version, self.facts(version), wanted), count + 1
        )
        _, counts = self.counts(version, self.facts(version), wanted)
        scores = found.scores[:count].tolist()
        rows = self.cards(version, found.positions[:count])
        scored = [row | {"score": score} for row, score in zip(rows, scores, strict=True)]
        has_after = len(found.positions) > count
        return Listing(version.number, scored, len(version), num_matching, counts, False, has_after, notes)

    def image(self, image_id: str, columns: Sequence[str] | None = None) -> dict[str, Any] | None:
        """Columns of an image's row, all of them by default; None: there is no such image."""
        version = self.shelf.version
        position = self.shelf.find(version, image_id)
        if position is None:
            return None
        names = version.live.columns.names if columns is None else columns
        (row,) = self.shelf.rows(version, np.array([position]), names)
        return _up_to_date(row, self.judging.fresh(version.number))

    def said(self, row: Mapping[str, Any]) -> Said | None:
        """The newest verdict of a person on an image as it is."""
        return self.judging.said(row["image_id"], row["content_hash"])

    def mask(self, version: Version, facts: Facts, wanted: Filter) -> Mask | None:
        """(N,) rows that a filter leaves; None: all."""
        masks = [facts.mask(facet, values) for facet, values in wanted.chosen]
        condition = self.shelf.condition(version, wanted)
        if condition is not None:
            masks.append(condition)
        return np.logical_and.reduce(masks) if masks else None

    def counts(self, version: Version, facts: Facts, wanted: Filter) -> tuple[int, dict[str, dict[str, int]]]:
        """How many rows there are, and by facet how many each value would give."""
        key = (version.number, self.judging.changes, wanted.rows)
        return self._counts.get_or_make(key, lambda: self._count(version, facts, wanted))

    def queue(self, session: str, wanted: Filter, *, at: str = "", after: str = "") -> Queue:
        """An image that nobody has judged, which is claimed, and what else is left.

        Args:
            at: id of the image to show, judged or not; empty: the first that nobody else looks at.
            after: only those behind this one.
        """
        version = self.shelf.version
        facts = self.facts(version)
        mask = self.mask(version, facts, wanted)
        fitting = np.ones(len(facts), np.bool_) if mask is None else mask
        is_new = fitting & (facts.codes["verdict"] == 0)
        wait = is_new & facts.is_judgeable
        num_open, num_unread = int(wait.sum()), int((is_new & ~facts.is_judgeable).sum())
        for image_id in self.claims.of_others(session):
            position = self.shelf.find(version, image_id)
            if position is not None:
                wait[position] = False
        order, places = version.orders[wanted.sort]
        position = self.shelf.find(version, at) if at else None
        if position is None:
            edge, _ = self._edge(version, places, after)
            found = _on(order, wait, edge + 1, 1)
            position = int(found[0]) if len(found) else None
        row = None
        if position is None:
            self.claims.drop(session)
        else:
            (row,) = self.shelf.rows(version, np.array([position]), version.live.columns.names)
            if self.claims.take(session, row["image_id"]) is not None and not at:
                return self.queue(session, wanted, after=after)  # somebody took it this very moment
            row = _up_to_date(row, self.judging.fresh(version.number))
        return Queue(row, num_open, num_open - int(wait.sum()), num_unread)

    def _count(self, version: Version, facts: Facts, wanted: Filter) -> tuple[int, dict[str, dict[str, int]]]:
        masks = {facet: facts.mask(facet, values) for facet, values in wanted.chosen}
        condition = self.shelf.condition(version, wanted)
        if condition is not None:
            masks["condition"] = condition
        counts = {}
        for facet in ALL_FACETS:
            others = [mask for name, mask in masks.items() if name != facet]
            among = np.logical_and.reduce(others) if others else None
            counts[facet] = dict.fromkeys(wanted.values(facet), 0) | facts.counts(facet, among)
        every = np.logical_and.reduce(list(masks.values())) if masks else None
        return len(facts) if every is None else int(every.sum()), counts

    def _edge(self, version: Version, places: Positions, image_id: str) -> tuple[int, tuple[str, ...]]:
        """The place of a row in an order; -1: before all."""
        if not image_id:
            return -1, ()
        position = self.shelf.find(version, image_id)
        if position is None:
            return -1, ("The image from which to go on is not in the catalog any more: this is the beginning.",)
        return int(places[position]), ()

    def _changes(self, version: Version) -> dict[int, tuple[str, str]]:
        """Rows whose decision another one was given for since: that, and whose it is."""
        changes: dict[int, tuple[str, str]] = {}
        unread: dict[int, tuple[Hashable, tuple[str, Said]]] = {}
        for image_id, said in self.judging.fresh(version.number).items():
            position = self.shelf.find(version, image_id)
            key: Hashable = (version.number, image_id, *said)
            if position is not None:
                held = self._said_since.get(key)
                if held is None:
                    unread[position] = (key, said)
                else:
                    changes[position] = held
        rows = self.shelf.rows(version, np.array(list(unread), np.int64), CARD_COLUMNS)
        for (position, (key, said)), row in zip(unread.items(), rows, strict=True):
            row = _up_to_date(row, {row["image_id"]: said})
            changes[position] = self._said_since.put(key, (row["decision"], _whose(row["verdict"])))
        return {position: change for position, change in changes.items() if change[0] in DECISIONS}


def _up_to_date(row: dict[str, Any], fresh: Mapping[str, tuple[str, Said]]) -> dict[str, Any]:
    """A row under the verdict that was given on it since, if there is one."""
    content_hash, said = fresh.get(row.get("image_id", ""), (None, None))
    if said is None or content_hash != row.get("content_hash"):
        return row
    held = row.get("verdict")
    model = (row["decision"], row.get("decision_reason"))
    if held is not None:
        model = (held["model_decision"], held["model_reason"])
    if said.decision == WITHDRAWN:
        if _whose(held) != "person":  # the row is as it was before the verdict, and a list may have decided it
            return row
        if model[0] == "allow":  # as the model says, unless a list knows the image: its row will tell
            model = ("review", "verdict taken back")
        return row | {"decision": model[0], "decision_reason": model[1], "verdict": None}
    verdict = {**vars(said), "content_hash": content_hash, "model_decision": model[0], "model_reason": model[1]}
    if row.get("status") in _DOUBTFUL:
        return row | {"verdict": verdict}
    return row | {"decision": said.decision, "decision_reason": "verdict", "verdict": verdict}


def _whose(verdict: Mapping[str, Any] | None) -> str:
    """Nobody's, a person's or a list's: as the facet of verdicts names them."""
    if verdict is None:
        return "nobody"
    return "list" if verdict["reviewer"].startswith(LIST_PREFIX) else "person"


def _page(order: Positions, mask: Mask | None, place: int, *, is_back: bool) -> Positions:
    """The marked rows of a page from a place of an order on, or before it, and one more if there is one."""
    return (_back if is_back else _on)(order, mask, place, PAGE_SIZE + 1)


def _on(order: Positions, mask: Mask | None, start: int, count: int) -> Positions:
    """The first rows that are marked, from a place of an order on."""
    if mask is None:
        return order[start : start + count]
    found, step = [np.empty(0, np.int64)], 4 * count
    while start < len(order) and sum(map(len, found)) < count:
        some = order[start : start + step]
        found.append(some[mask[some]])
        start, step = start + step, 4 * step
    return np.concatenate(found)[:count]


def _back(order: Positions, mask: Mask | None, stop: int, count: int) -> Positions:
    """The last rows that are marked before a place of an order, in that order."""
    return _on(order[:stop][::-1], mask, 0, count)[::-1]
