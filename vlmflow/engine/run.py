"""A run from the job to the committed tables."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import queue
import secrets
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.exceptions import RayError

from vlmflow.catalog import Catalog, Plan, keys, plan_without_catalog
from vlmflow.config import Job, PoolConfig
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.collect import Collected, Collector
from vlmflow.engine.decoding import ReadAndDecode
from vlmflow.engine.pipeline import build_pipeline, check_pools, default_pools, planned_blocks
from vlmflow.engine.prepare import Prepared, encode_policy, prepare
from vlmflow.engine.progress import ProgressDisplay, SilentProgress, Tally
from vlmflow.engine.quarantine import Quarantine, Stages
from vlmflow.engine.report import PlanSummary, RunReport, RunStatus, finished_report, initial_report, plan_summary
from vlmflow.errors import ClusterError, UnreconciledError, VlmflowError
from vlmflow.imaging import merge_requests
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.sources import Source, open_source

logger = logging.getLogger("vlmflow")

# Finished blocks with their numbers of rows; None: there will be no more.
Blocks = queue.Queue[list[tuple[ray.ObjectRef[pa.Table], int]] | None]

_HEARTBEAT_S = 30.0
_TICK_S = 0.2


def plan(job: Job) -> PlanSummary:
    """Says what :func:`enrich` would do, by task and reason. Writes nothing, starts no cluster.

    Raises:
        VlmflowError: as :func:`enrich` does before its first image.
    """
    prepared = prepare(job)
    with _planned(prepared, open_source(job.source)) as planned:
        return plan_summary(prepared, planned)


def enrich(job: Job, *, progress: ProgressDisplay | None = None) -> RunReport:
    """Enriches whatever is due of the job's source into its catalog.

    Call it again after an interruption, or every night: only what is due is done.

    Raises:
        ConfigError: the job names something that does not exist.
        SourceError: the source does not exist, is empty, or lists one image with two different sets of columns.
        StorageAccessError: a store refused access.
        WeightsError: a model's weights are absent or do not fit.
        PolicyError: the moderation policy cannot be used, or was not set for the model.
        ErrorBudgetError: too many of the first images are bad; nothing was committed.
        StoreLostError: the store went away in mid-run; what was committed stays.
        UnreconciledError: images went in and did not come out; the others are committed.
    """
    display = progress or SilentProgress()
    display.stage("checking models and policy")
    prepared = prepare(job)
    source = open_source(job.source)
    display.stage("listing and planning")
    with _planned(prepared, source) as planned:
        return _Run(prepared, source, planned, display).execute()


@contextlib.contextmanager
def _planned(prepared: Prepared, source: Source) -> Iterator[Plan]:
    """Plans against the catalog as it is; one that does not exist yet is not created, so bad input writes nothing."""
    request, config = prepared.plan_request(), prepared.job.catalog
    if Catalog.exists(config):
        made = Catalog.open(config).plan(source.list(), request)
    else:
        made = plan_without_catalog(source.list(), request)
    with made:
        yield made


class _Run:
    """One run: its record and lease, its pipeline, its commits."""

    def __init__(self, prepared: Prepared, source: Source, planned: Plan, display: ProgressDisplay) -> None:
        self._prepared, self._job = prepared, prepared.job
        self._source, self._plan = source, planned
        self._display = display
        self._run_id = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        self._report = initial_report(self._run_id, prepared, planned)
        self._collected = Collected()
        self._clock = time.monotonic()
        self._startup_s = 0.0
        self._worker_error: str | None = None

    def execute(self) -> RunReport:
        if self._plan.num_planned == 0 and Catalog.exists(self._job.catalog):
            return self._finished("nothing_due")
        catalog = Catalog.open_or_create(self._job.catalog, self._source.columns)
        if self._plan.num_planned == 0:
            return self._finished("nothing_due")
        catalog.runs.start(self._run_id, self._report.model_dump(mode="json"))
        try:
            with _heartbeat(catalog, self._run_id):
                self._enrich_into(catalog)
        except BaseException as error:
            status = _status_of(error)
            report = self._finished(status, str(error))
            catalog.runs.finish(self._run_id, report.model_dump(mode="json") | {"state": status})
            raise
        report = self._finished("done")
        catalog.runs.finish(self._run_id, report.model_dump(mode="json") | {"state": "done"})
        return report

    def _enrich_into(self, catalog: Catalog) -> None:
        self._display.stage("starting Ray")
        with ray_cluster(self._job.ray) as cluster:
            self._display.stage("loading models")
            pools = default_pools(self._job, cluster)
            check_pools(pools, cluster)
            prompts = encode_policy(self._prepared.setup)
            self._archive_policy(catalog, prompts)
            writer = catalog.writer(self._prepared.constants(self._run_id), self._plan.version)
            tally = Tally(total=self._plan.num_planned)
            collector = Collector(catalog, writer, self._run_id, self._job.commit, tally, self._job.max_error_fraction)
            self._collected = collector.collected
            stages = self._stages(pools, prompts)
            blocks = [ray.put(block) for block in planned_blocks(self._plan, cluster)]
            with cluster.worker_errors() as worker_errors:
                self._consume(build_pipeline(blocks, stages), collector, tally)
            self._worker_error = worker_errors.first()
            self._run_lost(stages, collector, tally)
        self._display.stage("compacting")
        catalog.compact(self._run_id)

    def _archive_policy(self, catalog: Catalog, prompts: PromptVectors | None) -> None:
        policy = self._prepared.setup.policy
        if policy is not None and prompts is not None:
            catalog.policies.put(
                policy.digest,
                {"policy.json": policy.model_dump_json(indent=2).encode(), "prompts.safetensors": prompts.to_bytes()},
            )

    def _stages(self, pools: tuple[PoolConfig, ...], prompts: PromptVectors | None) -> Stages:
        setup, limits = self._prepared.setup, self._job.limits
        requests = tuple(merge_requests(list(setup.requests.values())))
        return Stages(ReadAndDecode(self._source.reader(limits), requests, limits), pools, setup, prompts)

    def _consume(self, dataset: Dataset, collector: Collector, tally: Tally) -> None:
        self._display.update(tally)
        started: float | None = None
        with _background(dataset) as bundles:
            while True:
                try:
                    bundle = bundles.get(timeout=_TICK_S)
                except queue.Empty:
                    bundle = []
                if bundle is None:
                    break
                if bundle and started is None:
                    # The first block tells that the models are loaded: from here the rate means something.
                    started = time.monotonic()
                    self._startup_s = started - self._clock
                    self._display.stage("enriching")
                collector.add(bundle)
                collector.tick()
                tally.elapsed_s = 0.0 if started is None else time.monotonic() - started
                self._display.update(tally)
        self._display.stage("committing")
        collector.finish()
        self._display.update(tally)

    def _run_lost(self, stages: Stages, collector: Collector, tally: Tally) -> None:
        """Runs the images that went in and did not come out, each alone.

        Raises:
            UnreconciledError: they are too many.
        """
        lost = self._lost()
        config = self._job.quarantine
        if not lost.num_rows:
            return
        if lost.num_rows > config.max_images:
            raise self._unreconciled(lost)
        self._display.stage(f"running {lost.num_rows:,} images alone that came back from no worker")
        quarantine = Quarantine(stages, config)
        try:
            for index in range(lost.num_rows):
                collector.add([(ray.put(quarantine.run(lost.slice(index, 1))), 1)])
                collector.tick()
                self._display.update(tally)
        finally:
            quarantine.close()
        collector.finish()
        lost = self._lost()
        if lost.num_rows:
            raise self._unreconciled(lost)

    def _lost(self) -> pa.Table:
        """The planned rows whose key no committed file holds."""
        out = pa.chunked_array(self._collected.keys, pa.binary(16))
        absent = []
        for block in self._plan.batches():
            came_out = pa.compute.is_in(keys.to_binary(block["image_id"]), value_set=out)
            absent.append(block.filter(pa.compute.invert(came_out)))
        return pa.concat_tables(absent)

    def _unreconciled(self, lost: pa.Table) -> UnreconciledError:
        because = f"; a worker failed with: {self._worker_error}" if self._worker_error else ""
        examples = ", ".join(lost["uri"].slice(0, 3).to_pylist())
        return UnreconciledError(
            f"{lost.num_rows:,} of {self._plan.num_planned:,} images did not come out of the run, such as "
            f"{examples}{because}",
            remedy="The others are committed. Run the same command again: only these are due.",
        )

    def _finished(self, status: RunStatus, message: str = "") -> RunReport:
        seconds = time.monotonic() - self._clock
        return finished_report(
            self._report, self._collected, status, message, seconds=seconds, startup_s=self._startup_s
        )


def _status_of(error: BaseException) -> RunStatus:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "unreconciled" if isinstance(error, UnreconciledError) else "failed"


@contextlib.contextmanager
def _heartbeat(catalog: Catalog, run_id: str) -> Iterator[None]:
    """Keeps the run's lease alive while the block runs."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_HEARTBEAT_S):
            try:
                catalog.runs.heartbeat(run_id)
            except VlmflowError as error:
                # The run goes on: a lost lease matters only to a vacuum, and the next beat renews it.
                logger.warning("heartbeat of run %s failed: %s", run_id, error)

    thread = threading.Thread(target=beat, name="vlmflow-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def _background(dataset: Dataset) -> Iterator[Blocks]:
    """Consumes the dataset in a thread, so that commits come on time while no block is ready.

    Yields:
        A queue of lists of (block reference, rows); None ends it. A failure of the pipeline is raised at the end.
    """
    blocks: Blocks = queue.Queue(maxsize=64)
    failure: list[BaseException] = []
    stop = threading.Event()

    def consume() -> None:
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                item = [(entry.ref, entry.metadata.num_rows or 0) for entry in bundle.blocks]
                while not stop.is_set():
                    with contextlib.suppress(queue.Full):
                        blocks.put(item, timeout=_TICK_S)
                        break
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - carried to the driver's thread and raised there
            failure.append(error)
        finally:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    blocks.put(None, timeout=_TICK_S)
                    break

    thread = threading.Thread(target=consume, name="vlmflow-consume", daemon=True)
    thread.start()
    try:
        yield blocks
    finally:
        stop.set()
        thread.join(timeout=2.0)  # it may be waiting for a block; it ends with the next, or with Ray
    if failure:
        raise _in_our_words(failure[0]) from failure[0]


def _in_our_words(error: BaseException) -> BaseException:
    """What a user is told of an actor that could not start, or of a cluster that went away."""
    if not isinstance(error, RayError):
        return error
    # Ray gives the worker's traceback as text; its last line names the class and the reason.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ClusterError(
        f"the cluster gave up: {type(error).__name__}: {lines[-1][:300] if lines else 'no reason given'}",
        remedy="What was committed stays. `vlmflow doctor` tests the workers; then run the same command again.",
    )
