"""The work of the flows, step by step: in this process, or as jobs of a Ray cluster that this process is no part of.

A flow run on Kubernetes is a small pod: it has no GPU, no weights, and is no node of the cluster. What needs those is
submitted as a command line with a job file, through the Jobs API; so a flow that is killed loses no work.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol, TypeVar

import yaml
from pydantic import Field, ValidationError

from pipelines.ray_jobs import Attempt, Command, RayJobs, read_files
from vlmflow import errors
from vlmflow.checks import Check, doctor_of
from vlmflow.config import Frozen, Job
from vlmflow.engine import PlanSummary, RunReport, enrich, plan
from vlmflow.engine.cluster import ray_cluster
from vlmflow.engine.prepare import EncodedPrompts
from vlmflow.engine.progress import ProgressDisplay, Tally
from vlmflow.engine.remoderate import check_remoderation, remoderate
from vlmflow.engine.remoderate_report import RemoderateReport
from vlmflow.engine.scope import Scope
from vlmflow.errors import ConfigError, SubmittedJobError, VlmflowError
from vlmflow.gate import GateLimits, GateReport, compare, golden_values, read_accepted
from vlmflow.moderation.policy import load_policy
from vlmflow.paths import is_file
from vlmflow.storage import parse_address
from vlmflow.validation import describe_validation

JOB_FILE = "job.yaml"

_Model = TypeVar("_Model", bound=Frozen)


class Golden(Frozen):
    """The golden set that stands before a run, and what was accepted of it."""

    uri: Annotated[str, Field(description="A few images that represent the catalog: a folder or a prefix.")]
    accepted: Annotated[Path, Field(description="File of accepted values; `vlmflow gate accept` writes it.")]
    limits: Annotated[GateLimits, Field(description="How far values may move.")] = GateLimits()
    scratch: Annotated[
        str | None,
        Field(description="Folder or prefix for a temporary catalog. On a cluster, one that all nodes reach."),
    ] = None


class Steps(Protocol):
    """What the flows need done. Every step raises a :class:`vlmflow.VlmflowError` if it cannot be done."""

    def session(self, job: Job) -> AbstractContextManager[object]:
        """What several steps share, such as a Ray cluster that need not start for each."""

    def doctor(self, job: Job) -> list[Check]:
        """Looks at what the job needs."""

    def gate(self, job: Job, golden: Golden) -> GateReport:
        """Holds the job's models against the accepted values."""

    def plan(self, job: Job) -> PlanSummary:
        """Says what is due."""

    def follows(self, job: Job) -> bool:
        """Whether this very enrichment is at work already, and :meth:`enrich` would wait for its end."""

    def enrich(self, job: Job, progress: ProgressDisplay) -> RunReport:
        """Does what is due."""

    def check_remoderation(self, job: Job, where: str | None, rollback: str | None) -> None:
        """Refuses what :meth:`remoderate` would refuse of any dates: nothing is moved, nor looked through."""

    def remoderate(
        self, job: Job, scope: Scope, rollback: str | None, *, dry_run: bool, progress: ProgressDisplay
    ) -> RemoderateReport:
        """Puts rows under the job's policy, or back under the one before."""


class InProcess:
    """Steps as calls of the library."""

    def __init__(self) -> None:
        self._prompts = EncodedPrompts()

    def session(self, job: Job) -> AbstractContextManager[object]:
        """The job's Ray cluster."""
        return ray_cluster(job.ray)

    def doctor(self, job: Job) -> list[Check]:
        """Looks at what the job needs."""
        return list(doctor_of(job))

    def gate(self, job: Job, golden: Golden) -> GateReport:
        """Holds the job's models against the accepted values."""
        accepted = read_accepted(golden.accepted)
        # Not its `columns`: the set need not have them, and nothing of it is kept.
        source = job.source.model_copy(update={"uri": golden.uri, "kind": "auto", "columns": None})
        return compare(accepted, golden_values(job, source, scratch=golden.scratch), golden.limits)

    def plan(self, job: Job) -> PlanSummary:
        """Says what is due."""
        return plan(job)

    def follows(self, job: Job) -> bool:
        """Never: what this process does ends with it."""
        return False

    def enrich(self, job: Job, progress: ProgressDisplay) -> RunReport:
        """Does what is due."""
        return enrich(job, progress=progress)

    def check_remoderation(self, job: Job, where: str | None, rollback: str | None) -> None:
        """Refuses what :meth:`remoderate` would refuse of any dates: nothing is moved, nor looked through."""
        check_remoderation(job, Scope(where=where), rollback)

    def remoderate(
        self, job: Job, scope: Scope, rollback: str | None, *, dry_run: bool, progress: ProgressDisplay
    ) -> RemoderateReport:
        """Puts rows under the job's policy, or back under the one before."""
        return remoderate(
            job, scope=scope, rollback=rollback, dry_run=dry_run, progress=progress, prompts=self._prompts
        )


class OnCluster:
    """Steps as Ray jobs.

    Args:
        owner: id of the flow run.
        on_line: what a job logs, line by line.
        deadline_s: of each job, from its start.
        once: what succeeded for the flow run before it was killed and started again is not done again.
    """

    def __init__(
        self, url: str, *, owner: str, on_line: Callable[[str], None], deadline_s: float, once: bool = False
    ) -> None:
        self._jobs = RayJobs(url)
        self._owner, self._on_line, self._deadline_s, self._once = owner, on_line, deadline_s, once

    def session(self, job: Job) -> AbstractContextManager[object]:
        """Nothing: every job is a process of its own."""
        return nullcontext()

    def doctor(self, job: Job) -> list[Check]:
        """Looks at what the job needs, from within the cluster."""
        attempt, lines = self._run(doctor_command(job))
        checks = [Check(**line) for line in lines if "verdict" in line]
        if not checks:
            _raise_failure(attempt, lines)
        return checks

    def gate(self, job: Job, golden: Golden) -> GateReport:
        """Holds the job's models against the accepted values."""
        attempt, lines = self._run(gate_command(job, golden))
        return _report(GateReport, attempt, lines)

    def plan(self, job: Job) -> PlanSummary:
        """Says what is due."""
        attempt, lines = self._run(plan_command(job))
        return _report(PlanSummary, attempt, lines)

    def follows(self, job: Job) -> bool:
        """Whether this very enrichment is at work already, and :meth:`enrich` would wait for its end."""
        last = self._jobs.last(enrich_command(job))
        return last is not None and last.is_running

    def enrich(self, job: Job, progress: ProgressDisplay) -> RunReport:
        """Does what is due."""
        attempt, lines = self._run(enrich_command(job), progress)
        return _report(RunReport, attempt, lines)

    def check_remoderation(self, job: Job, where: str | None, rollback: str | None) -> None:
        """Refuses what :meth:`remoderate` would refuse of any dates: nothing is moved, nor looked through."""
        attempt, lines = self._run(check_command(job, where, rollback))
        _report(RemoderateReport, attempt, lines)

    def remoderate(
        self, job: Job, scope: Scope, rollback: str | None, *, dry_run: bool, progress: ProgressDisplay
    ) -> RemoderateReport:
        """Puts rows under the job's policy, or back under the one before."""
        attempt, lines = self._run(remoderate_command(job, scope, rollback, dry_run=dry_run), progress)
        return _report(RemoderateReport, attempt, lines)

    def _run(self, command: Command, progress: ProgressDisplay | None = None) -> tuple[Attempt, list[dict[str, Any]]]:
        attempt = self._jobs.start(command, self._owner, once=self._once)
        output = Output(self._on_line, progress)
        return self._jobs.follow(attempt, output.take, deadline_s=self._deadline_s), output.objects


class Output:
    """Tells a command's JSON lines from what it logs.

    Attributes:
        objects: JSON lines that are no progress: reports, and the error that ended the command.
    """

    def __init__(self, on_line: Callable[[str], None], progress: ProgressDisplay | None) -> None:
        self._on_line, self._progress = on_line, progress
        self.objects: list[dict[str, Any]] = []

    def take(self, line: str) -> None:
        """Looks at a line of the log."""
        found = _json_object(line)
        if found is None:
            if line.strip():
                self._on_line(line)
        elif found.get("event") == "stage":
            if self._progress is not None:
                self._progress.stage(str(found.get("stage")))
        elif found.get("event") == "progress":
            if self._progress is not None:
                self._progress.update(_tally(found))
        else:
            self.objects.append({name: value for name, value in found.items() if name != "event"})


def job_files(job: Job) -> dict[str, str]:
    """The files that a job needs beside its images: its own, and its policy if that is no name of one that ships.

    Raises:
        ConfigError: the policy cannot be read, or names a folder that nobody finds from where the job runs.
        PolicyError: the policy cannot be used.
    """
    files: dict[str, str] = {}
    data = job.model_dump(mode="json", exclude_defaults=True)
    for part in ("source", "catalog"):
        data[part]["uri"] = absolute(data[part]["uri"])
    if job.models_dir is not None:
        data["models_dir"] = str(job.models_dir.absolute())
    for model in data.get("models", {}).values():
        if model.get("path") is not None:
            model["path"] = str(Path(model["path"]).absolute())
    if job.policy is not None and is_file(path := Path(job.policy)):
        _check_detectors(path)
        data["policy"] = path.name if path.name != JOB_FILE else f"policy-{path.name}"
        files[data["policy"]] = read_files([path])[path.name]
    data["ray"] = {"address": "auto"}
    return {JOB_FILE: yaml.safe_dump(data, sort_keys=True)} | files


def _check_detectors(policy: Path) -> None:
    """Refuses folders of detectors that are relative: a submitted job runs in a temporary folder of the cluster.

    They are not rewritten on the way, as those of the job are: rows carry the digest of the policy as it stands.

    Raises:
        ConfigError: there is one.
        PolicyError: the policy cannot be used.
    """
    for detector in load_policy(str(policy)).detectors:
        if detector.path is not None and not Path(detector.path).is_absolute():
            raise ConfigError(
                f"policy {policy}: detector {detector.name}: path {detector.path} is relative, and a job on a cluster "
                "runs in another folder",
                remedy="Write the path whole, as every node of the cluster has it.",
            )


def absolute(uri: str) -> str:
    """The uri as it reads from any folder: a local path becomes absolute."""
    if uri.startswith(("http://", "https://")) or "://" in uri:
        return uri
    return parse_address(uri).path


def doctor_command(job: Job) -> Command:
    """``vlmflow doctor`` of a job."""
    return Command("doctor", ("doctor", "--config", JOB_FILE, "--json"), job_files(job))


def plan_command(job: Job) -> Command:
    """``vlmflow plan`` of a job."""
    return Command("plan", ("plan", "--config", JOB_FILE, "--json"), job_files(job))


def enrich_command(job: Job) -> Command:
    """``vlmflow enrich`` of a job."""
    when = f"enrich {job.date}" if job.date is not None else "enrich"
    return Command(when, ("enrich", "--config", JOB_FILE, "--json", "--verbose"), job_files(job))


def gate_command(job: Job, golden: Golden) -> Command:
    """``vlmflow gate check`` of a job."""
    files = job_files(job) | {"accepted.json": read_files([golden.accepted])[golden.accepted.name]}
    limits = golden.limits
    arguments: tuple[str, ...] = (
        "gate",
        "check",
        absolute(golden.uri),
        "--config",
        JOB_FILE,
        "--accepted",
        "accepted.json",
        "--json",
    )
    arguments += ("--min-equal-captions", f"{limits.min_equal_captions:g}")
    arguments += ("--max-margin-shift", f"{limits.max_margin_shift:g}")
    if golden.scratch is not None:
        arguments += ("--scratch", absolute(golden.scratch))
    return Command("gate", arguments, files)


def remoderate_command(job: Job, scope: Scope, rollback: str | None, *, dry_run: bool) -> Command:
    """``vlmflow remoderate`` of a job's catalog."""
    arguments: tuple[str, ...] = ("remoderate", absolute(job.catalog.uri), "--config", JOB_FILE, "--json", "--verbose")
    options: Mapping[str, object] = {
        "--from": scope.start,
        "--to": scope.end,
        "--where": scope.where,
        "--rollback": rollback,
    }
    for option, value in options.items():
        if value is not None:
            arguments += (option, str(value))
    label = f"remoderate {scope.start or ''}"
    return Command(label, arguments + (("--dry-run",) if dry_run else ()), job_files(job))


def check_command(job: Job, where: str | None, rollback: str | None) -> Command:
    """``vlmflow remoderate`` of a date before all others: it checks what it is given, and finds no rows."""
    return remoderate_command(job, Scope(dt.date.min, dt.date.min, where), rollback, dry_run=True)


def _report(model: type[_Model], attempt: Attempt, lines: Sequence[Mapping[str, Any]]) -> _Model:
    """The last line of a command as the report that it is."""
    if not lines or "class" in lines[-1]:
        _raise_failure(attempt, lines)
    try:
        return model.model_validate(lines[-1])
    except ValidationError as error:
        raise SubmittedJobError(
            describe_validation(error, what=f"Ray job {attempt.submission_id}: its last line of JSON"),
            remedy="The cluster's vlmflow must be of the version that this flow runs with.",
        ) from error


def _raise_failure(attempt: Attempt, lines: Sequence[Mapping[str, Any]]) -> NoReturn:
    """Raises the error that a command ended with, or that it ended without one."""
    if lines and "class" in lines[-1]:
        last = lines[-1]
        error_class = getattr(errors, str(last["class"]), None)
        if not (isinstance(error_class, type) and issubclass(error_class, VlmflowError)):
            error_class = SubmittedJobError
        raise error_class(
            f"Ray job {attempt.submission_id}: {last.get('message')}", remedy=str(last.get("remedy") or "")
        )
    said = [line.strip() for line in attempt.message.splitlines() if line.strip()]
    raise SubmittedJobError(
        f"Ray job {attempt.submission_id} {attempt.status.value.lower()}: {said[-1][:300] if said else 'no message'}",
        remedy="Its log is on the cluster's dashboard.",
    )


def _json_object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _tally(event: Mapping[str, Any]) -> Tally:
    """A tally that shows what an event of progress says."""
    rate = float(event.get("images_per_s") or 0.0)
    done = int(event.get("done") or 0)
    tally = Tally(total=int(event.get("total") or 0), done=done, committed=int(event.get("committed") or 0))
    tally.errors.update(event.get("errors") or {})
    tally.elapsed_s = done / rate if rate > 0 else 0.0
    return tally
