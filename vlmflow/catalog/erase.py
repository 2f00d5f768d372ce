"""Erasure: takedowns and the right to erasure. What an image left in a catalog is physically gone afterwards.

The tombstone comes first. Then each table gets a commit that takes the rows out, and that is made even where there
are none: whoever decided on a version before it has to decide anew, and looks at the tombstones then. So a run in
flight either commits first, and its rows are found here, or afterwards, and leaves them out. Only then are files
removed: all that are in no version any more and hold one of the images, whatever their age.

An address stands for whatever images have it, under any key of the caller's. Vectors, verdicts and indexes know ids
alone, so each image that is found by its address becomes erased by its id too before they are looked through.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from vlmflow.catalog.columns import conform
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.file_info import FileInfo
from vlmflow.catalog.files import is_being_written, look_through
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.indexes import INDEXES, files_holding
from vlmflow.catalog.keys import KeyIndex, concat, duplicates, index_of, to_binary, to_words
from vlmflow.catalog.log import DataFile, Snapshot, TableLog
from vlmflow.catalog.masks import Mask, as_mask
from vlmflow.catalog.messages import MESSAGES
from vlmflow.catalog.read import read_each, read_rows
from vlmflow.catalog.redact import redact
from vlmflow.catalog.reviews import REVIEWS
from vlmflow.catalog.runs import LEASE_SUFFIX, RUNS, RunState, RunStore
from vlmflow.catalog.tombstones import Tombstones, address_keys
from vlmflow.catalog.vacuum import RETENTION, revoke
from vlmflow.catalog.writer import STAGING, write_file
from vlmflow.errors import CatalogError
from vlmflow.threads import Threads

_AT_ONCE = 16  # small files that are read and written at a time, and columns of others that are read


@dataclass
class EraseResult:
    """What an erasure removed.

    Attributes:
        num_images: asked for, and found by the addresses asked for.
        num_rows, num_vectors: taken out of the newest versions.
        num_files: older or never committed files that held the images, or could not be read, deleted. What a process
            left half written when it was killed is among them, whatever it holds.
        num_index_files: files of vector indexes, deleted whole; the next update of the index writes the others anew.
        num_records: records of runs, and messages, in which an address was blotted out.
        live_runs: runs at work, which may still hold the images in files that they have not committed. They will not
            commit them; the erasure is complete when it has been asked for again after their end.
        failed: files that could not be deleted, or that somebody may be writing at the moment, and messages that the
            store refuses.
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
        keys: images, as ``schema.KEY``.
        run_id: of this erasure.
        uris: normalised addresses, of which all images are erased; they are blotted out of records as those of the
            rows are.

    Raises:
        UnsupportedTableError: another program has made of a table what vlmflow cannot write to; nothing was erased.
    """
    for log in logs:
        log.check_writable()
    tombstones.put(keys, uris)
    states = runs.states()
    states.pop(run_id, None)
    dead = tuple(sorted(run for run, state in states.items() if state == "dead"))
    if dead:
        revoke(logs, run_id, dead)
    images, embeddings = logs
    of_images = _Removal(images, concat([keys, tombstones.found_by(uris)]), uris, run_id)
    of_images.commit()
    holding = of_images.holding(states, runs.now())
    # An address may stand in a version that is no longer the newest, and nowhere else.
    rows = pa.concat_tables([_ROWS.empty_table(), *of_images.removed, *holding.values()])
    keys = concat([keys, _found_by_address(rows, tombstones, uris)])
    keys = keys.filter(pa.array(~duplicates(keys)))
    of_embeddings = _Removal(embeddings, keys, (), run_id)
    of_embeddings.commit()
    result = EraseResult(len(keys), of_images.num_rows, of_embeddings.num_rows)
    doomed = [*holding, *of_embeddings.holding(states, runs.now())]
    wanted = index_of(keys)
    result.num_reviews = _erase_reviews(folder, wanted)
    # Before the files go: of an image erased by its id nothing else tells the address, and a kill may come in between.
    result.num_records, refused = redact(folder, states, {*uris, *rows["uri"].to_pylist()}, wanted)
    failed = [*folder.delete_all(doomed), *_being_written(folder, runs.now())]
    result.num_files = len(set(doomed) - set(failed))
    of_indexes = files_holding(folder, wanted)
    kept = folder.delete_all(of_indexes)
    result.num_index_files = len(of_indexes) - len(kept)
    result.failed = (*failed, *kept, *refused)
    result.live_runs = tuple(sorted(run for run, state in states.items() if state == "running"))
    return result


_GONE = ("old", "orphan", "staged")
_ROWS = pa.schema([("image_id", pa.string()), ("uri", pa.string())])
_OTHERS = (REVIEWS, INDEXES, RUNS, MESSAGES)  # folders whose files name images too
# By table: where its files lie, and those that are nobody's.
_FOLDERS = {
    "images": ("images/", f"{STAGING}/", *(f"{name}/" for name in _OTHERS)),
    "embeddings": ("embeddings/",),
}


def _found_by_address(rows: pa.Table, tombstones: Tombstones, uris: Sequence[str]) -> pa.Array:
    """The images that have one of these addresses, by id, whenever they were found; they are erased by id from now on.

    Args:
        rows: ``_ROWS``, of images that are being erased.
    """
    rows = rows.filter(pc.is_in(rows["uri"], value_set=pa.array(uris, pa.string())))
    keys = to_binary(rows["image_id"])
    unknown = ~duplicates(keys) & (tombstones.erased().ids.find(*to_words(keys)) < 0)
    if unknown.any():
        marks = pa.array(unknown)
        tombstones.put_found(keys.filter(marks), address_keys(rows["uri"].filter(marks).to_pylist()))
    return concat([keys, tombstones.found_by(uris)])


class _Removal:
    """Takes images out of a table: the files that hold one are written anew without it.

    Args:
        keys, uris: the images by id, and by address.
    """

    def __init__(self, log: TableLog, keys: pa.Array, uris: Sequence[str], run_id: str) -> None:
        self._log, self._run_id = log, run_id
        self._ids, self._uris = index_of(keys), pa.array(uris, pa.string())
        self._clean: set[str] = set()  # files known to hold none
        self._written: dict[str, DataFile | None] = {}  # by the path of the file in whose place it comes
        self._rows: dict[str, int] = {}
        self.removed: list[pa.Table] = []  # of the images, `_ROWS`
        self.num_rows = 0

    def commit(self) -> None:
        """Takes them out of the newest version, by a commit that is made though there are none."""
        request = CommitRequest(uuid.uuid4().hex, self._run_id, "erase", self._log.refresh().version, always=True)
        commit(self._log, request, self.propose)

    def propose(self, snapshot: Snapshot) -> Change:
        """Decides on a snapshot; see :func:`vlmflow.catalog.commit.commit`."""
        unknown = [file for path, file in snapshot.files.items() if path not in self._clean | self._written.keys()]
        names = _ROWS.names if len(self._uris) else ["image_id"]
        for file, rows in read_each(self._log.folder, self._log.name, unknown, names, ahead=8):
            if self._mask(rows).any():
                self._written[file.path] = self._without(file)
            else:
                self._clean.add(file.path)
        removed = [file for path, file in snapshot.files.items() if path in self._written]
        added = [self._written[file.path] for file in removed]
        self.num_rows = sum(self._rows[file.path] for file in removed)
        return Change(add=tuple(file for file in added if file is not None), remove=tuple(removed))

    def holding(self, states: dict[str, RunState], now: dt.datetime) -> dict[str, pa.Table]:
        """The files that no version refers to any more and that hold one, by path, with these rows (of images).

        One that cannot be read, or was never finished, is among them: it is of no use either.
        """
        gone = [
            found.file
            for found in look_through(self._log.folder, (self._log,), states, now, RETENTION)
            if found.kind in _GONE and found.file.path.startswith(_FOLDERS[self._log.name])
        ]
        with Threads(_AT_ONCE) as pool:
            held = zip(gone, pool.map(self._held, gone), strict=True)
            return {file.path: rows for file, rows in held if rows is not None}

    def _held(self, file: FileInfo) -> pa.Table | None:
        """What such a file holds of them; None: nothing."""
        rows = None if file.is_unfinished else self._read(file.path)
        if rows is None:
            return _ROWS.empty_table()
        marks = self._mask(rows)
        return conform(rows.filter(pa.array(marks)), _ROWS) if marks.any() else None

    def _read(self, path: str) -> pa.Table | None:
        names = _ROWS.names if self._log.name == "images" else ["image_id"]
        try:
            return self._log.folder.read_parquet(path, names)
        except CatalogError:  # damaged, or a vacuum has removed it meanwhile
            return None

    def _without(self, file: DataFile) -> DataFile | None:
        rows = self._log.folder.read_parquet(f"{self._log.name}/{file.path}")  # whatever other rows lack
        marks = self._mask(rows)
        self._rows[file.path] = int(marks.sum())
        if self._log.name == "images":
            self.removed.append(conform(rows.filter(pa.array(marks)), _ROWS))
        kept = rows.filter(pa.array(~marks))
        if not kept.num_rows:
            return None
        return write_file(self._log.folder, self._log.name, kept, file.ingest_date, self._run_id)

    def _mask(self, rows: pa.Table) -> Mask:
        marks = _mask(rows, self._ids)
        if len(self._uris):
            marks |= as_mask(pc.is_in(rows["uri"], value_set=self._uris))
        return marks


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


def _being_written(folder: Folder, now: dt.datetime) -> list[str]:
    """Unfinished files that are no run's, and whose writer may be alive. Leases name no image."""
    files = (file for name in _OTHERS for file in folder.unfinished(name))
    return [
        file.path for file in files if is_being_written(file, now) and not file.finished_path.endswith(LEASE_SUFFIX)
    ]


def _erase_reviews(folder: Folder, wanted: KeyIndex) -> int:
    """Takes the images out of whatever lies under ``reviews/``; returns the number of verdicts."""

    def erase_from(path: str) -> set[tuple[str, str]]:
        """Those erased, by kind of file: a verdict may stand in two, where many became one."""
        rows = _read_review(folder, path)
        if rows is None or "image_id" not in rows.column_names:
            return set()
        marks = np.asarray(_mask(rows, wanted))
        if marks.any():
            kept = rows.filter(pa.array(~marks))
            if kept.num_rows:  # under another name first: a kill in between doubles verdicts, and loses none
                # Without the list of the files that it was made of: it does not hold all of them any more, and the same
                # verdicts, given again when the erasure is lifted, come under their old names.
                kept = kept.replace_schema_metadata(None)
                folder.write_parquet(f"{REVIEWS}/{uuid.uuid4().hex}.parquet", kept)
            folder.delete(path)
        return {(path.rpartition(".")[2], str(row)) for row in rows.filter(pa.array(marks)).to_pylist()}

    erased: set[tuple[str, str]] = set()
    done: set[str] = set()
    with Threads(_AT_ONCE) as pool:
        # Until there is none that was not looked into: what another has just removed, it has put into a new one before.
        while new := [file.path for file in folder.list(REVIEWS) if file.path not in done]:
            done.update(new)
            erased.update(*pool.map(erase_from, new))
    return len(erased)


def _read_review(folder: Folder, path: str) -> pa.Table | None:
    """What a file under ``reviews/`` holds; None: another has removed it, or it is of no kind that we know."""
    reader = _REVIEW_READERS.get(path.rpartition(".")[2])
    try:
        return reader(folder, path) if reader else None
    except CatalogError:
        if folder.stat(path) is not None:
            raise
        return None


def _read_json_lines(folder: Folder, path: str) -> pa.Table:
    return pj.read_json(pa.BufferReader(folder.read(path) or b""))


_REVIEW_READERS: dict[str, Callable[[Folder, str], pa.Table]] = {
    "parquet": lambda folder, path: folder.read_parquet(path),
    "jsonl": _read_json_lines,
}
