"""The driver's side of a run: finished blocks in, files written by Ray tasks, commits made in order.

Blocks stay in the object store; the driver holds references, descriptors of files and counts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import ray

from vlmflow import schema
from vlmflow.catalog import Catalog, CatalogWriter
from vlmflow.catalog.known_images import KnownImages
from vlmflow.catalog.masks import Mask, as_mask, holds
from vlmflow.catalog.rows import rows_of_image_errors
from vlmflow.config import CommitConfig
from vlmflow.engine import columns
from vlmflow.engine.budget import ErrorBudget, FreshRows
from vlmflow.engine.equal_bytes import put_copied
from vlmflow.engine.faults import get, of_node, wait_for_one
from vlmflow.engine.nodes import Unfound, check_decoders, check_disks, decoders, unfound
from vlmflow.engine.progress import Tally
from vlmflow.engine.report import CommitReport
from vlmflow.errors import StoreLostError

# Writes under way at once: enough to hide the latency of a store. Each needs a worker process of its own beside the
# decoding ones, so a small machine has one.
MAX_WRITES = 4
_CPUS_PER_WRITE = 4


@dataclass(frozen=True)
class Written:
    """What a write task returns.

    Attributes:
        files: descriptors of the files (schema.DESCRIPTOR); they carry the keys.
        sums: totals of the blocks' numeric columns: seconds, batches and operations per stage, bytes read.
        worked: images on which each task ran, failed ones included.
        decisions: images by the decision that the run gave them.
        at_once: by pool, the most images at once since memory ran out.
        num_copied: images with results of a row of the catalog with equal bytes.
        num_shared: images with results of another image of this run with equal bytes.
        fresh: what counts for the error budget.
        fatal: why the run must end; then nothing was written.
        fatal_node: of the cluster, that says so.
        unfound: files that workers did not find.
        decoders: what decoded the images, each with a node that has it.
    """

    files: pa.Table
    sums: dict[str, float]
    worked: dict[str, int]
    decisions: dict[str, int]
    at_once: dict[str, int]
    num_copied: int
    num_shared: int
    fresh: FreshRows
    fatal: str | None
    fatal_node: str | None = None
    unfound: Sequence[Unfound] = ()
    decoders: Mapping[str, str] = field(default_factory=dict)


def write_blocks(writer: CatalogWriter, known: KnownImages, *blocks: pa.Table) -> Written:
    """Writes finished blocks as files of the catalog, not yet visible to readers. Runs as a Ray task.

    Args:
        known: decides on images of its lists, whatever the models say.
    """
    rows = pa.concat_tables([block for block in blocks if block.num_rows], promote_options="permissive")
    fatal = rows.filter(pa.compute.is_valid(rows[columns.FATAL])).select([columns.FATAL, columns.NODE]).slice(0, 1)
    if fatal.num_rows:
        (reason,), (node,) = (column.to_pylist() for column in fatal.columns)
        return Written(writer.write(rows.slice(0, 0)), {}, {}, {}, {}, 0, 0, FreshRows(), reason, node)
    sums = {
        name: float(pa.compute.sum(rows[name]).as_py() or 0.0)
        for name in rows.column_names
        if name.startswith(columns.SUMMED_PREFIXES) or name in ("bytes_read", columns.UNMODIFIED)
    }
    for name in rows.column_names:
        if name.startswith(columns.CEILING_PREFIX):  # a mean is made of it
            sums[columns.COUNT_PREFIX + name] = float(len(rows) - rows[name].null_count)
    worked: Counter[str] = Counter()
    for column in (columns.TASKS_RUN, columns.TASKS_FAILED):
        for entry in pa.compute.list_flatten(rows[column]).value_counts().to_pylist():
            worked[entry["values"]] += entry["counts"]
    at_once = {
        name.removeprefix(columns.AT_ONCE_PREFIX): smallest
        for name in rows.column_names
        if name.startswith(columns.AT_ONCE_PREFIX) and (smallest := pa.compute.min(rows[name]).as_py()) is not None
    }
    copied, shared = _num_filled(rows[columns.TASKS_COPIED]), _num_filled(rows[columns.TASKS_SHARED])
    rows = put_copied(rows)
    if len(known):
        field = schema.WRITER_OPTIONAL.field("verdict")
        rows = rows.append_column(field, known.verdicts(rows["content_hash"], rows["phash"]))
    decisions, fresh, files = decisions_given(rows), FreshRows.of(rows), writer.write(rows)
    counts = dict(worked), decisions, at_once, copied, shared, fresh
    return Written(files, sums, *counts, None, unfound=unfound(rows), decoders=decoders(rows))


@dataclass
class Collected:
    """Totals of a run, filled as commits go through."""

    num_added: int = 0
    num_replaced: int = 0
    num_by_others: int = 0
    num_erased: int = 0  # left out: erased while the run was at work
    num_conflicts: int = 0  # commits that were made anew because another writer was first
    num_copied: int = 0
    num_shared: int = 0
    num_columns_updated: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    worked: Counter[str] = field(default_factory=Counter)
    at_once: dict[str, int] = field(default_factory=dict)
    commits: list[CommitReport] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    keys: list[pa.Array] = field(default_factory=list)  # image ids in the committed files, 16 bytes each


class Collector:
    """Groups finished blocks, has them written, and commits what was written.

    Attributes:
        collected: totals of what went through.
        known: the lists of known images that the rows are looked up in.

    Args:
        budget: nothing is committed before it is kept.
        num_cpus: of the cluster.
    """

    def __init__(
        self,
        catalog: Catalog,
        writer: CatalogWriter,
        run_id: str,
        commit: CommitConfig,
        tally: Tally,
        budget: ErrorBudget,
        num_cpus: float,
    ) -> None:
        self._catalog, self._run_id, self._commit = catalog, run_id, commit
        self.known = catalog.known_images.matcher()
        self._writer, self._known = ray.put(writer), ray.put(self.known)
        self._write = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")(write_blocks)
        self._max_writes = max(1, min(MAX_WRITES, int(num_cpus) // _CPUS_PER_WRITE))
        self._tally, self._budget = tally, budget
        self._blocks: list[ray.ObjectRef[pa.Table]] = []
        self._num_buffered = 0
        self._writes: list[ray.ObjectRef[Written]] = []
        self._files: list[pa.Table] = []
        self._decisions: Counter[str] = Counter()  # of the rows in these files
        self._started = self._last_flush = time.monotonic()
        self.collected = Collected()

    def add(self, blocks: Iterable[tuple[ray.ObjectRef[pa.Table], int]]) -> None:
        """Takes finished blocks with their numbers of rows."""
        is_first = self._tally.done == 0
        for block, num_rows in blocks:
            if num_rows == 0:
                continue
            if is_first:
                self._tally.num_first += num_rows
            self._blocks.append(block)
            self._num_buffered += num_rows
            self._tally.done += num_rows

    def tick(self) -> None:
        """Starts a write if enough rows or time has come together; commits the writes that are done.

        Raises:
            StoreLostError: a worker lost the source's store.
            ClusterError: a node does not see the disk of the source, or decodes otherwise.
            ErrorBudgetError: too many of the first rows are bad.
            CommitError: a commit could not be made.
        """
        waited = time.monotonic() - self._last_flush
        if self._num_buffered >= self._commit.max_rows or (self._num_buffered and waited >= self._commit.max_seconds):
            self._reap(wait=len(self._writes) >= self._max_writes)
            self._flush()
        self._reap(wait=False)

    def finish(self) -> None:
        """Writes and commits all that is left; raises as :meth:`tick`."""
        self._flush()
        while self._writes:
            self._reap(wait=True)
        self._budget.close()
        self._commit_files()

    def _flush(self) -> None:
        self._last_flush = time.monotonic()
        if not self._blocks:
            return
        self._writes.append(self._write.remote(self._writer, self._known, *self._blocks))
        self._blocks, self._num_buffered = [], 0

    def _reap(self, *, wait: bool) -> None:
        if not self._writes:
            return
        done, self._writes = wait_for_one(self._writes) if wait else ray.wait(self._writes, timeout=0)
        for ref in done:
            self._take(get(ref))
        if done:
            self._budget.check()
            if self._budget.is_kept:
                self._commit_files()

    def _take(self, written: Written) -> None:
        if written.fatal is not None:
            raise StoreLostError(
                of_node(written.fatal, written.fatal_node),
                remedy="What was committed stays; mend the access and run the same command again to go on.",
            )
        check_disks(written.unfound)
        check_decoders(written.decoders)
        self._files.append(written.files)
        self.collected.sums.update(written.sums)
        self.collected.worked.update(written.worked)
        self.collected.num_copied += written.num_copied
        self.collected.num_shared += written.num_shared
        for pool, size in written.at_once.items():
            self.collected.at_once[pool] = min(size, self.collected.at_once.get(pool, size))
        self._tally.errors.update(_counts(written.files, "errors"))
        self._decisions.update(written.decisions)
        self._budget.add(written.fresh)

    def _commit_files(self) -> None:
        if not self._files:
            return
        files, self._files = pa.concat_tables(self._files), []
        decisions, self._decisions = self._decisions, Counter()
        if files.num_rows == 0:
            return
        started = time.monotonic()
        result = self._catalog.commit(self._run_id, files)
        ended = time.monotonic()
        rows = result.num_added + result.num_replaced
        self._tally.committed += rows
        collected = self.collected
        collected.num_added += result.num_added
        collected.num_replaced += result.num_replaced
        if result.num_replaced:
            # Of a killed run the table tells how many rows it wrote, and not which of its own date were there before.
            self._catalog.runs.amend(self._run_id, num_replaced=collected.num_replaced)
        collected.statuses.update(result.statuses)
        # Not before: what was not committed another run computes, and counts, again.
        collected.errors.update(result.errors)
        collected.decisions += decisions - Counter(result.others_decisions)
        collected.num_by_others += result.num_dropped + result.num_superseded
        collected.num_erased += result.num_erased
        collected.num_conflicts += result.num_conflicts
        images = files.filter(pa.compute.equal(files["table"], "images"))
        collected.num_rows += pa.compute.sum(images["num_rows"]).as_py() or 0
        collected.keys.append(pa.compute.list_flatten(images["keys"]).combine_chunks())
        collected.commits.append(CommitReport(rows=rows, at_s=ended - self._started, seconds=ended - started))


def _num_filled(lists: pa.ChunkedArray) -> int:
    return int(pa.compute.sum(pa.compute.greater(pa.compute.list_value_length(lists), 0)).as_py() or 0)


def decisions_given(rows: pa.Table) -> dict[str, int]:
    """Images by the decision that the run gave them. Those that keep the one of their live row do not count.

    Args:
        rows: ready to be written, what was copied in its place.
    """
    rows = rows.filter(pa.array(_decided(rows)))
    decision = pa.repeat("review", rows.num_rows)  # where nothing was scored: the writer does the same
    if "decision" in rows.column_names:
        decision = pa.compute.coalesce(rows["decision"], decision)
    if "verdict" in rows.column_names:
        decision = pa.compute.coalesce(pa.compute.struct_field(rows["verdict"], "decision"), decision)
    return {entry["values"]: entry["counts"] for entry in decision.value_counts().to_pylist()}


def _decided(rows: pa.Table) -> Mask:
    """Rows that are new, were moderated, or whose image is another now, or cannot be read any more."""
    image = rows_of_image_errors(rows["errors"])
    new = ~as_mask(pa.compute.fill_null(rows["replaces"], False))
    moderated = holds(rows[columns.TASKS_RUN], "moderate") | holds(rows[columns.TASKS_FAILED], "moderate")
    other = as_mask(pa.compute.fill_null(pa.compute.not_equal(rows["content_hash"], rows["previous_hash"]), False))
    # An image that is gone keeps its decision, and one that could not be read before has it already.
    lost = (image.unreadable | image.failed) & ~as_mask(pa.compute.fill_null(rows["failed_before"], False))
    return new | moderated | (other & ~image.any) | lost


def _counts(files: pa.Table, column: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for entries in files[column].to_pylist():
        for entry in entries or []:
            counts[entry["name"]] += entry["count"]
    return counts
