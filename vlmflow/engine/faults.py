"""Errors of workers as the driver raises them: our own classes as they were, Ray's in our words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError
from ray.util import get_node_ip_address

from vlmflow import errors
from vlmflow.engine.head import check_head
from vlmflow.errors import ClusterError, FamilyError, ModelMemoryError, ModelsKilledError, StoreLostError, VlmflowError

_OURS = re.compile(r"(?:vlmflow\.errors\.)(\w+): (.+)")
_MAX_REASON_CHARS = 400
_TICK_S = 1.0
# Of errors that workers raise in constructors, in the place of their own.
_REMEDIES: dict[type[VlmflowError], str] = {
    ModelsKilledError: "Most often the memory does not suffice for all models at once, as the kernel's log tells: set "
    "pools with fewer max_actors or tasks, or take smaller models. It may be a driver or library that crashes, too.",
    ModelMemoryError: ModelMemoryError.REMEDY,
    FamilyError: "Workers import the module as the command did: install it on every node, in one version. What it or "
    "its class raises is to be mended there.",
}
# What one node may lack and others have. Other errors are those of the job, wherever they are found.
_OF_NODES = (
    *(errors.CatalogError, errors.ClusterError, errors.DetectorError, errors.FamilyError),
    *(errors.ModelMemoryError, errors.ModelsKilledError, errors.StorageAccessError, errors.TransientError),
    *(errors.WeightsError, errors.WorkspaceError),
)
_MEMORY_OF = re.compile(r"Memory on the node \(IP: ([^,]+), .*?\) was ([\d.]+GB used / [\d.]+GB)")
_NODE = re.compile(r"\bip=([0-9A-Fa-f.:]+)")
_REMEDY = "`vlmflow doctor` and `vlmflow profiles` tell more."


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tells in our words of whatever Ray raises in the block; an error of ours that ended a task is raised as it was.

    What the handler of a signal raises, such as the end of a flow run by force, is raised as it was, too: of that Ray's
    C code passes on Ctrl-C and an exit, and calls the rest an error of its own.

    Raises:
        ClusterError: it is another.
    """
    try:
        yield
    except SystemError as error:
        raise (error.__cause__ or error) from None
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, VlmflowError):
            if isinstance(error.cause, _OF_NODES):
                error.cause.args = (of_node(str(error.cause), _node_of(error)),)
            raise error.cause from None
        raise in_our_words(error) from error


@told()
def get(ref: Any) -> Any:
    """Fetches a result; an error of ours that ended its task is raised as it was, with its remedy.

    Raises:
        ClusterError: the task failed in any other way.
    """
    wait_for_one([ref])
    return ray.get(ref)


@told()
def wait_for_one(refs: list[Any]) -> tuple[list[Any], list[Any]]:
    """Waits for the first result; returns its reference, and the others.

    Raises:
        ClusterError: the head of the cluster is gone: Ray would wait until it ends this process.
    """
    while True:
        done, others = ray.wait(refs, num_returns=1, timeout=_TICK_S)
        if done:
            return done, others
        check_head()


def in_our_words(error: RayError) -> VlmflowError:
    """What a user is told of an actor that could not start, of a cluster that went away, or of a disk that is full.

    Of an actor that failed in its constructor Ray keeps the traceback alone, as text; an error of ours at its end is
    made anew from there.
    """
    if isinstance(error, OutOfDiskError | ObjectStoreFullError):
        return ClusterError(
            "Ray has no room left for the images that are between two stages",
            remedy="What was committed stays. Free some of the disk on which Ray has its temporary files, or name "
            "another in RAY_TMPDIR (it is /tmp otherwise), and run the same command again. More of them stay in memory "
            "with a higher ray.object_store_bytes, and fewer are there at once with a lower read_ahead.",
        )
    if isinstance(error, OutOfMemoryError):
        node = _MEMORY_OF.search(str(error))
        return ClusterError(
            f"the memory of {f'node {node[1]}' if node else 'a node'} ran out: Ray killed what the run had there"
            + (f" ({node[2]})" if node else ""),
            remedy="What was committed stays. Give the nodes more memory, or less at once to do: fewer max_actors or "
            "smaller batches in pools, a lower read_ahead, no other work beside it. Then run the same command again.",
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for number, line in reversed(list(enumerate(lines))):
        found = _OURS.search(line)
        error_type = getattr(errors, found[1], None) if found else None
        if found and isinstance(error_type, type) and issubclass(error_type, VlmflowError):
            reason = found[2][:_MAX_REASON_CHARS]
            if issubclass(error_type, _OF_NODES):
                reason = of_node(reason, _node_of(error))
            return error_type(reason, remedy=_REMEDIES.get(error_type) or _remedy_in(lines[number + 1 :]) or _REMEDY)
    reason = of_node(lines[-1][:_MAX_REASON_CHARS] if lines else "no reason given", _node_of(error))
    return ClusterError(
        f"the cluster gave up: {type(error).__name__}: {reason}",
        remedy="What was committed stays. `vlmflow doctor` tests the workers; then run the same command again.",
    )


def _remedy_in(lines: Sequence[str]) -> str | None:
    """What an error says in a note behind it."""
    notes = [line.partition(errors.REMEDY_NOTE)[2] for line in lines if errors.REMEDY_NOTE in line]
    return notes[0][:_MAX_REASON_CHARS] if notes else None


def _node_of(error: RayError) -> str | None:
    """The address of the node that an error comes from, which Ray keeps in its text alone."""
    nodes = _NODE.findall(str(error))
    return nodes[-1] if nodes else None


def of_node(message: str, node: str | None) -> str:
    """A message, with the node that it comes from if that is another than this one.

    Args:
        node: its address; None: not known.
    """
    return message if node in (None, get_node_ip_address()) else f"on node {node}: {message}"


def lost_in_mid_run(error: VlmflowError) -> StoreLostError:
    """What a user is told when a store went away: what stays, and how to go on."""
    if isinstance(error, StoreLostError) and "stays" in error.remedy:
        return error
    remedy = f"{error.remedy} What was committed stays: mend the access and run the same command again to go on."
    return StoreLostError(str(error), remedy=remedy.strip())
