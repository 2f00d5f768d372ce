"""A run from the job to the committed tables."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator

import pyarrow as pa
import ray

from vlmflow.catalog import Catalog, Plan
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.runs import new_run_id
from vlmflow.catalog.writable import check_tables, check_writable
from vlmflow.config import Job
from vlmflow.engine.archive import archive_policy, archived_prompts
from vlmflow.engine.budget import ErrorBudget
from vlmflow.engine.callers_columns import update_columns
from vlmflow.engine.cluster import Cluster, WorkerErrors, ray_cluster
from vlmflow.engine.collect import Collected, Collector
from vlmflow.engine.consume import Block, FinishedBlocks
from vlmflow.engine.faults import lost_in_mid_run, told
from vlmflow.engine.late_verdicts import bring_in_late_verdicts
from vlmflow.engine.lost import SMALL_BLOCKS, in_small_batches, lost_rows, unreconciled, want_small_blocks
from vlmflow.engine.metrics import RunMetrics
from vlmflow.engine.pipeline import build_pipeline, check_pools, default_pools, fit_to_plan, open_pools, stages_of
from vlmflow.engine.planning import planned
from vlmflow.engine.prepare import Prepared, encode_policy, known_bytes, prepare
from vlmflow.engine.progress import ProgressDisplay, SilentProgress, Tally
from vlmflow.engine.quarantine import Quarantine, Stages
from vlmflow.engine.report import PlanSummary, RunReport, RunStatus, finished_report, initial_report, plan_summary
from vlmflow.engine.room import Room
from vlmflow.engine.sizing import PreflightReport, measure
from vlmflow.engine.waiting import Nodes, Waiting
from vlmflow.errors import (
    ClusterError,
    ConfigError,
    SourceError,
    StorageAccessError,
    TransientError,
    UnreconciledError,
    VlmflowError,
)
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.sources import Source, open_source

logger = logging.getLogger("vlmflow")

_TICK_S = 0.2


def plan(job: Job) -> PlanSummary:
    """Says what :func:`enrich` would do, by task and reason. Writes nothing, and starts no cluster.

    Raises:
        VlmflowError: as :func:`enrich` does before its first image.
    """
    prepared = prepare(job)
    check_tables(Folder(job.catalog))
    with planned(prepared, open_source(job.source, job.catalog)) as found:
        return plan_summary(prepared, found)


def enrich(job: Job, *, progress: ProgressDisplay | None = None) -> RunReport:
    """Enriches whatever is due of the job's source into its catalog.

    Call it again after an interruption, or every night: only what is due is done. Then the rows of all other images
    listed get the caller's columns of this listing; no image is read for that.

    Raises:
        ConfigError: the job names something that does not exist.
        SourceError: the source does not exist, is empty, or lists one image with two different sets of columns.
        StorageAccessError: a store refused access.
        WeightsError: a model's weights are absent or do not fit.
        PolicyError: the moderation policy cannot be used, or was not set for the model.
        ErrorBudgetError: too many of the first images are bad; nothing was committed.
        StoreLostError: the store went away in mid-run; what was committed stays.
        UnreconciledError: images went in and did not come out; the others are committed.
        ColumnsError: what the run computed is committed, but the caller's columns of other rows are not all.
    """
    display = progress or SilentProgress()
    display.stage("checking models and policy")
    prepared = prepare(job)
    source = open_source(job.source, job.catalog)
    display.stage("listing and planning")
    with planned(prepared, source) as found:
        return _Run(prepared, source, found, display).execute()


def preflight(job: Job, *, progress: ProgressDisplay | None = None) -> PreflightReport:
    """Tries the job's pools on some of the images that are due, and says what a run would need. Writes nothing.

    Raises:
        VlmflowError: as :func:`enrich` does before its first image.
        ConfigError: nothing is due.
    """
    display = progress or SilentProgress()
    display.stage("checking models and policy")
    prepared = prepare(job)
    source = open_source(job.source, job.catalog)
    display.stage("listing and planning")
    with planned(prepared, source) as found:
        if found.num_planned == 0:
            raise ConfigError("preflight: nothing is due, so nothing can be tried", remedy="`vlmflow plan` says why.")
        display.stage("starting Ray")
        with ray_cluster(prepared.job.ray) as cluster, cluster.worker_errors(), Nodes() as nodes:
            cluster.tell()
            pools = open_pools(prepared, cluster)
            check_pools(pools, cluster)
            stages = stages_of(prepared, source, pools, encode_policy(prepared.setup), None)
            display.stage("trying batch sizes")
            Waiting(pools, cluster, nodes, display).tell("trying batch sizes")
            return measure(found, stages, cluster)


class _Run:
    """One run: its record and lease, its pipeline, its commits."""

    def __init__(self, prepared: Prepared, source: Source, planned: Plan, display: ProgressDisplay) -> None:
        self._prepared, self._job = prepared, prepared.job
        self._source, self._plan = source, planned
        self._display = display
        self._run_id = new_run_id()
        self._report = initial_report(self._run_id, prepared, planned)
        self._done = self._report
        self._collected = Collected()
        self._tally = Tally(total=planned.num_planned)
        self._worker_errors = WorkerErrors()
        self._clock = time.monotonic()
        self._startup_s = 0.0
        self._nodes = Nodes()
        self._room = Room(self._run_id, self._report.catalog, display.stage)
        self._verdicts_due = False  # late ones may be lacking in rows that it has committed

    def _tried(self, stages: Stages, cluster: Cluster) -> Stages:
        """With the pools that a preflight chooses; the default ones where no image of the sample could be tried."""
        try:
            tried = measure(self._plan, stages, cluster)
        except (SourceError, ClusterError) as error:  # every image gets its row all the same
            logger.warning("preflight: nothing could be tried: %s", error)
            return dataclasses.replace(stages, pools=default_pools(self._prepared, cluster))
        logger.info("preflight: %s", tried.model_dump_json(exclude={"pools": {"__all__": {"trials"}}}))
        return dataclasses.replace(stages, pools=tried.chosen, sized_by_memory=False)

    def execute(self) -> RunReport:
        if self._plan.num_planned == 0:
            return self._without_images()
        check_writable(Folder(self._job.catalog))  # minutes before anything is written
        self._display.stage("starting Ray")
        with contextlib.ExitStack() as stack:
            cluster = stack.enter_context(ray_cluster(self._job.ray))
            self._worker_errors = stack.enter_context(cluster.worker_errors())
            stack.enter_context(self._nodes)
            cluster.tell()
            self._display.stage("loading models")
            pools = (open_pools if self._job.preflight else default_pools)(self._prepared, cluster)
            check_pools(pools, cluster)
            waiting = Waiting(pools, cluster, self._nodes, self._display)
            prompts = self._prompts()
            # Copies of known results would not be computed, so they say nothing of the pools.
            stages = stages_of(self._prepared, self._source, pools, prompts, None)
            if self._job.preflight:
                self._display.stage("trying batch sizes")
                waiting.tell("trying batch sizes")
                stages = self._tried(stages, cluster)
            fitted, num_rows = fit_to_plan(stages, self._job, self._plan, cluster)
            if stack.enter_context(self._room.taken(fitted.pools, cluster)):
                stack.enter_context(self._planned_again())
                if self._plan.num_planned == 0:
                    return self._without_images()
                self._display.stage("loading models")
                fitted, num_rows = fit_to_plan(stages, self._job, self._plan, cluster)
            known = known_bytes(self._prepared, self._plan)
            made = stages_of(self._prepared, self._source, fitted.pools, prompts, known)
            stages = dataclasses.replace(made, sized_by_memory=fitted.sized_by_memory)
            dataset = build_pipeline(self._plan.batches(num_rows), stages, num_rows, self._job.read_ahead)
            with FinishedBlocks(dataset) as finished:
                # Models that do not load end the run here, before anything is written.
                first = self._first(finished, waiting)
                catalog = Catalog.open_or_create(self._job.catalog, self._source.columns)
                with self._recorded(catalog):
                    self._archive_policy(catalog, prompts)
                    collector = self._collector(catalog, cluster)
                    metrics = RunMetrics(self._report.catalog, self._prepared.job.tasks)
                    with self._with_late_verdicts(catalog, collector):
                        self._display.stage("enriching")
                        self._consume(first, finished, collector, metrics)
                        self._run_lost(stages, collector, metrics)
                    update_columns(catalog, self._run_id, self._plan, self._display, self._collected)
                    self._display.stage("compacting")
                    catalog.compact(self._run_id)
        return self._done

    @contextlib.contextmanager
    def _planned_again(self) -> Iterator[None]:
        """Has a new plan for the block: while the run waited, others may have done its work, and signatures ended."""
        self._display.stage("listing and planning")
        self._source = open_source(self._job.source, self._job.catalog)
        with planned(self._prepared, self._source) as self._plan:
            made = initial_report(self._run_id, self._prepared, self._plan)
            self._report = self._done = made.model_copy(update={"started_at": self._report.started_at})
            self._tally = Tally(total=self._plan.num_planned)
            yield

    def _without_images(self) -> RunReport:
        """With nothing due no model is loaded: rows get what they lack of verdicts and of the caller's columns."""
        if not Catalog.exists(self._job.catalog):
            Catalog.open_or_create(self._job.catalog, self._source.columns)
        elif not self._plan.num_outdated:
            bring_in_late_verdicts(Catalog.open(self._job.catalog), self._run_id, None, [])
        else:
            catalog = Catalog.open_or_create(self._job.catalog, self._source.columns)
            with self._recorded(catalog, "nothing_due"):
                bring_in_late_verdicts(catalog, self._run_id, None, [])
                update_columns(catalog, self._run_id, self._plan, self._display, self._collected)
            return self._done
        return self._finished("nothing_due")

    def _first(self, finished: FinishedBlocks, waiting: Waiting) -> list[Block] | None:
        """Waits for the first images to come through: the models are loaded, and rates begin to mean something."""
        while (blocks := finished.next(_TICK_S)) == []:
            waiting.tell("loading models")
        self._startup_s = time.monotonic() - self._clock - self._room.waited_s
        self._nodes.restart()
        return blocks

    @contextlib.contextmanager
    def _recorded(self, catalog: Catalog, status: RunStatus = "done") -> Iterator[None]:
        """Keeps the run's record and lease while the block runs, and completes the record however it ends.

        Args:
            status: of the run, should it end well.
        """
        catalog.runs.start(self._run_id, self._report.model_dump(mode="json"))
        try:
            with catalog.runs.keep_alive(self._run_id), told():
                yield
        except (StorageAccessError, TransientError) as error:
            lost = lost_in_mid_run(error)
            self._record_end(catalog, self._finished("failed", str(lost)))
            raise lost from error
        except BaseException as error:
            self._record_end(catalog, self._finished(_status_of(error), str(error) or type(error).__name__))
            raise
        self._done = self._finished(status)
        self._record_end(catalog, self._done)

    def _record_end(self, catalog: Catalog, report: RunReport) -> None:
        record = report.model_dump(mode="json") | {"state": report.status}
        # The next run looks at every row while another has a lease.
        catalog.runs.conclude(self._run_id, record, keep_lease=self._verdicts_due)

    def _collector(self, catalog: Catalog, cluster: Cluster) -> Collector:
        writer = catalog.writer(self._prepared.constants(self._run_id), self._plan.version)
        commit, budget = self._job.commit, ErrorBudget(self._job.max_error_fraction, self._plan.num_fresh)
        collector = Collector(catalog, writer, self._run_id, commit, self._tally, budget, cluster.grown.cpus)
        self._collected = collector.collected
        return collector

    def _prompts(self) -> PromptVectors | None:
        """Vectors of the policy's prompts: those that the catalog keeps, else encoded now."""
        setup = self._prepared.setup
        if setup.policy is not None and Catalog.exists(self._job.catalog):
            catalog = Catalog.open(self._job.catalog)
            kept = archived_prompts(catalog, setup.policy, setup.identities["embed"])
            if kept is not None:
                return kept
        return encode_policy(setup)

    def _archive_policy(self, catalog: Catalog, prompts: PromptVectors | None) -> None:
        setup = self._prepared.setup
        if setup.policy is not None:
            archive_policy(catalog, setup.policy, prompts, setup.identities["embed"])

    def _consume(
        self, blocks: list[Block] | None, finished: FinishedBlocks, collector: Collector, metrics: RunMetrics
    ) -> None:
        started = time.monotonic() - self._tally.elapsed_s
        while blocks is not None:
            collector.add(blocks)
            collector.tick()
            self._tally.at(time.monotonic() - started)
            self._display.update(self._tally)
            metrics.update(self._tally, self._collected, num_blocks=finished.num_waiting)
            blocks = finished.next(_TICK_S)
        self._display.stage("committing")
        collector.finish()
        self._display.update(self._tally)
        metrics.update(self._tally, self._collected)

    @contextlib.contextmanager
    def _with_late_verdicts(self, catalog: Catalog, collector: Collector) -> Iterator[None]:
        """Brings in late verdicts after the block, however it ends: what it has committed stays."""
        self._verdicts_due = True
        try:
            yield
        except BaseException:
            try:
                self._bring_in_verdicts(catalog, collector)
            except VlmflowError as error:
                # What ended the run is on its way to the user.
                logger.warning(
                    "verdicts and lists given during run %s may not be in its rows: %s; the next run brings them in",
                    self._run_id,
                    error,
                )
            raise
        self._bring_in_verdicts(catalog, collector)

    def _bring_in_verdicts(self, catalog: Catalog, collector: Collector) -> None:
        bring_in_late_verdicts(catalog, self._run_id, collector.known, self._collected.keys)
        self._verdicts_due = False

    def _run_lost(self, stages: Stages, collector: Collector, metrics: RunMetrics) -> None:
        """Runs the images that went in and did not come out: in smaller blocks while they are many, then alone.

        Raises:
            UnreconciledError: they remain too many.
        """
        max_images = self._job.quarantine.max_images
        sent, lost = self._plan.num_planned, self._lost()
        for num_rows in SMALL_BLOCKS:
            if not want_small_blocks(lost.num_rows, sent, max_images):
                break
            self._display.stage(f"running {lost.num_rows:,} images in small blocks that came back from no worker")
            self._run_in_blocks(lost, in_small_batches(stages, num_rows), num_rows, collector, metrics)
            sent, lost = lost.num_rows, self._lost()
        if lost.num_rows > max_images:
            raise self._unreconciled(lost)
        if lost.num_rows:
            self._run_alone(lost, stages, collector, metrics)
            lost = self._lost()
        if lost.num_rows:
            raise self._unreconciled(lost)

    def _lost(self) -> pa.Table:
        return lost_rows(self._plan.batches(), self._collected.keys)

    def _run_in_blocks(
        self, rows: pa.Table, stages: Stages, num_rows: int, collector: Collector, metrics: RunMetrics
    ) -> None:
        blocks = [rows.slice(start, num_rows) for start in range(0, rows.num_rows, num_rows)]
        with FinishedBlocks(build_pipeline(blocks, stages, num_rows, self._job.read_ahead)) as finished:
            self._consume([], finished, collector, metrics)

    def _run_alone(self, lost: pa.Table, stages: Stages, collector: Collector, metrics: RunMetrics) -> None:
        self._display.stage(f"running {lost.num_rows:,} images alone that came back from no worker")
        started = time.monotonic() - self._tally.elapsed_s
        with contextlib.closing(Quarantine(stages, self._job.quarantine)) as quarantine:
            for index in range(lost.num_rows):
                collector.add([(ray.put(quarantine.run(lost.slice(index, 1))), 1)])
                collector.tick()
                self._tally.at(time.monotonic() - started)
                self._display.update(self._tally)
                metrics.update(self._tally, self._collected, num_alone=index + 1)
        collector.finish()
        self._display.update(self._tally)
        metrics.update(self._tally, self._collected)

    def _unreconciled(self, lost: pa.Table) -> UnreconciledError:
        max_images, reason = self._job.quarantine.max_images, self._worker_errors.first()
        return unreconciled(self._run_id, lost, self._plan.num_planned, max_images, reason)

    def _finished(self, status: RunStatus, message: str = "") -> RunReport:
        seconds = time.monotonic() - self._clock
        return finished_report(
            self._report,
            self._collected,
            status,
            message,
            seconds=seconds,
            startup_s=self._startup_s,
            waited_s=self._room.waited_s,
            num_first=self._tally.num_first,
            num_cpus=self._nodes.mean_cpus(),
        )


def _status_of(error: BaseException) -> RunStatus:
    if not isinstance(error, Exception):  # Ctrl-C, or what Prefect ends a flow run with
        return "interrupted"
    return "unreconciled" if isinstance(error, UnreconciledError) else "failed"
