"""The record of a run: what the catalog keeps under ``runs/`` and what :func:`vlmflow.enrich` returns."""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from vlmflow.catalog import Catalog, Plan
from vlmflow.config import CatalogConfig, Frozen, Job
from vlmflow.engine import columns
from vlmflow.engine.stages import PoolReport, StageReport, pool_reports, stage_reports
from vlmflow.engine.unused import unused_settings
from vlmflow.errors import ConfigError
from vlmflow.sources import normalise_uri

if TYPE_CHECKING:
    from vlmflow.engine.collect import Collected
    from vlmflow.engine.prepare import Prepared

RunStatus = Literal["running", "done", "nothing_due", "unreconciled", "failed", "interrupted"]

_PACKAGES = (
    *("vlmflow", "ray", "torch", "transformers", "open_clip_torch", "deltalake", "pyarrow", "obstore"),
    *("pillow", "pillow-heif", "av"),
)


class CommitReport(Frozen):
    """One commit of the run.

    Attributes:
        rows: image rows that this commit put into the table.
        at_s: seconds after the first block was done.
    """

    rows: int
    at_s: float
    seconds: float


class UsageReport(Frozen):
    """What a task has spent on a model that is paid for, as its endpoint counts.

    Attributes:
        requests: repeated ones included.
        cost: by the prices of the job; 0 without.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    cost: float


class RunReport(Frozen):
    """What a run did. The catalog keeps it as JSON under ``runs/``.

    Attributes:
        num_listed: images that the source listed.
        num_unchanged: of these, images with nothing due.
        num_exhausted: of these, images that failed three times and are not tried again.
        num_erased: images that were erased from the catalog, before the run or while it was at work; they are left
            out. Those of before are not among the images listed.
        num_policy_differs: rows decided under another policy; only a remoderation changes them.
        num_unwatched: images at http(s) urls of which no run sees that they have changed.
        num_doubled: images with more than one row, of another program; a run keeps one of them up to date.
        due: images due by task and reason.
        num_added: rows that are new in the catalog.
        num_replaced: rows that were there before.
        num_by_others: rows dropped because another run had committed them meanwhile.
        num_columns_updated: further rows, of which nothing but the caller's columns was updated.
        num_copied: images with results taken from a row of the catalog with equal bytes.
        num_shared: images with results taken from another image with equal bytes that the same actor had.
        num_unmodified: images at http(s) urls of which the server said that they are as they were; they were not read.
        decisions: rows that it committed by the decision that it gave them; those that keep the one they had do not
            count.
        errors: rows that it committed by class of what went wrong in this run.
        startup_s: seconds until the first block of images was finished: processes started, models loaded.
        waited_s: seconds before that, until the cluster had room for it beside other runs.
        images_per_s: the images after that block by the time after it; 0 where there was only one block.
        bytes_read: encoded bytes read from the source.
        prompts: what models were asked, by role; of those that take a prompt.
        usage: by task, of models that are paid for. What a worker had spent when it died is not in it.
        unused: settings of the job that none of its tasks reads.
    """

    run_id: str
    status: RunStatus
    message: str = ""
    source: str
    catalog: str
    profile: str
    tasks: tuple[str, ...]
    date: dt.date
    started_at: dt.datetime
    finished_at: dt.datetime | None = None
    seconds: float = 0.0
    startup_s: float = 0.0
    waited_s: float = 0.0
    num_listed: int = 0
    num_unchanged: int = 0
    num_due: int = 0
    num_exhausted: int = 0
    num_erased: int = 0
    num_policy_differs: int = 0
    num_unwatched: int = 0
    num_doubled: int = 0
    due: dict[str, dict[str, int]] = {}
    num_added: int = 0
    num_replaced: int = 0
    num_by_others: int = 0
    num_columns_updated: int = 0
    num_copied: int = 0
    num_shared: int = 0
    num_unmodified: int = 0
    statuses: dict[str, int] = {}
    decisions: dict[str, int] = {}
    errors: dict[str, int] = {}
    images_per_s: float = 0.0
    bytes_read: int = 0
    stages: tuple[StageReport, ...] = ()
    pools: tuple[PoolReport, ...] = ()
    commits: tuple[CommitReport, ...] = ()
    models: dict[str, str] = {}
    prompts: dict[str, str] = {}
    usage: dict[str, UsageReport] = {}
    fingerprints: dict[str, str] = {}
    policy: str | None = None
    versions: dict[str, str] = {}
    unused: tuple[str, ...] = ()
    config: dict[str, object] = {}


class PlanSummary(Frozen):
    """What a run would do.

    Attributes:
        num_duplicates: references that repeat an image of the same listing.
        num_due: images with something due.
        num_planned: of these, what a limit leaves.
        num_exhausted: images that failed three times and are not tried again.
        num_erased: images listed that were erased from the catalog; they are left out.
        due: images due by task and reason.
        num_unwatched: images at http(s) urls of which no run would see that they have changed.
        num_doubled: images with more than one row, of another program; a run would keep one of them up to date.
        num_outdated: further rows that would get the caller's columns of the listing or the alternative text that they
            should have, and nothing else.
        outdated_columns: of these, rows by column of the caller's whose value is another now; under `alt_text` rows
            whose alternative text is missing, or does not quote the text that was found in the image.
        unused: settings of the job that none of its tasks reads.
    """

    num_listed: int
    num_duplicates: int
    num_new: int
    num_unchanged: int
    num_due: int
    num_planned: int
    num_exhausted: int
    num_erased: int
    num_policy_differs: int
    due: dict[str, dict[str, int]]
    policy: str | None
    num_unwatched: int = 0
    num_doubled: int = 0
    num_outdated: int = 0
    outdated_columns: dict[str, int] = {}
    unused: tuple[str, ...] = ()


def plan_summary(prepared: Prepared, plan: Plan) -> PlanSummary:
    """Puts a plan's counts into one object."""
    return PlanSummary(
        num_listed=plan.num_listed,
        num_duplicates=plan.num_duplicates,
        num_new=plan.num_new,
        num_unchanged=plan.num_unchanged,
        num_due=plan.num_due,
        num_planned=plan.num_planned,
        num_exhausted=plan.num_exhausted,
        num_erased=plan.num_erased,
        num_policy_differs=plan.num_policy_differs,
        due=due_by_task(prepared.job.tasks, plan),
        policy=policy_name(prepared),
        num_unwatched=plan.num_unwatched,
        num_doubled=plan.num_doubled,
        num_outdated=plan.num_outdated,
        outdated_columns=dict(plan.outdated_columns.most_common()),
        unused=unused_settings(prepared.job),
    )


def due_by_task(tasks: Iterable[str], plan: Plan) -> dict[str, dict[str, int]]:
    """Images due, by task and then by reason."""
    return {
        task: {reason: count for (name, reason), count in sorted(plan.counts.items()) if name == task} for task in tasks
    }


def policy_name(prepared: Prepared) -> str | None:
    """``name version (digest)`` of the policy; None without one."""
    policy = prepared.setup.policy
    return None if policy is None else policy.full_name


def initial_report(run_id: str, prepared: Prepared, plan: Plan) -> RunReport:
    """What is known of a run before its first image."""
    job = prepared.job
    return RunReport(
        run_id=run_id,
        status="running",
        source=normalise_uri(job.source.uri),
        catalog=normalise_uri(job.catalog.uri),
        profile=job.profile,
        tasks=job.tasks,
        date=prepared.date,
        started_at=dt.datetime.now(dt.UTC),
        num_listed=plan.num_listed,
        num_unchanged=plan.num_unchanged,
        num_due=plan.num_planned,
        num_exhausted=plan.num_exhausted,
        num_erased=plan.num_erased,
        num_policy_differs=plan.num_policy_differs,
        num_unwatched=plan.num_unwatched,
        num_doubled=plan.num_doubled,
        unused=unused_settings(job),
        due=due_by_task(job.tasks, plan),
        models=prepared.model_names(),
        prompts=prepared.setup.prompts,
        fingerprints=prepared.fingerprints,
        policy=policy_name(prepared),
        versions=installed_versions(),
        config=_public_config(job),
    )


def finished_report(
    report: RunReport,
    collected: Collected,
    status: RunStatus,
    message: str,
    *,
    seconds: float,
    startup_s: float,
    waited_s: float,
    num_first: int,
    num_cpus: float = 0.0,
) -> RunReport:
    """Fills in what the run did.

    Args:
        num_first: images of the first blocks, whose work fell into the start-up.
        num_cpus: of the cluster, which may have grown: on average; 0: there was none.
    """
    num_after_first = sum(commit.rows for commit in collected.commits) - num_first
    working_s = seconds - startup_s - waited_s
    # What one block alone took fell into the start-up, and has no share of the time after it.
    cpu_s = max(0.0, working_s) * num_cpus if num_after_first > 0 else 0.0
    return report.model_copy(
        update={
            "status": status,
            "message": message,
            "finished_at": dt.datetime.now(dt.UTC),
            "seconds": round(seconds, 3),
            "startup_s": round(startup_s, 3),
            "waited_s": round(waited_s, 3),
            "num_added": collected.num_added,
            "num_replaced": collected.num_replaced,
            "num_by_others": collected.num_by_others,
            "num_erased": report.num_erased + collected.num_erased,
            "num_columns_updated": collected.num_columns_updated,
            "num_copied": collected.num_copied,
            "num_shared": collected.num_shared,
            "num_unmodified": int(collected.sums[columns.UNMODIFIED]),
            "statuses": dict(collected.statuses),
            "decisions": dict(collected.decisions),
            "errors": dict(collected.errors),
            "images_per_s": round(max(0, num_after_first) / working_s, 2) if working_s > 0 else 0.0,
            "bytes_read": int(collected.sums["bytes_read"]),
            "stages": stage_reports(report.tasks, collected, cpu_s),
            "pools": pool_reports(collected),
            "usage": _usage(report.tasks, collected),
            "commits": tuple(collected.commits),
        }
    )


def _usage(tasks: tuple[str, ...], collected: Collected) -> dict[str, UsageReport]:
    found = {}
    for task in tasks:
        spent = {name: collected.sums[columns.spent_column(task, name)] for name in UsageReport.model_fields}
        if any(spent.values()):
            counts = {name: round(amount) for name, amount in spent.items() if name != "cost"}
            found[task] = UsageReport(**counts, cost=round(spent["cost"], 6))
    return found


def _public_config(job: Job) -> dict[str, Any]:
    """The job as it was given, its uris without credentials or signatures."""
    config = job.model_dump(mode="json", exclude_defaults=True)
    for part in ("source", "catalog"):
        config[part]["uri"] = normalise_uri(config[part]["uri"])
    return config


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def last_profile(config: CatalogConfig) -> str:
    """The profile of the newest enrichment of a catalog.

    Raises:
        CatalogError: there is no catalog.
        ConfigError: no record of a run names one.
    """
    for run in Catalog.open(config).runs.newest():
        profile = run.record.get("profile")
        if isinstance(profile, str):
            return profile
    raise ConfigError(f"{config.uri}: no run names a profile", remedy="Give --profile.")
