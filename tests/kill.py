"""Processes that kill themselves with SIGKILL at a chosen call, or at a random time, while they change a catalog.

``python -m tests.kill POINT NUMBER catalog ROOT ...`` works on a catalog without Ray or models;
``python -m tests.kill POINT NUMBER enrich ARGUMENT...`` is the real command line;
``python -m tests.kill POINT NUMBER backfill ARGUMENT...`` is the flow.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmflow import schema
from vlmflow.catalog import Catalog, CatalogWriter, compact, outdated, vacuum, writer
from vlmflow.catalog import apply as apply_module
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.runs import new_run_id
from vlmflow.config import CatalogConfig, StorageConfig


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(owner: Any, name: str, number: int, *, after: bool) -> None:
    """Dies before or after the call of this number."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count(1)  # of several threads

    def call(*arguments: Any, **named: Any) -> Any:
        is_chosen = next(calls) == number
        if is_chosen and not after:
            die()
        out = original(*arguments, **named)
        if is_chosen and after:
            die()
        return out

    setattr(owner, name, call)


def _half_deleted(number: int) -> None:
    original = Folder.delete_all
    calls: list[int] = []

    def delete_some(self: Folder, paths: list[str]) -> list[str]:
        if len(paths) > 1:
            calls.append(1)
            if len(calls) == number:
                original(self, paths[: len(paths) // 2])
                die()
        return original(self, paths)

    Folder.delete_all = delete_some  # type: ignore[method-assign, assignment]


def _at_random(seed: int) -> None:
    """Dies at some time within the work of about three seconds."""
    timer = threading.Timer(random.Random(seed).uniform(0.02, 2.5), die)
    timer.daemon = True
    timer.start()


POINTS: dict[str, Callable[[int], None]] = {
    "before a file": lambda n: _at(CatalogWriter, "write", n, after=False),
    "between file and commit": lambda n: _at(CatalogWriter, "write", n, after=True),
    "rewriting a live file": lambda n: _at(apply_module, "write_file", n, after=True),
    "in the commit, before it is written": lambda n: _at(commit_module, "_write", n, after=False),
    "in the commit, after it is written": lambda n: _at(commit_module, "_write", n, after=True),
    "between the tables' commits": lambda n: _at(Catalog, "_commit_embeddings", n, after=True),
    "between commits": lambda n: _at(Catalog, "commit", n, after=True),
    "updating columns, before the commit": lambda n: _at(outdated, "write_file", n, after=True),
    "updating columns, after the commit": lambda n: _at(outdated, "commit", n, after=True),
    "in compaction, before its commit": lambda n: _at(compact, "write_joined", n, after=True),
    "in compaction, after its commit": lambda n: _at(compact, "commit", n, after=True),
    "in vacuum, after revoking": lambda n: _at(vacuum, "revoke", n, after=True),
    "in vacuum, half deleted": _half_deleted,
    "at random": _at_random,
}


def work(config: CatalogConfig) -> None:
    """A run of a hundred images, a third of which are new versions, in commits of ten.

    Then the caller's columns of those with nothing due, compaction and vacuum.
    """
    from tests.catalog_samples import constants, finish, references, request

    names = [f"image {number}" for number in range(100)]
    versions = {name: "v2" if number % 3 else "v1" for number, name in enumerate(names)}
    source = [{"price": number} for number in range(100)]
    catalog = Catalog.open_or_create(config, pa.schema([("price", pa.int64())]))
    run_id, asked = new_run_id(), request()
    catalog.runs.start(run_id, {"status": "running"})
    listed = references(names, version=versions, source=source)
    with catalog.runs.keep_alive(run_id), catalog.plan([listed], asked) as plan:
        writing = catalog.writer(constants(run_id, asked), plan.version)
        for planned in plan.batches(10):
            rows = finish(planned, content=f"bytes of {planned['object_version'][0]}", caption="new")
            catalog.commit(run_id, pa.concat_tables([schema.DESCRIPTOR.empty_table(), writing.write(rows)]))
        for _ in catalog.update_columns(run_id, plan):
            continue
        catalog.compact(run_id)
    catalog.runs.finish(run_id, {"status": "done"})
    catalog.vacuum()


def run(point: str, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a child and waits for its end; what it leaves behind ends with it."""
    from tests.processes import started  # here, for the child that is to be without Ray

    command = [sys.executable, "-m", "tests.kill", point, str(number), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        with started(command, out, errors) as child:
            code = child.wait(600)
        return subprocess.CompletedProcess(command, code, out.read_text(), errors.read_text())


def main() -> None:
    point, number, mode, *rest = sys.argv[1:]
    if mode == "catalog":
        uri, endpoint = rest[0], rest[1] if len(rest) > 1 else None
        storage = StorageConfig(endpoint=endpoint, region="us-east-1" if endpoint else None)
        POINTS[point](int(number))
        work(CatalogConfig(uri=uri, storage=storage))
    elif mode == "backfill":
        from pipelines.backfill import moderation_backfill
        from pipelines.command_line import main as flow

        POINTS[point](int(number))
        flow(moderation_backfill, rest)
    else:
        from vlmflow.cli import main as command_line

        POINTS[point](int(number))
        command_line([mode, *rest])


assert writer.write_file is apply_module.write_file  # wrapped where it is used, not where it is defined

if __name__ == "__main__":
    main()
