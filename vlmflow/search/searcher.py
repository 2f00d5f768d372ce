"""Search over one catalog: the index where it covers the rows, the stored vectors where it does not."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.indexes import INDEXES
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.log import Snapshot, TableLog
from vlmflow.catalog.masks import Mask
from vlmflow.config import CatalogConfig, Job
from vlmflow.errors import CatalogError, ConfigError, SearchError
from vlmflow.search.exact import NOTHING, Block, Found, best, search_exact, vector_blocks
from vlmflow.search.index import OpenSegment, search_segments
from vlmflow.search.live import LiveRows, Positions
from vlmflow.search.results import HIT_COLUMNS, Hit, SearchResult, notes_of
from vlmflow.search.segments import Index, read_index
from vlmflow.sources.uris import normalise_uri, spelled
from vlmflow.workspace import Workspace

if TYPE_CHECKING:
    from vlmflow.search.query import Query, QueryEncoder

MAX_TOP_K = 10_000
# Vectors outside the index that stay in memory between queries: a hundred megabytes at 512 dimensions.
_KEPT_ROWS = 50_000
_IMAGE_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, eq=False)
class Asked:
    """A query as the vectors of a catalog see it.

    Attributes:
        vector: (D,) of unit length.
        models: fingerprints of the vectors that it can be compared with.
        itself: the number of the live row that was asked for, of the version it was asked of; None: the query is none.
    """

    vector: NDArray[np.float32]
    models: tuple[str, ...]
    itself: int | None = None


@dataclass(frozen=True, eq=False)
class Newest:
    """A version of the catalog that was read: the live rows, the table of their vectors, and files of the index."""

    live: LiveRows
    embeddings: Snapshot
    index_files: frozenset[str]


class Searcher:
    """Answers queries over one catalog; follows its tables from version to version.

    Args:
        job: profile, models and limits count; None: the profile of the newest run.
        exact: compares every vector, whatever the index.
    """

    def __init__(self, catalog: CatalogConfig, *, job: Job | None = None, exact: bool = False) -> None:
        self._config, self._job, self._exact = catalog, job, exact
        Catalog.open(catalog)  # refuses what is none
        self._folder = Folder(catalog)
        self._images = TableLog.open(self._folder, "images")
        self._embeddings = TableLog.open(self._folder, "embeddings")
        self._encoder: QueryEncoder | None = None
        self._most: str | None = None  # the model of most vectors when that was chosen
        self._live: LiveRows | None = None
        self._snapshot: Snapshot | None = None
        self._index_files: frozenset[str] = frozenset()
        self._indexes: dict[tuple[str, ...], tuple[Index, list[OpenSegment]]] = {}
        self._masks: dict[str, Mask] = {}
        self._kept: dict[tuple[str, ...], list[Block] | None] = {}
        # Copies of index files, where the catalog is not on the local disk; each is downloaded once.
        self._workspace = Workspace()
        weakref.finalize(self, self._workspace.close)

    def search(self, query: Query, *, where: str | None = None, top_k: int = 10) -> SearchResult:
        """The images nearest to a query, the best first.

        Args:
            where: a condition in SQL (DuckDB) over the columns of the images table.

        Raises:
            ConfigError: the condition cannot be used, or no image of the catalog has the uri asked for.
            SearchError: the catalog holds no vector that the query can be compared with.
            ImageError: the query's image cannot be decoded, or exceeds the limits.
            WeightsError: the embedder's weights are absent or do not fit.
        """
        if not 1 <= top_k <= MAX_TOP_K:
            raise ConfigError(f"top_k {top_k}", remedy=f"Ask for 1 to {MAX_TOP_K:,} images.")
        started = time.monotonic()
        live = self.refresh()
        asked = self.ask(query)
        matching = self._matching(live, asked.models, where)
        if asked.itself is not None:
            matching[asked.itself] = False
        found, num_indexed = self.nearest(asked.vector, asked.models, matching, top_k)
        return self._result(live, query, where, top_k, asked.models, matching, found, num_indexed, started)

    def ask(self, query: Query) -> Asked:
        """Makes a vector of a query, in the version of the last :meth:`refresh`; loads the model if it needs one.

        Raises:
            ConfigError, SearchError, ImageError, WeightsError: as :meth:`search`.
        """
        live = self._live
        assert live is not None
        if query.like is not None:
            return self._stored(live, query.like)
        encoder = self._encoder_of(live)
        return Asked(encoder.encode(query), encoder.fingerprints)

    def is_current(self, asked: Asked) -> bool:
        """Whether a query's vector is one that the same query would get now, and that vectors can be compared with."""
        live, encoder = self._live, self._encoder
        assert live is not None
        is_same = encoder is not None and asked.models == encoder.fingerprints
        return is_same and any(name in live.num_by_model for name in asked.models)

    def refresh(self) -> LiveRows:
        """Moves to the newest version of the catalog; no rows are read if there is no newer one."""
        newest = self.newest()
        self.move_to(newest)
        return newest.live

    def newest(self) -> Newest:
        """Reads the newest version of the catalog, for :meth:`move_to`; what is held stays as it is."""
        live, snapshot = self._live, self._images.refresh()
        if live is None or live.version != snapshot.version:
            live = LiveRows(self._folder, snapshot, live)
        # After the images: the vectors of the rows just read are there by then.
        return Newest(live, self._embeddings.refresh(), self._list_index())

    def has_new_index(self) -> bool:
        """Whether files of the index have come or gone: an update of it leaves the tables as they are."""
        return self._list_index() != self._index_files

    def move_to(self, newest: Newest) -> None:
        """Answers from this version on; if that fails, from the one before as ever."""
        if newest.live is not self._live or newest.index_files != self._index_files:
            # What was erased from the catalog does not stay on this disk either.
            self._folder.drop_copies(self._workspace.path, INDEXES)
            self._indexes, self._masks, self._kept = {}, {}, {}
        self._live, self._snapshot, self._index_files = newest.live, newest.embeddings, newest.index_files
        if self._encoder is not None and self._job is None and self._is_left_behind(self._encoder, newest.live):
            self._encoder = None  # the newest run names another profile, or other weights of this one

    def nearest(
        self, vector: NDArray[np.float32], models: Sequence[str], wanted: Mask, top_k: int
    ) -> tuple[Found, int]:
        """The best of the marked live rows, and how many of them were looked for in the index.

        Args:
            vector: (D,) of unit length.
            models: fingerprints of the vectors to compare with.
            wanted: (N,) over the live rows, all of these models.
        """
        live, snapshot = self._live, self._snapshot
        assert live is not None
        assert snapshot is not None
        index, segments = (Index((), ()), []) if self._exact else self._index(live, tuple(models))
        covered = index.covered(len(live))
        rest = wanted & ~covered
        found = search_segments(segments, vector, top_k, wanted) if segments else NOTHING
        if rest.any():
            blocks = self._blocks(live, snapshot, tuple(models), ~covered, rest)
            found = best([found, search_exact(blocks, vector, top_k)], top_k)
        return found, int(wanted.sum() - rest.sum())

    def vectors(self, model: str, wanted: Mask) -> Iterator[Block]:
        """The stored vectors of marked live rows, those of one model, in blocks."""
        live, snapshot = self._live, self._snapshot
        assert live is not None
        assert snapshot is not None
        return vector_blocks(self._folder, snapshot, live, wanted & live.of_models([model]))

    def covering(self, model: str, wanted: Mask) -> list[OpenSegment]:
        """The index over the vectors of one model.

        Raises:
            SearchError: it does not cover all marked rows.
        """
        live = self._live
        assert live is not None
        index, segments = self._index(live, (model,))
        missing = int((wanted & ~index.covered(len(live))).sum())
        if missing:
            raise SearchError(
                f"{missing:,} of {int(wanted.sum()):,} images are not in the index, and they are too many to compare "
                "each with each",
                remedy="Run `vlmflow search CATALOG --build-index` first, or narrow the images with --where of "
                "`vlmflow duplicates`.",
            )
        return segments

    def _blocks(
        self, live: LiveRows, snapshot: Snapshot, models: tuple[str, ...], uncovered: Mask, wanted: Mask
    ) -> Iterator[Block]:
        """The vectors to compare one by one: from the files, or, where few are not in the index, kept in memory."""
        if models not in self._kept:
            of_models = live.of_models(models) & uncovered
            few = int(of_models.sum()) <= _KEPT_ROWS
            self._kept[models] = list(vector_blocks(self._folder, snapshot, live, of_models)) if few else None
        kept = self._kept[models]
        if kept is None:
            yield from vector_blocks(self._folder, snapshot, live, wanted)
            return
        for positions, vectors in kept:
            marks = wanted[positions]
            yield positions[marks], vectors[marks]

    def _list_index(self) -> frozenset[str]:
        return frozenset() if self._exact else frozenset(file.path for file in self._folder.list(INDEXES))

    def _index(self, live: LiveRows, models: tuple[str, ...]) -> tuple[Index, list[OpenSegment]]:
        if models not in self._indexes:
            try:
                self._indexes[models] = self._opened(live, models)
            except CatalogError:  # an update has just put other segments in the place of these
                self._indexes[models] = self._opened(live, models)
        return self._indexes[models]

    def _opened(self, live: LiveRows, models: tuple[str, ...]) -> tuple[Index, list[OpenSegment]]:
        index = read_index(self._folder, live, models)
        opened = []
        for segment in index.segments:
            path = self._folder.local_copy(segment.paths[0], self._workspace.path, segment.info.num_bytes)
            opened.append(OpenSegment(segment, path))
        return index, opened

    def _encoder_of(self, live: LiveRows) -> QueryEncoder:
        if self._encoder is None:
            from vlmflow.search.query import QueryEncoder, search_job  # with torch, which `like` does without

            job = self._job
            if job is None:
                from vlmflow.engine.report import last_profile

                job = search_job(self._config, last_profile(self._config))
            self._encoder, self._most = QueryEncoder(job), next(iter(live.num_by_model), None)
        held = live.num_by_model
        if not held:
            raise SearchError(
                f"{self._config.uri} holds no embeddings", remedy="Run `vlmflow enrich` with the task embed."
            )
        if not any(name in held for name in self._encoder.fingerprints):
            row = int(np.flatnonzero(live.of_models([next(iter(held))]))[0])
            made_by = live.take(np.array([row]), ["embed_model"])["embed_model"][0].as_py()
            raise SearchError(
                f"the embeddings of {self._config.uri} were made by {made_by}, the query would be by "
                f"{self._encoder.model} with other weights or settings",
                remedy="Name the profile that made them with --profile, or the job with --config, or embed the catalog "
                "anew with this one.",
            )
        return self._encoder

    def _is_left_behind(self, encoder: QueryEncoder, live: LiveRows) -> bool:
        """Whether vectors are of other models than when the encoder was chosen: of none of its own, or most of them."""
        held = live.num_by_model
        most = next(iter(held), None)
        is_most_other = most != self._most and most not in encoder.fingerprints
        return is_most_other or not any(name in held for name in encoder.fingerprints)

    def _stored(self, live: LiveRows, uri: str) -> Asked:
        """The vector of an image of the catalog, what made it, and its row."""
        assert self._snapshot is not None
        found = _rows_of(live, uri)
        if not len(found):
            raise ConfigError(f"image {uri!r} is not in {self._config.uri}", remedy="Name a uri of its rows.")
        embedded = [row for row in found.tolist() if live.model_of(row) is not None]
        mask = np.zeros(len(live), np.bool_)
        mask[embedded[:1]] = True  # of several with this uri: models may differ
        for positions, vectors in vector_blocks(self._folder, self._snapshot, live, mask):
            model = live.model_of(int(positions[0]))
            if model is not None:
                return Asked(vectors[0], (model,), int(positions[0]))
        raise SearchError(f"image {uri!r} has no embedding", remedy="Run `vlmflow enrich` with the task embed.")

    def _matching(self, live: LiveRows, models: Sequence[str], where: str | None) -> Mask:
        """A fresh mask of the rows that may be found."""
        mask = live.of_models(models)
        if where is None:
            return mask
        if where not in self._masks:
            self._masks = {where: live.mask(where)}  # the last one: a person pages and refines
        return mask & self._masks[where]

    def _result(
        self,
        live: LiveRows,
        query: Query,
        where: str | None,
        top_k: int,
        models: Sequence[str],
        matching: Mask,
        found: Found,
        num_indexed: int,
        started: float,
    ) -> SearchResult:
        rows = live.take(found.positions, HIT_COLUMNS).to_pylist()
        hits = tuple(
            Hit(rank=rank, score=float(score), **{**row, "ingest_date": row["ingest_date"].isoformat()})
            for rank, (row, score) in enumerate(zip(rows, found.scores.tolist(), strict=True), start=1)
        )
        counts = live.num_by_model
        num_rows = sum(counts.get(name, 0) for name in models)
        num_other = sum(counts.values()) - num_rows
        num_matching = int(matching.sum())
        assert self._snapshot is not None
        return SearchResult(
            query=spelled(str(query)),
            where=where,
            top_k=top_k,
            model=",".join(name for name in models if name in counts),
            catalog=self._config.uri,
            images_version=live.version,
            embeddings_version=self._snapshot.version,
            num_rows=num_rows,
            num_matching=num_matching,
            num_indexed=num_indexed,
            num_other_model=num_other,
            seconds=time.monotonic() - started,
            notes=notes_of(num_matching, num_indexed, num_other, exact=self._exact),
            hits=hits,
        )


def _rows_of(live: LiveRows, image: str) -> Positions:
    """The live rows with an id, or with a uri as it is written in the table or as a person would write it."""
    if _IMAGE_ID.fullmatch(image):
        by_id = live.find(to_binary(pa.array([image])))
        if by_id[0] >= 0:
            return by_id
    image = spelled(image)
    wanted = pa.array([image, normalise_uri(image)], pa.string())
    keys = [
        rows["image_id"].filter(pc.is_in(rows["uri"], value_set=wanted)) for _, rows in live.read(["image_id", "uri"])
    ]
    return live.find(to_binary(pa.chunked_array([c for key in keys for c in key.chunks], pa.string())))


def search_images(
    catalog: CatalogConfig,
    query: Query,
    *,
    where: str | None = None,
    top_k: int = 10,
    job: Job | None = None,
    exact: bool = False,
) -> SearchResult:
    """Searches a catalog once, the best hits first; see :class:`Searcher`, which is faster for more than one query.

    Args:
        where: a condition in SQL (DuckDB) over the columns of the images table; other rows are left out.
        top_k: at most so many hits.
        job: profile, models and limits count; None: the profile of the newest run.
        exact: compares every vector, whatever the index.

    Raises:
        CatalogError: there is no catalog.
        ConfigError, SearchError, ImageError, WeightsError: as :meth:`Searcher.search`.
    """
    return Searcher(catalog, job=job, exact=exact).search(query, where=where, top_k=top_k)
