"""A reader that follows a catalog by its changes alone, and checks what it is told against what it holds."""

from __future__ import annotations

from typing import Any

from vlmflow.catalog import Catalog
from vlmflow.catalog.changes import BOOKKEEPING, ChangeCounts

TOLD = ("change", "changed_columns", "decision_before")


class Follower:
    """A copy of a catalog's rows and vectors.

    Args:
        columns: that it follows, ``image_id``, ``uri`` and ``embed_run_id`` among them; None: all.
    """

    def __init__(self, columns: list[str] | None = None) -> None:
        self._columns = columns
        self.rows: dict[str, dict[str, Any]] = {}
        self.vectors: dict[str, dict[str, list[float]]] = {}
        self.since: Any = 0

    def follow(self, catalog: Catalog) -> ChangeCounts:
        """Takes over what has changed; then it holds what the catalog does."""
        feed = catalog.changes(self.since, self._columns)
        for table in feed.tables():
            for row in table.to_pylist():
                told = {name: row.pop(name, None) for name in TOLD}
                self._take(row, **told)
        new: dict[str, dict[str, list[float]]] = {}
        for table in feed.vectors():
            for row in table.to_pylist():
                views = new.setdefault(row["image_id"], {})
                assert row["view"] not in views
                views[row["view"]] = row["vector"]
        self.vectors |= new
        self.since = feed.bookmark
        self._check(catalog)
        return feed.counts

    def _take(
        self, row: dict[str, Any], change: str, changed_columns: list[str] | None, decision_before: str | None
    ) -> None:
        image = row["image_id"]
        if change == "removed":
            assert all(value is None for name, value in row.items() if name != "image_id")
            self.rows.pop(image, None)
            self.vectors.pop(image, None)
            return
        held = self.rows.get(image)
        if change == "added":
            assert held is None
            assert changed_columns is None
        elif changed_columns is not None:
            assert held is not None
            assert set(changed_columns) == differing(held, row)
            assert decision_before == held.get("decision")
        self.rows[image] = row
        if row["embed_run_id"] is None:
            self.vectors.pop(image, None)

    def _check(self, catalog: Catalog) -> None:
        rows = {row["image_id"]: row for row in catalog.images(self._columns).to_pylist()}
        assert rows.keys() == self.rows.keys()
        assert {image for image, row in rows.items() if differing(row, self.rows[image])} == set()
        vectors: dict[str, dict[str, list[float]]] = {}
        for row in catalog.embeddings().to_pylist():
            vectors.setdefault(row["image_id"], {})[row["view"]] = row["vector"]
        assert vectors == self.vectors


def differing(left: dict[str, Any], right: dict[str, Any]) -> set[str]:
    """The columns in which two rows differ, bookkeeping left out; a caller's column as the feed names it.

    By what they look like: NaN is no other value than NaN.
    """
    found = _unlike(left, right) - BOOKKEEPING
    if "source" in found:
        inner = _unlike(left.get("source") or {}, right.get("source") or {})
        found = found - {"source"} | {f"source.{name}" for name in inner}
    return found


def _unlike(left: dict[str, Any], right: dict[str, Any]) -> set[str]:
    return {name for name in left.keys() | right.keys() if repr(left.get(name)) != repr(right.get(name))}
