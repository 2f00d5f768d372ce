"""What a run needs to know before it starts: models, fingerprints, policy. Cheap, and nothing is written."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from dataclasses import dataclass

import ray

from vlmflow.catalog import PlanRequest, RunConstants
from vlmflow.config import Job, ModelConfig
from vlmflow.engine.pools import required_roles
from vlmflow.imaging import DECODER_VERSION, PixelRequest
from vlmflow.models import ModelIdentity, identify, pixel_request
from vlmflow.models.profiles import resolve_models
from vlmflow.moderation.policy import Binding, Policy, check_binding, load_policy
from vlmflow.moderation.prompts import PromptVectors, encode_prompts
from vlmflow.moderation.scoring import SCORING_VERSION

# Without --policy: the policy whose thresholds were set for the profile, else the general one.
_DEFAULT_POLICIES = {"starter": "demo"}
_GENERAL_POLICY = "marketplace"


@dataclass(frozen=True)
class Prepared:
    """The resolved job.

    Attributes:
        configs: weights by role (embed, caption, match).
        identities: what those weights are, by role.
        requests: the pixels that each role reads.
        fingerprints: by task; that of moderate leaves the policy out.
        binding: of the policy to the embedder; None: none, and the job accepts that.
    """

    job: Job
    date: dt.date
    configs: dict[str, ModelConfig]
    identities: dict[str, ModelIdentity]
    requests: dict[str, PixelRequest]
    fingerprints: dict[str, str]
    policy: Policy | None
    binding: Binding | None

    def plan_request(self) -> PlanRequest:
        """What planning compares the catalog with."""
        return PlanRequest(
            tasks=self.job.tasks,
            fingerprints=self.fingerprints,
            policy_digest=self.policy.digest if self.policy else None,
            decoder=DECODER_VERSION,
            date=self.date,
            limit=self.job.limit,
        )

    def constants(self, run_id: str) -> RunConstants:
        """What every row of the run says of its provenance."""
        return RunConstants(
            run_id=run_id,
            tasks=self.job.tasks,
            fingerprints=self.fingerprints,
            models=self.model_names(),
            policy_name=self.policy.name if self.policy else None,
            policy_version=self.policy.version if self.policy else None,
            policy_digest=self.policy.digest if self.policy else None,
            decoder=DECODER_VERSION,
        )

    def model_names(self) -> dict[str, str]:
        """``id@revision`` by role."""
        return {role: f"{identity.id}@{identity.revision}" for role, identity in self.identities.items()}


def prepare(job: Job) -> Prepared:
    """Resolves the job's names: profile to weights, policy to a file, both to digests.

    Raises:
        ConfigError: the profile is unknown.
        WeightsError: weights are absent or unsafe to load.
        PolicyError: the policy is absent or cannot be used.
        UnboundPolicyError: the policy has no thresholds for the embedder, and the job does not accept that.
    """
    roles = required_roles(job.tasks)
    configs = {role: config for role, config in resolve_models(job).items() if role in roles}
    identities = {role: identify(role, config) for role, config in configs.items()}
    requests = {
        role: pixel_request(role, config, job.views if role == "embed" else ("squash",))
        for role, config in configs.items()
    }
    policy = binding = None
    if "moderate" in job.tasks:
        policy = load_policy(job.policy or _DEFAULT_POLICIES.get(job.profile, _GENERAL_POLICY))
        binding = check_binding(policy, identities["embed"], accept_unbound=job.accept_unbound)
    return Prepared(
        job=job,
        date=job.date or dt.datetime.now(dt.UTC).date(),
        configs=configs,
        identities=identities,
        requests=requests,
        fingerprints=_fingerprints(job, identities),
        policy=policy,
        binding=binding,
    )


def encode_policy(prepared: Prepared) -> PromptVectors | None:
    """Encodes the policy's prompts once, in a worker and in fp32 on its CPU; None without a policy."""
    if prepared.policy is None:
        return None
    encode = ray.remote(num_cpus=1)(_encode)
    vectors: PromptVectors = ray.get(encode.remote(prepared.policy, prepared.configs["embed"]))
    return vectors


def _encode(policy: Policy, config: ModelConfig) -> PromptVectors:
    from vlmflow.models import load_embedder

    return encode_prompts(policy, load_embedder(config, "cpu"))


def _fingerprints(job: Job, identities: dict[str, ModelIdentity]) -> dict[str, str]:
    """By task: the model's identity and the options that change what it computes. Never batch sizes or devices."""
    parts: dict[str, list[object]] = {}
    if "embed" in identities:
        parts["embed"] = [identities["embed"].fingerprint("embed"), list(job.views)]
        parts["moderate"] = [*parts["embed"], SCORING_VERSION]
    if "caption" in identities:
        parts["caption"] = [identities["caption"].fingerprint("caption"), job.max_caption_tokens]
    if "match" in identities:
        parts["match"] = [identities["match"].fingerprint("match")]
    return {
        task: hashlib.sha256(json.dumps([task, *values]).encode()).hexdigest()[:32]
        for task, values in parts.items()
        if task in job.tasks
    }
