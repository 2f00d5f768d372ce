"""The newest version of a catalog, held ready for requests: facts of every row in memory, the rest in its files.

A version is read whole in the background before it takes the place of the one before it, so that no request waits for
it. N: rows of the version.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog import Catalog
from vlmflow.catalog.as_written import as_written
from vlmflow.catalog.columns import conform, flat
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.masks import Mask, as_mask
from vlmflow.config import CatalogConfig, Job
from vlmflow.errors import VlmflowError
from vlmflow.search.exact import Found
from vlmflow.search.live import LiveRows, Positions
from vlmflow.search.results import notes_of
from vlmflow.search.searcher import Asked, Searcher
from vlmflow.web.cache import Cache
from vlmflow.web.facts import FactReader, Facts
from vlmflow.web.filters import Filter

logger = logging.getLogger("vlmflow")

POLL_S = 5.0  # how often it is looked for a newer version
# What is shown of many rows, and what their pictures need. Together with the columns of the whole row they are the two
# sets that are read.
CARD_COLUMNS = (
    "image_id", "uri", "object_version", "content_hash", "caption", "decision", "decision_reason", "status", "width",
    "height", "text_itm", "text_itc", "verdict", "errors",
)  # fmt: skip
_CARD_GROUPS = 64  # row groups of 16,384 rows that stay in memory with these columns
_WHOLE_GROUPS = 3  # and with all


@dataclass(frozen=True, eq=False)
class Version:
    """One version of the images table.

    Attributes:
        orders: by name of a sort, (N,) the numbers of the rows in that order, and (N,) the place of each row in it.
    """

    live: LiveRows
    facts: Facts
    orders: Mapping[str, tuple[Positions, Positions]]

    @property
    def number(self) -> int:
        """As the table counts its versions."""
        return self.live.version

    def __len__(self) -> int:
        return len(self.live)


class Shelf:
    """Holds the newest version, and looks for newer ones.

    Args:
        job: of text and image queries; None: the profile of the newest run.

    Raises:
        CatalogError: there is no catalog.
    """

    def __init__(self, catalog: CatalogConfig, job: Job | None = None) -> None:
        self.config = catalog
        self.catalog = Catalog.open(catalog)
        self._folder = Folder(catalog)
        self._searcher = Searcher(catalog, job=job)
        self._facts = FactReader(self._folder)
        self._loading = threading.Lock()  # of a version: one at a time, and beside requests
        self._searching = threading.Lock()  # the searcher, and the version that it is at
        self._reading = threading.Lock()
        self._cards: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._whole: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._masks: Cache[Mask] = Cache(16)
        self._asked: Cache[Asked] = Cache(256)
        self._version = self._read(None)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._poller: threading.Thread | None = None

    @property
    def version(self) -> Version:
        """The newest version that was read."""
        return self._version

    def start(self) -> None:
        """Begins to look for newer versions, in a thread."""
        self._poller = threading.Thread(target=self._poll, name="vlmflow-shelf", daemon=True)
        self._poller.start()

    def stop(self) -> None:
        """Ends that."""
        self._stop.set()
        self._wake.set()
        if self._poller is not None:
            self._poller.join()

    def look(self) -> None:
        """Has a newer version looked for now, in the background."""
        self._wake.set()

    def refresh(self) -> Version:
        """Moves to the newest version here and now, and to the index as it is now."""
        if self.catalog.version != self._version.number or self._searcher.has_new_index():
            self._read(self._version)
        return self._version

    def rows(self, version: Version, positions: Positions, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of some rows, in the order asked for; only the row groups that hold them are read."""
        wanted = pa.schema([version.live.columns.field(name) for name in columns])
        is_card = set(columns) <= set(CARD_COLUMNS)
        groups, most = (self._cards, _CARD_GROUPS) if is_card else (self._whole, _WHOLE_GROUPS)
        names = [name for name in (CARD_COLUMNS if is_card else version.live.columns.names) if name != "ingest_date"]
        files = np.searchsorted(version.live.starts, positions, side="right") - 1
        found: list[dict[str, Any]] = [{}] * len(positions)
        for number in np.unique(files).tolist():
            file = version.live.files[number]
            here = np.flatnonzero(files == number)
            with self._reading:
                at = positions[here] - version.live.starts[number]
                path = f"images/{file.path}"
                rows = as_written(self._folder.read_parquet_at(path, names, at, groups, most), self._folder, path)
            date = pa.repeat(pa.scalar(file.ingest_date, pa.date32()), rows.num_rows)
            rows = conform(rows.append_column("ingest_date", date), wanted)
            for place, row in zip(here.tolist(), rows.to_pylist(), strict=True):
                found[place] = row
        return found

    def find(self, version: Version, image_id: str) -> int | None:
        """The number of an image's row; None: there is none, or it is no id."""
        if len(image_id) != 32 or not set(image_id) <= set("0123456789abcdef"):
            return None
        found = int(version.live.find(to_binary(pa.array([image_id])))[0])
        return None if found < 0 else found

    def condition(self, version: Version, wanted: Filter) -> Mask | None:
        """(N,) rows that the texts of a filter leave; None: all.

        Raises:
            ConfigError: the condition cannot be used.
        """
        masks = []
        if wanted.where:
            key = (version.number, "where", wanted.where)
            masks.append(self._masks.get_or_make(key, lambda: version.live.mask(wanted.where)))
        if wanted.find:
            key = (version.number, "find", wanted.find)
            masks.append(self._masks.get_or_make(key, lambda: _holding(version.live, wanted.find)))
        return None if not masks else np.logical_and.reduce(masks)

    def ask(self, key: str, query: Any) -> Asked:
        """Makes a query's vector, and keeps it under a key.

        Raises:
            WeightsError, SearchError, ImageError, ConfigError: as :meth:`vlmflow.search.searcher.Searcher.search`.
        """
        with self._searching:
            return self._asked.put(key, self._searcher.ask(query))

    def asked(self, key: str) -> Asked | None:
        """A query's vector that was kept; None: none was, or the catalog has been embedded by another model since."""
        found = self._asked.get(key)
        return found if found is not None and self._searcher.is_current(found) else None

    def nearest(
        self, asked: Asked | str, among: Callable[[Version], Mask | None], top_k: int
    ) -> tuple[Version, Found, int, tuple[str, ...]]:
        """The rows that are nearest to a query.

        Args:
            asked: or the id of an image, whose stored vector is taken.
            among: (N,) rows of a version that may be found; None: all.

        Returns:
            The version, its rows, how many of them could be found, and what a person should know of the search.

        Raises:
            ConfigError: there is no such image.
            SearchError: it has no embedding.
        """
        with self._searching:
            version = self._version
            if isinstance(asked, str):
                from vlmflow.search.query import Query

                asked = self._searcher.ask(Query(like=asked))
            matching = version.live.of_models(asked.models)
            marks = among(version)
            if marks is not None:
                matching &= marks
            if asked.itself is not None:
                matching[asked.itself] = False
            found, num_indexed = self._searcher.nearest(asked.vector, asked.models, matching, top_k)
        counts, num_matching = version.live.num_by_model, int(matching.sum())
        num_other = sum(counts.values()) - sum(counts.get(name, 0) for name in asked.models)
        return version, found, num_matching, notes_of(num_matching, num_indexed, num_other, exact=False)

    def _read(self, held: Version | None) -> Version:
        with self._loading:
            newest = self._searcher.newest()
            if held is not None and newest.live is held.live:
                version = held
            else:
                facts = self._facts.read(newest.live.files)
                version = Version(newest.live, facts, _orders(newest.live, facts))
            # Once all is read, and both at once: rows are numbers, which mean others in another version.
            with self._searching:
                self._searcher.move_to(newest)
                self._version = version
        return version

    def _poll(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(POLL_S)
            self._wake.clear()
            try:
                if not self._stop.is_set():
                    self.refresh()
            except Exception as error:  # noqa: BLE001 - what is held stays good, and the next look may succeed
                logger.warning("the catalog could not be looked at: %s", in_words(error))


def in_words(error: Exception) -> str:
    """An error for the log: of one that we do not know the class too, which its text may not tell."""
    return str(error) if isinstance(error, VlmflowError) else f"{type(error).__name__}: {error}"


def _orders(live: LiveRows, facts: Facts) -> dict[str, tuple[Positions, Positions]]:
    """Rows in each order. Ids are hashes: their order is that of a shuffle, and decides between equals."""
    by_id = live.by_id
    dates = np.array([file.ingest_date.toordinal() for file in live.files], np.int32)
    ages = -np.repeat(dates, np.diff(live.starts))
    keys = {"random": None, "new": ages, "near": facts.gap, "match": facts.match}
    orders = {}
    for name, key in keys.items():
        order = by_id if key is None else by_id[np.argsort(key[by_id], kind="stable")]
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        orders[name] = (order, places)
    return orders


def _holding(live: LiveRows, text: str) -> Mask:
    """(N,) rows whose address holds a text."""
    mask = np.zeros(len(live), np.bool_)
    for start, rows in live.read(["uri"]):
        found = as_mask(pc.match_substring(flat(rows["uri"]), text, ignore_case=True))
        mask[start : start + rows.num_rows] = found
    return mask
