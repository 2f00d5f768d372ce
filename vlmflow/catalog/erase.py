"""Erasure: takedowns and the right to erasure. What an image left in a catalog is physically gone afterwards.

The tombstone comes first. Then each table gets a commit that takes the rows out, and that is made even where there
are none: whoever decided on a version before it has to decide anew, and looks at the tombstones then. So a run in
flight either commits first, and its rows are found here, or afterwards, and leaves them out. Only then are files
removed: all that are in no version any more and hold one of the images, whatever their age.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.files import look_through
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.indexes import files_holding
from vlmflow.catalog.keys import KeyIndex, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot, TableLog
from vlmflow.catalog.masks import Mask
from vlmflow.catalog.read import read_each, read_rows
from vlmflow.catalog.reviews import REVIEWS
from vlmflow.catalog.runs import RUNS, RunStore
from vlmflow.catalog.tombstones import Tombstones
from vlmflow.catalog.vacuum import RETENTION, revoke
from vlmflow.catalog.writer import write_file
from vlmflow.errors import CatalogError

_REDACTED = "<erased>"
_SHORTEST_URI = 6  # a shorter text might stand in a record by chance


@dataclass
class EraseResult:
    """What an erasure removed.

    Attributes:
        num_images: asked for.
        num_rows, num_vectors: taken out of the newest versions.
        num_files: older or never committed files that held the images, or could not be read, deleted.
        num_index_files: files of vector indexes, deleted whole; the next update of the index writes the others anew.
        num_records: records of runs in which an address was blotted out.
        live_runs: runs at work, which may still hold the images in files that they have not committed. They will not
            commit them; the erasure is complete when it has been asked for again after their end.
        failed: files that could not be deleted.
    """

    num_images: int
    num_rows: int = 0
    num_vectors: int = 0
    num_files: int = 0
    num_index_files: int = 0
    num_reviews: int = 0
    num_records: int = 0
    live_runs: tuple[str, ...] = ()
    failed: tuple[str, ...] = field(default=())

    @property
    def is_complete(self) -> bool:
        """Nothing is left."""
        return not (self.live_runs or self.failed)


def erase(
    folder: Folder,
    logs: tuple[TableLog, ...],
    runs: RunStore,
    tombstones: Tombstones,
    keys: pa.Array,
    run_id: str,
    uris: tuple[str, ...] = (),
) -> EraseResult:
    """Erases images.

    Args:
        logs: images first.
        keys: the images, as ``schema.KEY``.
        run_id: of this erasure.
        uris: further addresses to blot out of records, beside those of the rows.
    """
    wanted = index_of(keys)
    result = EraseResult(num_images=len(keys))
    tombstones.put(keys)
    states = runs.states()
    states.pop(run_id, None)
    dead = tuple(sorted(run for run, state in states.items() if state == "dead"))
    if dead:
        revoke(logs, run_id, dead)
    removals = []
    for log in logs:
        removal = _Removal(log, wanted, run_id)
        request = CommitRequest(uuid.uuid4().hex, run_id, "erase", log.refresh().version, always=True)
        commit(log, request, removal.propose)
        removals.append(removal)
    result.num_rows, result.num_vectors = (removal.num_rows for removal in removals)
    texts = {*uris, *removals[0].uris}
    doomed = [found.file.path for found in look_through(folder, logs, states, RETENTION) if found.kind in _GONE]
    holding = [path for path in doomed if _holds(folder, path, wanted)]
    # An address may stand in a version that is no longer the newest, and nowhere else.
    texts |= {uri for path in holding for uri in _uris_in(folder, path, wanted)}
    result.num_reviews = _erase_reviews(folder, wanted)
    failed = folder.delete_all(holding)
    result.num_files = len(holding) - len(failed)
    of_indexes = files_holding(folder, wanted)
    kept = folder.delete_all(of_indexes)
    result.num_index_files = len(of_indexes) - len(kept)
    failed += kept
    result.num_records = _redact(folder, states, texts)
    result.failed = tuple(failed)
    result.live_runs = tuple(sorted(run for run, state in states.items() if state == "running"))
    return result


_GONE = ("old", "orphan", "staged")


class _Removal:
    """Takes images out of a table: the files that hold one are written anew without it."""

    def __init__(self, log: TableLog, wanted: KeyIndex, run_id: str) -> None:
        self._log, self._wanted, self._run_id = log, wanted, run_id
        self._clean: set[str] = set()  # files known to hold none
        self._written: dict[str, DataFile | None] = {}  # by the path of the file in whose place it comes
        self._rows: dict[str, int] = {}
        self.uris: set[str] = set()
        self.num_rows = 0

    def propose(self, snapshot: Snapshot) -> Change:
        """Decides on a snapshot; see :func:`vlmflow.catalog.commit.commit`."""
        unknown = [file for path, file in snapshot.files.items() if path not in self._clean | self._written.keys()]
        for file, rows in read_each(self._log.folder, self._log.name, unknown, ["image_id"], ahead=8):
            if _mask(rows, self._wanted).any():
                self._written[file.path] = self._without(file)
            else:
                self._clean.add(file.path)
        removed = [file for path, file in snapshot.files.items() if path in self._written]
        added = [self._written[file.path] for file in removed]
        self.num_rows = sum(self._rows[file.path] for file in removed)
        return Change(add=tuple(file for file in added if file is not None), remove=tuple(removed))

    def _without(self, file: DataFile) -> DataFile | None:
        rows = read_rows(self._log.folder, self._log.name, file)
        marks = _mask(rows, self._wanted)
        self._rows[file.path] = int(marks.sum())
        if "uri" in rows.column_names:
            self.uris |= set(rows["uri"].filter(pa.array(marks)).to_pylist())
        kept = rows.filter(pa.array(~marks))
        if not kept.num_rows:
            return None
        return write_file(self._log.folder, self._log.name, kept, file.ingest_date, self._run_id)


def without_erased(
    folder: Folder, log: TableLog, files: list[tuple[DataFile, pa.Array]], erased: KeyIndex, run_id: str
) -> list[DataFile]:
    """Files that a run wrote, those with erased images replaced by others without them.

    Args:
        files: with the keys of their rows.
    """
    out: list[DataFile] = []
    for file, keys in files:
        if not (erased.find(*to_words(keys)) >= 0).any():
            out.append(file)
            continue
        rows = read_rows(folder, log.name, file)
        kept = rows.filter(pa.array(~_mask(rows, erased)))
        if kept.num_rows:
            out.append(write_file(folder, log.name, kept, file.ingest_date, run_id))
    return out


def _mask(rows: pa.Table, wanted: KeyIndex) -> Mask:
    found: Mask = wanted.find(*to_words(to_binary(rows["image_id"]))) >= 0
    return found


def _holds(folder: Folder, path: str, wanted: KeyIndex) -> bool:
    """Whether a file that no version refers to holds an image; True if that cannot be told: it is of no use either."""
    try:
        return bool(_mask(folder.read_parquet(path, ["image_id"]), wanted).any())
    except CatalogError:  # damaged, or a vacuum has removed it meanwhile
        return True


def _uris_in(folder: Folder, path: str, wanted: KeyIndex) -> set[str]:
    if path.startswith("embeddings/"):
        return set()
    try:
        rows = folder.read_parquet(path, ["image_id", "uri"])
    except CatalogError:  # as above
        return set()
    return set(rows["uri"].filter(pa.array(_mask(rows, wanted))).to_pylist())


def _erase_reviews(folder: Folder, wanted: KeyIndex) -> int:
    """Takes the images out of whatever lies under ``reviews/``; returns the number of verdicts."""
    count = 0
    for file in list(folder.list(REVIEWS)):
        reader = _REVIEW_READERS.get(file.path.rpartition(".")[2])
        rows = reader(folder, file.path) if reader else None
        if rows is None or "image_id" not in rows.column_names:
            continue
        marks = np.asarray(_mask(rows, wanted))
        if not marks.any():
            continue
        count += int(marks.sum())
        kept = rows.filter(pa.array(~marks))
        if kept.num_rows:  # under another name first: a kill in between doubles verdicts, and loses none
            folder.write_parquet(f"{REVIEWS}/{uuid.uuid4().hex}.parquet", kept)
        folder.delete(file.path)
    return count


def _read_json_lines(folder: Folder, path: str) -> pa.Table:
    return pj.read_json(pa.BufferReader(folder.read(path) or b""))


_REVIEW_READERS: dict[str, Callable[[Folder, str], pa.Table]] = {
    "parquet": lambda folder, path: folder.read_parquet(path),
    "jsonl": _read_json_lines,
}


def _redact(folder: Folder, states: Mapping[str, str], texts: set[str]) -> int:
    """Blots addresses out of the records of runs that are over."""
    written = [json.dumps(text, ensure_ascii=False)[1:-1] for text in texts if len(text) >= _SHORTEST_URI]
    count = 0
    for path in _records(folder, states):
        before = (folder.read(path) or b"").decode("utf-8")
        after = before
        # The longest first: one address may begin another.
        for text in sorted(written, key=len, reverse=True):
            after = after.replace(text, _REDACTED)
        if after != before:
            folder.write(path, after.encode("utf-8"))
            count += 1
    return count


def _records(folder: Folder, states: Mapping[str, str]) -> Iterator[str]:
    for file in list(folder.list(RUNS)):
        run_id = file.path.removeprefix(f"{RUNS}/").rpartition(".")[0]
        if file.path.endswith(".json") and states.get(run_id) != "running":
            yield file.path


def keys_of_uris(images: Iterator[pa.Table], uris: set[str]) -> pa.Array:
    """The keys of the rows with these normalised addresses: several, where the caller gave keys of their own."""
    value_set = pa.array(sorted(uris), pa.string())
    found = [rows["image_id"].filter(pc.is_in(rows["uri"], value_set=value_set)) for rows in images]
    return to_binary(pa.chunked_array([chunk for column in found for chunk in column.chunks], pa.string()))
