"""Sets up a pool's actor: the only place of the engine that imports torch."""

from __future__ import annotations

import math

import torch

from vlmflow.config import Dtype, PoolConfig
from vlmflow.errors import ClusterError, WeightsError
from vlmflow.models import identify
from vlmflow.models.pixels import model_dtype
from vlmflow.tasks.setup import TaskSetup

# What torch may take of an actor's share of a GPU: the context, nvJPEG and what libraries hold by themselves is the rest.
_OF_ITS_SHARE = 0.9


def set_up_torch(pool: PoolConfig, dtype: Dtype = "auto") -> str:
    """Chooses the device that the pool asked for, and as many threads as it reserved, so that actors do not fight.

    What is left in float32 where models run in bfloat16, such as texts that are matched, is multiplied in TF32 on CUDA:
    ten bits of mantissa, where bfloat16 has seven. With float32 asked for, nothing is.

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
    if pool.gpus < 1:
        # torch gives nothing back by itself: the first actor on a GPU would take what the others are to have.
        torch.cuda.set_per_process_memory_fraction(_OF_ITS_SHARE * pool.gpus)
    allow_tf32(model_dtype("cuda", dtype) != torch.float32)
    return "cuda"


def allow_tf32(allowed: bool) -> None:
    """Whether products and convolutions of float32 may be done in TF32 on CUDA; torch's default allows the latter."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def wait_for_device(device: str) -> None:
    """Waits until all work that was queued on the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


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
