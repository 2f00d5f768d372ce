"""Results that the catalog holds already for equal bytes: found by content hash, and copied instead of computed.

The index is made on the driver from what the tables hold at planning; workers look hashes up in it and read the few
rows that they need. It says where results *were*: a file that has gone meanwhile, or holds other rows, is no error,
the image is computed then.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.as_written import as_written
from vlmflow.catalog.columns import conform, flat
from vlmflow.catalog.due import PlanRequest
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.judged import by_model
from vlmflow.catalog.keys import KeyIndex, concat, duplicates, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot, TableName
from vlmflow.catalog.masks import Mask, as_mask, decoded_alike, equal
from vlmflow.catalog.read import read_each
from vlmflow.catalog.rows import OK
from vlmflow.errors import CatalogError
from vlmflow.imaging.frames import join_times

logger = logging.getLogger("vlmflow")

# Rows that the index holds at most, 40 bytes each; of the newest partitions, if there are more.
MAX_ROWS = 10_000_000
_HASH = "^[0-9a-f]{64}$"
_KEY_DIGITS = 32  # of a content hash: the first 128 bits find it, all of it is compared before anything is copied
_CACHED_GROUPS = 8  # row groups that a worker keeps: images that were copied come in runs

# What is copied of a row: the tasks' outputs, of which the vectors lie in their own table, and facts.
_IMAGE_COLUMNS = (
    "image_id",
    "text_digest",
    "questions_digest",
    "verdict",
    *schema.FACTS.names,
    *(name for task in schema.TASKS if task != "embed" for name in schema.TASK_OUTPUTS[task].names),
)
_COPY = pa.schema(
    [
        *schema.FACTS,
        *(field for field in schema.WRITER_OPTIONAL if field.name != "verdict"),
        ("text_digest", pa.string()),
        ("questions_digest", pa.string()),
    ]
)


@dataclass(frozen=True)
class _Places:
    """Where rows lie: (N,) each. ``file`` numbers the paths; ``count`` rows from ``row`` on."""

    paths: tuple[str, ...]
    file: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    count: npt.NDArray[np.int16]


@dataclass
class KnownBytes:
    """Finds rows by the content hash of their bytes. Picklable; a worker opens its store on first use."""

    folder: Folder
    tasks: tuple[str, ...]  # whose results every row of the index has, under the fingerprints of the run
    index: KeyIndex  # of the hash -> number of the row in the places
    images: _Places
    vectors: _Places | None
    questions: tuple[str, ...] = ()  # that the run asks of every image
    _cache: OrderedDict[tuple[str, int], pa.Table] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def copies(self, hashes: Sequence[str | None]) -> tuple[Mask, pa.Table]:
        """Reads what is known for some images.

        Args:
            hashes: sha256 of the bytes, hexadecimal; None where nothing was read.

        Returns:
            A mask of the images that are known; and for these, in order, FACTS, the tasks' outputs as
            ``schema.WRITER_OPTIONAL`` has them, ``text_digest``, of the text that `match` scored, and
            ``questions_digest``, of what `answer` was asked.
        """
        given = pa.array(hashes, pa.string())
        prefixes = pc.utf8_slice_codeunits(pc.fill_null(given, "0" * _KEY_DIGITS), 0, _KEY_DIGITS)
        at = self.index.find(*to_words(to_binary(prefixes)))
        at[as_mask(pc.is_null(given))] = -1
        found = np.flatnonzero(at >= 0)
        none = np.zeros(len(hashes), dtype=np.bool_), _COPY.empty_table()
        if not len(found):
            return none
        try:
            rows = self._rows(at[found])
        except CatalogError as error:
            logger.info("equal bytes are computed once more: %s", error)
            return none
        same = equal(rows["content_hash"], given.take(pa.array(found)))
        if self.vectors is not None:
            same &= as_mask(pc.is_valid(rows["vectors"]))
        known = np.zeros(len(hashes), dtype=np.bool_)
        known[found[same]] = True
        return known, rows.filter(pa.array(same))

    def _rows(self, numbers: npt.NDArray[np.int64]) -> pa.Table:
        # A verdict is of an image, not of its bytes wherever they appear.
        images = by_model(self._read("images", self.images, numbers, _IMAGE_COLUMNS))
        if self.vectors is not None:
            images = self._with_vectors(images, self.vectors, numbers)
        return conform(images, _COPY)

    def _with_vectors(self, images: pa.Table, places: _Places, numbers: npt.NDArray[np.int64]) -> pa.Table:
        """Adds the vectors of each image, null where they are not where they were."""
        rows = self._read("embeddings", places, numbers, ("image_id", "view", "time_s", "vector"))
        rows = rows.set_column(1, "view", join_times(rows["view"], rows["time_s"]))
        counts = places.count[numbers].astype(np.int64)
        owner = pa.array(np.repeat(np.arange(len(numbers)), counts))
        theirs = equal(rows["image_id"], flat(images["image_id"]).take(owner))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        good = np.add.reduceat(theirs, offsets[:-1]) == counts if len(counts) else np.empty(0, np.bool_)
        for name, column in (("vectors", "vector"), ("vector_views", "view")):
            values = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat(rows[column]))
            images = images.append_column(name, pc.if_else(pa.array(good), values, pa.scalar(None, values.type)))
        return images

    def _read(
        self, table: TableName, places: _Places, numbers: npt.NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """The rows at some places, one place after the other."""
        counts = places.count[numbers].astype(np.int64)
        files = np.repeat(places.file[numbers], counts)
        starts = np.repeat(places.row[numbers], counts)
        within = np.arange(len(files)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = starts + within
        parts: list[pa.Table] = []
        order: list[npt.NDArray[np.int64]] = []
        for number in np.unique(files).tolist():
            mine = np.flatnonzero(files == number)
            path = f"{table}/{places.paths[number]}"
            found = self.folder.read_parquet_at(path, columns, rows[mine], self._cache, _CACHED_GROUPS)
            parts.append(as_written(found, self.folder, path))
            order.append(mine)
        together = pa.concat_tables(parts, promote_options="default")  # files older than a column lack it
        return together.take(pa.array(np.argsort(np.concatenate(order), kind="stable")))


def known_bytes(
    folder: Folder,
    images: Snapshot,
    embeddings: Snapshot,
    request: PlanRequest,
    sizes: pa.Array | None,
    max_rows: int = MAX_ROWS,
) -> KnownBytes | None:
    """Indexes the rows whose results a run with these fingerprints would compute again.

    Args:
        sizes: bytes of the images to come; only rows of such sizes are indexed. None: any.

    Returns:
        None: there are none.

    Raises:
        CatalogError: a file of the tables cannot be read.
    """
    candidates = _candidates(folder, images, request, sizes, max_rows)
    if candidates is None:
        return None
    rows, places = candidates
    vectors = None
    if "embed" in request.tasks:
        vectors = _vectors_of(folder, embeddings, rows)
        has_vectors = vectors.file >= 0
        rows = rows.filter(pa.array(has_vectors))
        places, vectors = _where(places, has_vectors), _where(vectors, has_vectors)
    if not rows.num_rows:
        return None
    # Of equal bytes one row, the newest that tells how they look: there may be a hundred thousand of them.
    order = np.argsort(as_mask(pc.is_null(rows["phash"])), kind="stable")
    hashes = _hash_keys(rows["content_hash"]).take(pa.array(order))
    once = ~duplicates(hashes)
    places, vectors = _where(places, order[once]), vectors and _where(vectors, order[once])
    index = index_of(hashes.filter(pa.array(once)))
    return KnownBytes(folder, request.tasks, index, places, vectors, request.questions)


def _candidates(
    folder: Folder, images: Snapshot, request: PlanRequest, sizes: pa.Array | None, max_rows: int
) -> tuple[pa.Table, _Places] | None:
    """Rows with all results of the request, the newest files first; which, and where."""
    fingerprints = [schema.fingerprint_column(task) for task in request.tasks]
    decisive = ["status", "errors", "decoder", "policy_digest", "size_bytes", *fingerprints]
    newest_first = sorted(images.files.values(), key=lambda file: (file.ingest_date, file.path), reverse=True)
    fitting: list[tuple[DataFile, Mask]] = []
    num_fitting = 0
    wanted = pa.schema([schema.IMAGES.field(name) for name in decisive]).remove_metadata()
    for file, rows in read_each(folder, "images", newest_first, decisive, ahead=8):
        mask = _fits(conform(rows, wanted), request, sizes)  # of files older than a column it is null
        if not mask.any():
            continue
        fitting.append((file, mask))
        num_fitting += int(mask.sum())
        if num_fitting > max_rows:
            logger.info("equal bytes are looked for among the newest %d rows", num_fitting)
            break
    if not fitting:
        return None
    parts, numbers, positions = [], [], []
    columns = ["image_id", "content_hash", "phash", "embed_run_id", "ingest_date"]
    each = read_each(folder, "images", [file for file, _ in fitting], columns, ahead=8)
    for number, ((_, mask), (_, rows)) in enumerate(zip(fitting, each, strict=True)):
        rows = conform(rows, pa.schema([schema.IMAGES.field(name) for name in columns]))
        mask = mask & as_mask(pc.fill_null(pc.match_substring_regex(rows["content_hash"], _HASH), False))
        parts.append(rows.filter(pa.array(mask)))
        positions.append(np.flatnonzero(mask).astype(np.int32))
        numbers.append(np.full(len(positions[-1]), number, np.int32))
    paths = tuple(file.path for file, _ in fitting)
    row = np.concatenate(positions)
    return pa.concat_tables(parts), _Places(paths, np.concatenate(numbers), row, np.ones(len(row), np.int16))


def _fits(rows: pa.Table, request: PlanRequest, sizes: pa.Array | None) -> Mask:
    mask = equal(rows["status"], OK) & decoded_alike(rows["decoder"], request.decoder)
    mask &= as_mask(pc.equal(pc.fill_null(pc.list_value_length(rows["errors"]), 0), 0))  # frames that were not seen
    for task in request.tasks:
        mask &= equal(rows[schema.fingerprint_column(task)], request.fingerprints[task])
    if "moderate" in request.tasks and request.policy_digest is not None:
        mask &= equal(rows["policy_digest"], request.policy_digest)
    if sizes is not None:
        # A source that does not tell sizes has left them null.
        mask &= as_mask(pc.or_(pc.is_in(rows["size_bytes"], value_set=sizes), pc.is_null(rows["size_bytes"])))
    return mask


def _vectors_of(folder: Folder, embeddings: Snapshot, rows: pa.Table) -> _Places:
    """Where the vectors lie that some rows of the images table refer to; file -1: nowhere, or not all in one place."""
    index = index_of(to_binary(rows["image_id"]))
    runs = flat(rows["embed_run_id"])
    dates = set(pc.unique(rows["ingest_date"]).to_pylist())
    files = [file for file in embeddings.files.values() if file.ingest_date in dates]
    file_of = np.full(rows.num_rows, -1, np.int32)
    first = np.zeros(rows.num_rows, np.int32)
    count = np.zeros(rows.num_rows, np.int16)
    views: dict[str, int] = {}  # their numbers
    pairs: list[npt.NDArray[np.int64]] = []  # of image and view
    for number, (_, held) in enumerate(
        read_each(folder, "embeddings", files, ["image_id", "embed_run_id", "view"], ahead=8)
    ):
        at = index.find(*to_words(to_binary(held["image_id"])))
        same = equal(runs.take(pa.array(at, mask=at < 0)), held["embed_run_id"])
        at = np.where(same, at, -1)
        coded = pc.dictionary_encode(flat(held["view"]))
        numbers = [views.setdefault(name, len(views)) for name in coded.dictionary.to_pylist()]
        codes = np.array(numbers, np.int64)[coded.indices.to_numpy(zero_copy_only=False)]
        pairs.append(np.unique(at[at >= 0] << 32 | codes[at >= 0]))
        # The views of an image are written together; a run that was killed may have left them twice.
        starts = np.flatnonzero((at >= 0) & (at != np.concatenate([[-2], at[:-1]])))
        ends = np.flatnonzero((at >= 0) & (at != np.concatenate([at[1:], [-2]]))) + 1
        new = file_of[at[starts]] < 0
        starts, ends = starts[new], ends[new]
        # Backwards, so that of two places in one file the first stays.
        owners = at[starts][::-1]
        file_of[owners], first[owners], count[owners] = number, starts[::-1], (ends - starts)[::-1]
    # Where another program has put a table's rows in an order of its own, one place does not have them all.
    num_views = np.bincount(np.unique(np.concatenate([np.empty(0, np.int64), *pairs])) >> 32, minlength=rows.num_rows)
    file_of[count != num_views] = -1
    return _Places(tuple(file.path for file in files), file_of, first, count)


def _where(places: _Places, kept: Mask | npt.NDArray[np.int64]) -> _Places:
    return _Places(places.paths, places.file[kept], places.row[kept], places.count[kept])


def _hash_keys(hashes: pa.ChunkedArray) -> pa.FixedSizeBinaryArray:
    if not len(hashes):
        return concat([])
    return to_binary(pc.utf8_slice_codeunits(flat(hashes), 0, _KEY_DIGITS))
