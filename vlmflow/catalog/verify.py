"""Holds a catalog against its source and its own logs: does every image have its one row, and every row its files?"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow import schema
from vlmflow.catalog.columns import conform
from vlmflow.catalog.due import MAX_ATTEMPTS
from vlmflow.catalog.files import look_through
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import duplicates, index_of, to_binary, to_words
from vlmflow.catalog.log import TableLog
from vlmflow.catalog.masks import equal, is_valid
from vlmflow.catalog.plan_parts import NUM_BUCKETS, buckets_of
from vlmflow.catalog.read import References, files_by_date, of_one_time, read_each
from vlmflow.catalog.rows import OK, UNREADABLE
from vlmflow.catalog.runs import RunStore
from vlmflow.catalog.spill import Spill
from vlmflow.catalog.tombstones import Erased, Tombstones
from vlmflow.workspace import Workspace

ERRORS = {
    "missing": "images of the source without a row",
    "duplicate": "images with more than one row",
    "stale": "rows that another version of the object than the listed one was met for",
    "lost_files": "files that a table's log names and that are absent, or of another size",
    "lost_vectors": "rows that refer to vectors which are not there",
}
WARNINGS = {
    "extra": "rows whose image the source does not list",
    "orphan_files": "files of runs that are over and never committed them",
    "foreign_files": "files that are not vlmflow's",
    "dead_runs": "runs that gave no sign of life and were never finished",
    "given_up": "rows that failed three times",
    "old_fingerprint": "rows whose values come from another model, or other settings, than are asked for",
}

_LISTED = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "key", "locator", "object_version")])
_ROW_COLUMNS = ("image_id", "uri", "seen_version", "status", "attempts")
_FINGERPRINTS = tuple(schema.fingerprint_column(task) for task in schema.TASKS)
_ROWS = pa.schema([schema.IMAGES.field(name) for name in (*_ROW_COLUMNS, *_FINGERPRINTS)]).remove_metadata()


@dataclass
class Finding:
    """One kind of thing that was found.

    Attributes:
        examples: addresses of images, or paths of files.
        tasks: of old fingerprints, rows by task.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)


@dataclass
class Verification:
    """What a verification found.

    Attributes:
        num_listed: images of the source, erased ones left out.
        num_rows: rows of the catalog.
        num_erased: images that the source lists and that were erased from the catalog.
        findings: by kind, of :data:`ERRORS` and :data:`WARNINGS`; those that were not found are left out.
    """

    num_listed: int = 0
    num_rows: int = 0
    num_erased: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """No finding is an error."""
        return not any(kind in ERRORS for kind in self.findings)

    def note(self, kind: str, count: int, examples: Iterable[str], limit: int) -> Finding | None:
        """Adds to a finding, with as many examples as there is room for."""
        if not count:
            return None
        finding = self.findings.setdefault(kind, Finding())
        finding.count += count
        for example in examples:
            if len(finding.examples) >= limit:
                break
            finding.examples.append(example)
        return finding


def verify(
    references: Iterable[pa.RecordBatch],
    folder: Folder,
    images: TableLog,
    embeddings: TableLog,
    runs: RunStore,
    tombstones: Tombstones,
    *,
    fingerprints: Mapping[str, str],
    num_examples: int,
) -> Verification:
    """Reconciles a source with a catalog, and the catalog with its files. Writes nothing.

    Both sides are spread over buckets on the local disk, as for planning, so that memory stays bounded.

    Args:
        references: batches of REFERENCE.
        fingerprints: per task, what is asked for; tasks that are left out are not looked at.

    Raises:
        SourceError, StorageAccessError: the source cannot be listed, or a store refuses.
        WorkspaceError: the temporary folder is full, or cannot be used.
    """
    with Workspace() as workspace:
        check = _Check(workspace.path, folder, fingerprints, num_examples)
        lost = check.files(images, embeddings, runs)
        check.rows(references, images, tombstones, lost)
        check.vectors(images, embeddings, lost)
        return check.result


class _Check:
    def __init__(self, workspace: Path, folder: Folder, fingerprints: Mapping[str, str], num_examples: int) -> None:
        self._workspace, self._folder = workspace, folder
        self._fingerprints, self._num_examples = fingerprints, num_examples
        self.result = Verification()

    def files(self, images: TableLog, embeddings: TableLog, runs: RunStore) -> set[str]:
        """Holds the folder against the logs; returns the paths of files that are lost, relative to the catalog."""
        states = runs.states()
        sizes: dict[str, int] = {}
        kinds: dict[str, list[str]] = {"orphan_files": [], "foreign_files": []}
        for found in look_through(self._folder, (images, embeddings), states, runs.now(), dt.timedelta()):
            if found.kind == "live":
                sizes[found.file.path] = found.file.size_bytes
            elif found.kind in ("orphan", "staged"):
                kinds["orphan_files"].append(found.file.path)
            elif found.kind == "foreign":
                kinds["foreign_files"].append(found.file.path)
        lost = set()
        for log in (images, embeddings):
            for path, file in log.refresh().files.items():
                whole = f"{log.name}/{path}"
                held = sizes.get(whole)
                if held is None:  # not listed: it may have come since
                    info = self._folder.stat(whole)
                    held = info.size_bytes if info else None
                if held != file.size_bytes:
                    lost.add(whole)
        self._note("lost_files", sorted(lost))
        for kind, paths in kinds.items():
            self._note(kind, paths)
        self._note("dead_runs", sorted(run for run, state in states.items() if state == "dead"))
        return lost

    def rows(
        self, references: Iterable[pa.RecordBatch], images: TableLog, tombstones: Tombstones, lost: set[str]
    ) -> None:
        """Holds the rows against what the source lists."""
        listed = Spill(self._workspace / "listed", _LISTED, NUM_BUCKETS)
        for batch in references:
            rows = conform(pa.Table.from_batches([batch]), _LISTED)
            listed.append(rows, buckets_of(rows))
        listed.close()
        held = Spill(self._workspace / "rows", _ROWS, NUM_BUCKETS)
        files = [file for path, file in images.refresh().files.items() if f"images/{path}" not in lost]
        for _, rows in read_each(self._folder, "images", files, _ROWS.names, ahead=8):
            held.append(conform(rows, _ROWS), buckets_of(rows))
        held.close()
        erased = tombstones.erased()
        for bucket in range(NUM_BUCKETS):
            self._bucket(listed.read(bucket), held.read(bucket), erased)

    def _bucket(self, listed: pa.Table, rows: pa.Table, erased: Erased) -> None:
        listed = listed.filter(pa.array(~duplicates(to_binary(listed["image_id"]))))
        gone = erased.mask_listed(listed)
        self.result.num_erased += int(gone.sum())
        listed = listed.filter(pa.array(~gone))
        again = duplicates(to_binary(rows["image_id"]))
        self.result.num_listed += listed.num_rows
        self.result.num_rows += rows.num_rows
        self._note_rows("duplicate", rows, again)
        rows = rows.filter(pa.array(~again))
        at = index_of(to_binary(rows["image_id"])).find(*to_words(to_binary(listed["image_id"])))
        self._note_rows("missing", listed, at < 0)
        met = rows.take(pa.array(at, mask=at < 0))
        version = listed["object_version"]
        known = (at >= 0) & is_valid(version)
        self._note_rows("stale", listed, known & ~equal(version, met["seen_version"]))
        seen = np.zeros(rows.num_rows, dtype=np.bool_)
        seen[at[at >= 0]] = True
        self._note_rows("extra", rows, ~seen)
        attempts = pc.fill_null(rows["attempts"], 0).to_numpy()
        settled = equal(rows["status"], OK) | equal(rows["status"], UNREADABLE)
        self._note_rows("given_up", rows, (attempts >= MAX_ATTEMPTS) & ~settled)
        self._old_fingerprints(rows)

    def _old_fingerprints(self, rows: pa.Table) -> None:
        old = np.zeros(rows.num_rows, dtype=np.bool_)
        tasks: dict[str, int] = {}
        for task, wanted in self._fingerprints.items():
            column = rows[schema.fingerprint_column(task)]
            other = is_valid(column) & ~equal(column, wanted)
            if other.any():
                tasks[task] = int(other.sum())
            old |= other
        finding = self._note_rows("old_fingerprint", rows, old)
        if finding is not None:
            for task, count in tasks.items():
                finding.tasks[task] = finding.tasks.get(task, 0) + count

    def vectors(self, images: TableLog, embeddings: TableLog, lost: set[str]) -> None:
        """Makes sure that the vectors are there which rows refer to, date by date."""
        snapshot, vectors = of_one_time(images, embeddings)
        by_date = files_by_date(vectors)
        for date, files in files_by_date(snapshot).items():
            if any(f"images/{file.path}" in lost for file in files):
                continue  # told already
            references = References(self._folder, snapshot, date)
            found = np.zeros(len(references), dtype=np.bool_)
            there = [file for file in by_date.get(date, []) if f"embeddings/{file.path}" not in lost]
            for _, rows in read_each(self._folder, "embeddings", there, ["image_id", "embed_run_id"], ahead=8):
                at = references.find(rows)
                found[at[at >= 0]] = True
            absent = np.flatnonzero(~found)
            if len(absent):
                self.result.note("lost_vectors", len(absent), references.ids(absent), self._num_examples)

    def _note_rows(self, kind: str, rows: pa.Table, mask: npt.NDArray[np.bool_]) -> Finding | None:
        at = np.flatnonzero(mask)
        uris = rows["uri"].take(pa.array(at[: self._num_examples])).to_pylist()
        return self.result.note(kind, len(at), uris, self._num_examples)

    def _note(self, kind: str, names: list[str]) -> None:
        self.result.note(kind, len(names), names, self._num_examples)
