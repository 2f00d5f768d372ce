"""Sets up a pool's actor: the only place of the engine that imports torch."""

from __future__ import annotations

import math

import torch

from vlmflow.config import PoolConfig
from vlmflow.errors import ClusterError, WeightsError
from vlmflow.models import identify
from vlmflow.tasks.setup import TaskSetup


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


def check_weights(pool: PoolConfig, setup: TaskSetup) -> None:
    """Makes sure that this node holds the weights that the run was planned with.

    Raises:
        WeightsError: they are absent here, or others.
    """
    for role in pool.tasks:
        if role not in setup.models:
            continue
        found, planned = identify(role, setup.models[role]).weights_digest, setup.identities[role].weights_digest
        if found != planned:
            raise WeightsError(
                f"weights of {role} on this node have the digest {found[:12]}, the run was planned with {planned[:12]}",
                remedy="Put the same weights on every node.",
            )
