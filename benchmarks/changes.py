"""What a constant of the code is worth: runs with other values of it, in this process and in Ray's workers."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ray

_CHANGE = "VLMFLOW_BENCHMARK_CHANGE"
_ROOT = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Change:
    """``package.module:NAME=VALUE``, or ``package.module:function`` that each process calls before all else.

    Attributes:
        text: as it was given.
        owner, name: what has the constant, a module or a class in it.
        value: None: it is a function to call.
    """

    text: str
    owner: object
    name: str
    value: object = None

    @classmethod
    def parse(cls, text: str) -> Change:
        """The change that a text names.

        Raises:
            argparse.ArgumentTypeError: it has another form, there is no such name, or the value is of another type than
                the one now.
        """
        named, _, value = text.partition("=")
        module, _, path = named.partition(":")
        *owners, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for one in owners:
                owner = getattr(owner, one)
            now = getattr(owner, name)
            new = ast.literal_eval(value) if value else None
        except (ImportError, AttributeError, ValueError, SyntaxError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r}: not package.module:NAME=VALUE of a constant ({error})"
            ) from error
        if callable(now) != (new is None) or (new is not None and type(new) is not type(now)):
            raise argparse.ArgumentTypeError(f"{text!r}: {name} is {now!r} now")
        return cls(text, owner, name, new)


@contextlib.contextmanager
def made(change: Change) -> Iterator[None]:
    """Makes the change here and in the workers of clusters that this process starts meanwhile.

    Such workers start more slowly than others; a run to compare with is one with the change :func:`nothing`.

    Raises:
        RuntimeError: a cluster is running already, whose workers would be without the change.
    """
    if ray.is_initialized():
        raise RuntimeError("this process has a cluster of Ray already, whose workers would not make the change")
    path = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])  # workers have the driver's later
    env = {_CHANGE: change.text, "PYTHONPATH": path}
    runtime_env = {"worker_process_setup_hook": f"{__name__}.change_worker", "env_vars": env}
    with contextlib.ExitStack() as undo:
        if change.value is not None:
            undo.enter_context(mock.patch.object(change.owner, change.name, change.value))
        undo.enter_context(mock.patch.object(ray, "init", partial(ray.init, runtime_env=runtime_env)))
        yield


def change_worker() -> None:
    """Makes the change in a worker of Ray, before it gets anything to do."""
    change = Change.parse(os.environ[_CHANGE])
    if change.value is None:
        getattr(change.owner, change.name)()
    else:
        setattr(change.owner, change.name, change.value)


def nothing() -> None:
    """Changes nothing."""
