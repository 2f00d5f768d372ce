"""What a run needs to know before it starts: models, fingerprints, policy. Cheap, and nothing is written."""

from __future__ import annotations

import datetime as dt
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import ray

from vlmflow.catalog import Catalog, KnownBytes, Plan, PlanRequest, RunConstants
from vlmflow.config import Job, TaskName
from vlmflow.engine.faults import get
from vlmflow.engine.garbage import collected_once
from vlmflow.engine.stored import Stored
from vlmflow.imaging import DECODER_VERSION
from vlmflow.models.identity import ModelIdentity
from vlmflow.moderation.policy import prompts_digest
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks.setup import TaskSetup, prepare_prompts, prepare_tasks, with_policy

# Of the task that encodes prompts, which takes half a minute with one and a large model.
_ENCODING_THREADS = 4
# Looking through a row for equal bytes costs about a microsecond, an image at least a millisecond: beyond so many rows
# per image due, looking costs more than it can save.
MAX_ROWS_PER_IMAGE = 1_000

logger = logging.getLogger("vlmflow")


@dataclass(frozen=True)
class Prepared:
    """The job with its names resolved.

    Attributes:
        date: the logical date.
        fingerprints: by task; that of moderate leaves the policy out.
    """

    job: Job
    date: dt.date
    setup: TaskSetup
    fingerprints: dict[str, str]

    def plan_request(self) -> PlanRequest:
        """What planning compares the catalog with."""
        policy, days = self.setup.policy, self.job.source.http.recheck_days
        return PlanRequest(
            tasks=self.job.tasks,
            fingerprints=self.fingerprints,
            policy_digest=policy.digest if policy else None,
            decoder=DECODER_VERSION,
            date=self.date,
            limit=self.job.limit,
            retry=self.job.retry,
            questions=self.job.questions,
            detections=self.setup.detections if "detect" in self.job.tasks else (),
            read_before=None if days is None else dt.datetime.now(dt.UTC) - dt.timedelta(days=days),
            found_text_column=self.job.source.found_text_column,
        )

    def constants(self, run_id: str) -> RunConstants:
        """What every row of the run says of its provenance."""
        policy = self.setup.policy
        return RunConstants(
            run_id=run_id,
            tasks=self.job.tasks,
            fingerprints=self.fingerprints,
            models=self.model_names(),
            policy_name=policy.name if policy else None,
            policy_version=policy.version if policy else None,
            policy_digest=policy.digest if policy else None,
            decoder=DECODER_VERSION,
            questions=self.job.questions,
            found_text_column=self.job.source.found_text_column,
        )

    def model_names(self) -> dict[str, str]:
        """``id@revision`` by role."""
        return {role: f"{identity.id}@{identity.revision}" for role, identity in self.setup.identities.items()}


def prepare(job: Job) -> Prepared:
    """Resolves the job's names: profile to weights, policy to a file, both to digests.

    Raises:
        ConfigError: the profile is unknown.
        WeightsError: weights are absent or unsafe to load.
        PolicyError: the policy is absent or cannot be used.
        UnboundPolicyError: the policy has no thresholds for the embedder, and the job does not accept that.
    """
    job = with_policy(job)
    setup = prepare_tasks(job)
    job = _with_detectors(job) if setup.detectors else job
    return Prepared(job, job.date or dt.datetime.now(dt.UTC).date(), setup, setup.fingerprints(job.tasks))


def _with_detectors(job: Job) -> Job:
    """The job with the task that runs the policy's detectors: in the pool of `moderate`, unless it has one."""
    if "detect" in job.tasks:
        return job
    pools = tuple(
        pool.model_copy(update={"tasks": _before_moderate(pool.tasks)}) if "moderate" in pool.tasks else pool
        for pool in job.pools
    )
    if any("detect" in pool.tasks for pool in job.pools):
        pools = job.pools
    return job.model_copy(update={"tasks": _before_moderate(job.tasks), "pools": pools})


def _before_moderate(tasks: tuple[TaskName, ...]) -> tuple[TaskName, ...]:
    at = tasks.index("moderate")
    return (*tasks[:at], "detect", *tasks[at:])


def encode_policy(setup: TaskSetup) -> PromptVectors | None:
    """Encodes the policy's prompts in a worker, so that the driver loads no model; None without a policy."""
    if setup.policy is None:
        return None
    vectors: PromptVectors = get(ray.remote(num_cpus=1)(_encode).remote(setup))
    return vectors


class EncodedPrompts:
    """Vectors of prompts that this process has encoded: several dry runs of one policy archive none for each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[str, ModelIdentity], PromptVectors | None] = {}

    def of(self, setup: TaskSetup, encode: Callable[[TaskSetup], PromptVectors | None]) -> PromptVectors | None:
        """Those of a policy: encoded now, unless they were before."""
        if setup.policy is None:
            return None
        key = prompts_digest(setup.policy), setup.identities["embed"]
        with self._lock:  # of partitions at work at the same time one encodes
            if key not in self._held:
                self._held[key] = encode(setup)
            return self._held[key]


@collected_once()
def _encode(setup: TaskSetup) -> PromptVectors | None:
    import torch

    # More than was asked for, for a few seconds: who asks for so many at once waits until so many are free at once.
    before = torch.get_num_threads()
    torch.set_num_threads(min(_ENCODING_THREADS, os.cpu_count() or 1))
    try:
        return prepare_prompts(setup)
    finally:
        torch.set_num_threads(before)


def known_bytes(prepared: Prepared, plan: Plan) -> Stored[KnownBytes] | None:
    """What the catalog holds for bytes that the planned images may have; None: nothing, or it is not wanted."""
    if not prepared.job.reuse or plan.version < 0:
        return None
    catalog = Catalog.open(prepared.job.catalog)
    num_rows = sum(file.num_rows for file in catalog.live_files("images").values())
    if num_rows > MAX_ROWS_PER_IMAGE * plan.num_planned:
        logger.info("%d images are too few to look for equal bytes among %d rows", plan.num_planned, num_rows)
        return None
    known = catalog.known_bytes(prepared.plan_request(), plan.sizes())
    return None if known is None else Stored(known)
