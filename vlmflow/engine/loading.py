"""Sets up a pool's actor: the only place of the engine that imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import sys
from dataclasses import dataclass

import torch

from vlmflow.config import Dtype, PoolConfig
from vlmflow.errors import ClusterError, FamilyError, WeightsError
from vlmflow.families import is_own
from vlmflow.models import ModelIdentity, identify
from vlmflow.models.detectors import identify_detector
from vlmflow.models.pixels import model_dtype
from vlmflow.tasks.setup import TaskSetup

logger = logging.getLogger("vlmflow")

# What torch may take of an actor's share of a GPU: the rest is for the context, nvJPEG, and what libraries hold.
_OF_ITS_SHARE = 0.9
# Bytes of GPU memory with which an actor does whole batches: those of 40 GB have them. With half of it, half batches.
_FOR_WHOLE_BATCHES = 38e9
_MAX_HALVINGS = 4
# Then: two are in tasks, of which both may be captions, and one is fed.
_FEW_CALLS = 3
# So long a thread that wants the interpreter waits for one that computes; 5 ms unless told otherwise. A thread that
# launches kernels wants it at each of them, while others read and finish batches: `benchmarks.interpreter_lock`.
_SWITCH_INTERVAL_S = 0.0002
# How threads wait for the device: CU_CTX_SCHED_BLOCKING_SYNC. CUDA's own choice is to ask again and again: each of an
# actor's threads takes a core then, and where decoding wants it too, the scheduler lets a thread wait that has just
# asked so often, also before it launches the next kernels: `benchmarks.crowded_cores`.
_WAITS = 4


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
    _choose_how_to_wait()
    if pool.gpus < 1:
        # torch gives nothing back by itself: the first actor on a GPU would take what the others are to have.
        torch.cuda.set_per_process_memory_fraction(_OF_ITS_SHARE * pool.gpus)
    allow_tf32(model_dtype("cuda", dtype) != torch.float32)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return "cuda"


def _choose_how_to_wait() -> None:
    """Has threads that wait for the device sleep until it wakes them, where CUDA's driver can.

    To be called before there is a context on the device (CUDA driver API, cuDevicePrimaryCtxSetFlags).
    """
    with contextlib.suppress(OSError, AttributeError):  # of a driver that is another, or none
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDevicePrimaryCtxSetFlags_v2(0, _WAITS)


@dataclass(frozen=True)
class Room:
    """What there is room for at once.

    Attributes:
        rows: images of a batch in a task; None: all.
        calls: batches of an actor; None: as many as it is given.
    """

    rows: int | None = None
    calls: int | None = None


def room_for(pool: PoolConfig, dtype: Dtype = "auto") -> Room:
    """What an actor's share of its GPU's memory has room for, of batches whose size nobody chose for this GPU.

    Five batches of 256 take some 22 GB in half precision, by reckoning, and models come on top. With less, torch would
    free memory and ask for it anew in every task, which is slow and no error: nothing would make batches smaller.
    """
    if pool.gpus == 0:
        return Room()
    free, total = torch.cuda.mem_get_info()
    share = min(free, min(1.0, pool.gpus) * total)
    room = share / 2 if model_dtype("cuda", dtype) == torch.float32 else share
    halvings = sum(room < _FOR_WHOLE_BATCHES / 2**number for number in range(_MAX_HALVINGS))
    if halvings == 0:
        return Room()
    rows = max(1, pool.batch_size >> halvings)
    logger.info("%.0f GB of GPU memory: %d images at once, of %d batches", share / 1e9, rows, _FEW_CALLS)
    return Room(rows, _FEW_CALLS)


def allow_tf32(allowed: bool) -> None:
    """Whether products and convolutions of float32 may be done in TF32 on CUDA; torch's default allows the latter."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def wait_for_device(device: str) -> None:
    """Waits until all work that was queued on the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def check_weights(pool: PoolConfig, setup: TaskSetup) -> None:
    """Makes sure that this node holds the weights that the run was planned with, and the code that its rows will name.

    To be called before they are loaded, and after: somebody may copy others over them meanwhile.

    Raises:
        WeightsError: they are absent here, or others.
        ClusterError: it is another.
        FamilyError: that of one's own family is another, or is not here.
    """
    for role in pool.tasks:
        if role not in setup.models:
            continue
        found, planned = identify(role, setup.models[role]), setup.identities[role]
        _check_digest(role, found, planned)
        family = setup.models[role].family
        if found != planned and is_own(family):
            raise FamilyError(
                f"family {family} on this node would run its model in another way than the run was planned with: code "
                f"version {found.code_version}, planned {planned.code_version}",
                remedy="Install its module in one version on every node.",
            )
        if found != planned:
            raise ClusterError(
                f"vlmflow on this node would run the model of {role} in another way than the run was planned with",
                remedy="Install vlmflow in one version on every node; `vlmflow doctor` names those that have another.",
            )
    for detector in setup.detectors if "detect" in pool.tasks else ():
        _check_digest(f"detector {detector.name}", identify_detector(detector.config), detector.identity)


def _check_digest(what: str, found: ModelIdentity, planned: ModelIdentity) -> None:
    if found.weights_digest != planned.weights_digest:
        raise WeightsError(
            f"weights of {what} on this node have the digest {found.weights_digest[:12]}, the run was planned with "
            f"{planned.weights_digest[:12]}",
            remedy="Put the same weights on every node, and leave them alone while a run goes on.",
        )
