"""A policy changes, and no image is read again: moderation from what the catalog holds.

The table itself is the progress: a row that carries the policy is done. Live files are rewritten one by one by Ray
tasks and swapped in groups by the commit function; where another writer was first, the rows are looked for in the
newest version and done there. So a killed backfill goes on where it stopped, beside whatever else writes.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray

from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import DataFile, Snapshot
from vlmflow.catalog.runs import new_run_id
from vlmflow.catalog.where import check_where
from vlmflow.catalog.writable import check_writable
from vlmflow.config import Job
from vlmflow.engine.archive import archive_policy, archived_policies, archived_policy, archived_prompts, full_digest
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.faults import get, lost_in_mid_run
from vlmflow.engine.handed_on import hand_on, handed_on
from vlmflow.engine.prepare import EncodedPrompts, Prepared, encode_policy, prepare
from vlmflow.engine.progress import ProgressDisplay, SilentProgress, Tally
from vlmflow.engine.relabel_files import Done, Scan, relabel_file, scan_file, score_file
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.engine.scope import Scope
from vlmflow.errors import StorageAccessError, TransientError
from vlmflow.models.detectors import prepare_detectors
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import Policy, check_binding, prompts_digest
from vlmflow.moderation.relabel import Changes, ScoredVectors, Target

logger = logging.getLogger("vlmflow")

Item = TypeVar("Item")
Result = TypeVar("Result")

# Files that may go on arriving under another policy while we work; a nightly run with the old one never ends sooner.
_MAX_ROUNDS = 20
_TASKS_PER_CPU = 2
_COMMIT_FILES = 32
_COMMIT_S = 30.0
_LIST_S = 10.0  # age up to which a list of the files of vectors serves


def remoderate(
    job: Job,
    *,
    scope: Scope | None = None,
    rollback: str | None = None,
    dry_run: bool = False,
    progress: ProgressDisplay | None = None,
    prompts: EncodedPrompts | None = None,
) -> RemoderateReport:
    """Puts the rows of a catalog under the job's policy, from stored vectors and margins.

    Where a row's margins were computed with the same model and prompts, they are taken as they are: only thresholds
    changed. Run it again after an interruption: rows that carry the policy are done.

    Args:
        job: catalog, profile and policy count; its source is not read.
        rollback: digest, or the beginning of it, of a policy: its rows go back to the policy that each had before, one
            step: a second rollback moves none of them. The job's policy is not used.
        dry_run: reports what would change, and writes nothing.
        prompts: of several calls in one process, the same for all: what one has encoded serves the next.

    Raises:
        ConfigError: the condition cannot be used, or no archived policy begins with ``rollback``.
        CatalogError: there is no catalog, or it does not hold the policy to go back to.
        PolicyError: the policy cannot be used, or it, or one to go back to, was not set for the model.
        DetectorError: a detector of such a policy cannot run here.
        WeightsError: weights of the embedder or of a detector are absent or do not fit.
        StoreLostError: the store went away in mid-run; what was committed stays.
    """
    begun = _begun(job, scope or Scope(), rollback, dry_run, progress or SilentProgress())
    begun.encoded = prompts or begun.encoded
    return begun.execute()


def check_remoderation(job: Job, scope: Scope, rollback: str | None) -> None:
    """Refuses what :func:`remoderate` refuses before it starts Ray, with its errors; no row is read."""
    _begun(job, scope, rollback, True, SilentProgress())


def _begun(job: Job, scope: Scope, rollback: str | None, dry_run: bool, display: ProgressDisplay) -> _Remoderation:
    display.stage("checking model and policy")
    # A rollback goes back to policies that the catalog holds: the job's own need neither exist nor fit the model.
    tasks = ("embed", "moderate") if rollback is None else ("embed",)
    prepared = prepare(job.model_copy(update={"tasks": tasks}))
    catalog = Catalog.open(job.catalog)
    if scope.where is not None:
        check_where(scope.where, catalog.newest_images.schema)
    return _Remoderation(prepared, catalog, scope, rollback, dry_run, display)


@dataclass
class _Totals:
    changes: Changes = field(default_factory=Changes)
    target: str = ""  # the policy that rows come under now
    policies: Counter[str] = field(default_factory=Counter)
    num_first: int = 0
    partitions: Counter[str] = field(default_factory=Counter)
    num_commits: int = 0
    detectors: dict[str, None] = field(default_factory=dict)  # a set in their order


class _Remoderation:
    def __init__(
        self,
        prepared: Prepared,
        catalog: Catalog,
        scope: Scope,
        rollback: str | None,
        dry_run: bool,
        display: ProgressDisplay,
    ) -> None:
        self._prepared, self._catalog, self._scope = prepared, catalog, scope
        self._rollback = None if rollback is None else full_digest(catalog, rollback)
        self._dry_run, self._display = dry_run, display
        self._run_id = new_run_id()
        self._started_at = dt.datetime.now(dt.UTC)
        self._clock = time.monotonic()
        self._folder = Folder(prepared.job.catalog)
        self._totals = _Totals()
        self._tally = Tally()
        self._max_tasks = 1
        self.encoded = EncodedPrompts()

    def execute(self) -> RemoderateReport:
        if self._dry_run:
            self._run()
            return self._report("dry run")
        check_writable(self._folder)  # before the model is loaded, not at the first commit
        self._catalog.upgrade()  # rows are written with all columns that they are read with
        runs = self._catalog.runs
        runs.start(self._run_id, self._record("running"))
        status = "interrupted"  # by what is no Exception: Ctrl-C, or what Prefect ends a flow run with
        try:
            with runs.keep_alive(self._run_id):
                self._run()
            status = "done"
        except (StorageAccessError, TransientError) as error:
            status = "failed"
            raise lost_in_mid_run(error) from error
        except Exception:
            status = "failed"
            raise
        finally:
            runs.conclude(self._run_id, self._record(status))
        return self._report("done").model_copy(update={"runs_beside": self._runs_beside()})

    def _runs_beside(self) -> dict[str, str]:
        """Runs that may still commit rows under a policy that we moved rows from, and that policy.

        We are done once no row of the moment is left to move: such a run may go on for hours.
        """
        runs, found = self._catalog.runs, {}
        left = (self._rollback or "")[:12]
        for run_id in [run_id for run_id, state in runs.states().items() if state == "running"]:
            record = runs.get(run_id) or {}
            policy = record.get("policy")
            is_enrichment = "operation" not in record and record.get("status") == "running"
            if is_enrichment and policy and (f"({left})" in policy if left else policy not in self._totals.policies):
                found[run_id] = str(policy)
        return found

    def _run(self) -> None:
        self._display.stage("starting Ray")
        with ray_cluster(self._prepared.job.ray) as cluster:
            self._max_tasks = max(2, int(cluster.cpus) * _TASKS_PER_CPU)
            for target in list(self._targets()):  # all, before the first row moves: one may be refused
                self._totals.detectors |= dict.fromkeys(detector.name for detector in target.policy.detectors)
                self._totals.target = target.policy.full_name
                self._totals.policies[self._totals.target] = 0
                self._move(target)

    def _targets(self) -> Iterator[Target]:
        """The policies that rows come under: one, or, of a rollback, each that a row had before."""
        policy = self._prepared.setup.policy
        if policy is not None:
            yield self._target(policy, None)
            return
        self._display.stage("looking for rows to roll back")
        images = self._catalog.newest_images
        scans = list(self._scan([file for file in images.files.values() if self._scope.holds(file)], images, None))
        self._totals.num_first = sum(scan.num_first for scan in scans)
        for digest in sorted({digest for scan in scans for digest in scan.previous}):
            yield self._target(archived_policy(self._catalog, digest), self._rollback)

    def _target(self, policy: Policy, moves_from: str | None) -> Target:
        setup = self._prepared.setup
        identity = setup.identities["embed"]
        binding = check_binding(policy, identity, accept_unbound=self._prepared.job.accept_unbound)
        fingerprints = setup.fingerprints(("embed", "moderate"))
        archive = archived_policies(self._catalog)
        same = [digest for digest, other in archive.items() if prompts_digest(other) == prompts_digest(policy)]
        return Target(
            policy=policy,
            moderator=Moderator(policy, binding, None, self._detectors_of(policy)),
            embed_fingerprint=fingerprints["embed"],
            moderate_fingerprint=fingerprints["moderate"],
            run_id=self._run_id,
            moves_from=moves_from,
            same_margins=tuple(same),
        )

    def _move(self, target: Target) -> None:
        """Rewrites files until no live one holds a row that should move."""
        seen: set[str] = set()
        for _ in range(_MAX_ROUNDS):
            images = self._catalog.newest_images
            files = [file for path, file in images.files.items() if path not in seen and self._scope.holds(file)]
            self._display.stage(f"looking through {len(files):,} files")
            scans = [scan for scan in self._scan(files, images, target) if scan.num_wanted]
            seen |= {file.path for file in files}
            if not scans:
                return
            if target.moderator.dim == 0 and any(scan.num_computed for scan in scans):
                target = self._with_vectors(target)
            if not self._dry_run:
                archive_policy(self._catalog, target.policy)
            self._tally.total += sum(scan.num_wanted for scan in scans)
            self._display.stage(f"moderating under {target.policy.name} {target.policy.version}")
            self._round(scans, images, target, seen)
            if self._dry_run:
                return
        logger.warning(
            "images go on arriving under another policy than %s: another run writes them", target.policy.name
        )

    def _round(self, scans: list[Scan], images: Snapshot, target: Target, seen: set[str]) -> None:
        """One pass over files of a version, with its columns. What others have moved meanwhile is left to the next."""
        scans = sorted(scans, key=lambda scan: scan.file.ingest_date)
        pending: list[Done] = []
        since = time.monotonic()
        for done in self._in_order(relabel_file, scans, self._arguments_of(images, ray.put(target))):
            self._count(done)
            if done.new is not None:
                pending.append(done)
            if len(pending) >= _COMMIT_FILES or time.monotonic() - since >= _COMMIT_S:
                self._swap(pending, seen)
                pending, since = [], time.monotonic()
        self._swap(pending, seen)

    def _arguments_of(self, images: Snapshot, target: ray.ObjectRef[Target]) -> Callable[[Scan], tuple[Any, ...]]:
        """Gives the arguments of files that come in the order of their dates: vectors are scored date by date."""
        date: dt.date | None = None
        scored: list[ray.ObjectRef[ScoredVectors]] = []
        files, listed_at = self._catalog.live_files("embeddings"), time.monotonic()

        def arguments(scan: Scan) -> tuple[Any, ...]:
            nonlocal date, scored, files, listed_at
            if scan.num_computed and scan.file.ingest_date != date:
                # Not once for all: an erasure takes files away. Not for each date: there may be a thousand.
                if time.monotonic() - listed_at >= _LIST_S:
                    files, listed_at = self._catalog.live_files("embeddings"), time.monotonic()
                date = scan.file.ingest_date
                scored = self._score([file for file in files.values() if file.ingest_date == date], target)
            needed = scored if scan.num_computed else []
            return (self._folder, scan.file, images.schema, target, self._scope.where, self._dry_run, *needed)

        return arguments

    def _score(self, files: list[DataFile], target: ray.ObjectRef[Target]) -> list[ray.ObjectRef[ScoredVectors]]:
        remote = ray.remote(num_cpus=1)(score_file)
        refs: list[ray.ObjectRef[ScoredVectors]] = []
        running: list[ray.ObjectRef[ScoredVectors]] = []
        for file in files:
            running.append(remote.remote(self._folder, file, target))
            refs.append(running[-1])
            if len(running) >= self._max_tasks:
                _, running = ray.wait(running, num_returns=1, fetch_local=False)
        return refs

    def _scan(self, files: list[DataFile], images: Snapshot, target: Target | None) -> Iterator[Scan]:
        shared = ray.put(target)
        return self._in_order(
            scan_file,
            files,
            lambda file: (self._folder, file, images.schema, shared, self._scope.where, self._rollback),
        )

    def _in_order(
        self, function: Callable[..., Result], items: list[Item], arguments: Callable[[Item], tuple[Any, ...]]
    ) -> Iterator[Result]:
        """Runs a function as Ray tasks, a few ahead of the one whose result is given out."""
        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        running: deque[ray.ObjectRef[Any]] = deque()
        for item in items:
            running.append(remote.remote(*arguments(item)))
            if len(running) >= self._max_tasks:
                yield get(running.popleft())
        while running:
            yield get(running.popleft())

    def _swap(self, pending: list[Done], seen: set[str]) -> None:
        if not pending:
            return
        operation = "remoderate" if self._rollback is None else "rollback"
        swaps = [(done.old, done.new) for done in pending if done.new is not None]
        late = {file.path for file in self._catalog.swap_images(self._run_id, operation, swaps)}
        for old, new in swaps:
            if old.path not in late:
                seen.add(new.path)
        for done in pending:
            if done.old.path in late:
                self._tally.total -= done.changes.num_moved
                self._tally.done -= done.changes.num_moved
            else:
                self._book(done)
                self._tally.committed += done.changes.num_moved
        self._totals.num_commits += 1
        self._display.update(self._tally)

    def _book(self, done: Done) -> None:
        self._totals.changes.add(done.changes)
        self._totals.policies[self._totals.target] += done.changes.num_moved
        if done.changes.num_moved:
            self._totals.partitions[done.old.ingest_date.isoformat()] += done.changes.num_moved

    def _count(self, done: Done) -> None:
        self._tally.done += done.changes.num_moved
        self._tally.elapsed_s = time.monotonic() - self._clock
        if done.new is None:  # of a dry run, or nothing to move
            self._book(done)
        self._display.update(self._tally)

    def _with_vectors(self, target: Target) -> Target:
        """The target with prompt vectors: archived ones, else encoded now."""
        self._display.stage("encoding prompts")
        setup = self._prepared.setup
        identity = setup.identities["embed"]
        binding = check_binding(target.policy, identity, accept_unbound=self._prepared.job.accept_unbound)
        prompts = archived_prompts(self._catalog, target.policy, identity)
        if prompts is None and self._dry_run:
            prompts = handed_on(target.policy, identity)
        if prompts is None:
            prompts = self.encoded.of(replace(setup, policy=target.policy, binding=binding), encode_policy)
            if prompts is not None and self._dry_run:
                hand_on(prompts, identity)
        if not self._dry_run:
            archive_policy(self._catalog, target.policy, prompts, identity)
        moderator = Moderator(target.policy, binding, prompts, self._detectors_of(target.policy))
        return replace(target, moderator=moderator)

    def _detectors_of(self, policy: Policy) -> dict[str, str]:
        """What the scores of a policy's detectors carry, by the detector's name."""
        setups = prepare_detectors(policy, self._prepared.job.views)
        return {setup.name: setup.fingerprint for setup in setups}

    def _record(self, status: str) -> dict[str, Any]:
        return self._report(status).model_dump(mode="json") | {"operation": "remoderate", "state": status}

    def _report(self, status: str) -> RemoderateReport:
        policy = self._prepared.setup.policy  # None: of a rollback
        changes = self._totals.changes
        by_label: dict[str, dict[str, int]] = {}
        for (label, before, after), count in changes.labels.most_common():
            by_label.setdefault(label, {})[f"{before} -> {after}"] = count
        after_counts: Counter[str] = Counter()
        for (_, after), count in changes.decisions.items():
            after_counts[after] += count
        return RemoderateReport(
            run_id=self._run_id,
            dry_run=self._dry_run,
            catalog=self._catalog.uri,
            policy=f"{policy.name} {policy.version}" if policy else "the one before",
            policy_digest=policy.digest if policy else "",
            policies=dict(self._totals.policies),
            rollback_of=self._rollback,
            where=self._scope.where,
            status=status,
            started_at=self._started_at,
            seconds=time.monotonic() - self._clock,
            num_moved=changes.num_moved,
            num_from_margins=changes.num_from_margins,
            num_other_model=changes.num_other_model,
            num_undetected=changes.num_undetected,
            detectors=tuple(self._totals.detectors),
            num_without_vectors=changes.num_without_vectors,
            num_first=self._totals.num_first,
            decisions=dict(after_counts.most_common()),
            flips={f"{a} -> {b}": n for (a, b), n in changes.decisions.most_common() if a != b},
            label_flips=by_label,
            examples=tuple(changes.examples),
            partitions=dict(sorted(self._totals.partitions.items())),
            num_commits=self._totals.num_commits,
        )
