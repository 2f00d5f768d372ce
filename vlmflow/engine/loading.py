"""Builds a pool's tasks inside its actor: the only place of the engine that loads torch and weights."""

from __future__ import annotations

import math

import torch

from vlmflow.config import PoolConfig
from vlmflow.engine.pools import Models
from vlmflow.errors import ClusterError, WeightsError
from vlmflow.models import identify, load_captioner, load_embedder, load_matcher
from vlmflow.moderation.decide import Moderator
from vlmflow.tasks import Task
from vlmflow.tasks.caption import CaptionTask
from vlmflow.tasks.embed import EmbedTask
from vlmflow.tasks.match import MatchTask
from vlmflow.tasks.moderate import ModerateTask


def set_up_torch(pool: PoolConfig) -> str:
    """Chooses the device that the pool asked for, and as many threads as it reserved, so that actors do not fight.

    Raises:
        ClusterError: the pool asked for a GPU and the node has none that torch can use.
    """
    torch.set_num_threads(max(1, math.floor(pool.cpus)))
    if pool.gpus == 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ClusterError(
            f"pool {'+'.join(pool.tasks)} asks for {pool.gpus:g} GPU, but torch {torch.__version__} finds none",
            remedy="Install a CUDA build of torch on the GPU nodes; `vlmflow doctor` tells what it finds.",
        )
    return "cuda"


def build_task(name: str, models: Models, device: str) -> Task:
    """Loads the task's model and wraps it.

    Raises:
        WeightsError: the weights are absent, do not fit, or are not those that the run was planned with.
    """
    if name == "moderate":
        if models.moderating is None:
            raise AssertionError("moderate without a policy passed the checks of the job")
        moderating = models.moderating
        return ModerateTask(Moderator(moderating.policy, moderating.binding, moderating.prompts))
    config, request = models.configs[name], models.requests[name]
    found = identify(name, config).weights_digest
    if found != models.digests[name]:
        raise WeightsError(
            f"weights of {name} on this node have the digest {found[:12]}, the run was planned with "
            f"{models.digests[name][:12]}",
            remedy="Put the same weights on every node.",
        )
    if name == "embed":
        return EmbedTask(load_embedder(config, device), request)
    if name == "caption":
        return CaptionTask(load_captioner(config, device), request, models.max_caption_tokens)
    return MatchTask(load_matcher(config, device), request)
