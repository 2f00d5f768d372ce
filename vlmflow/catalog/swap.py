"""Rewritten files in place of live ones, row for row."""

from __future__ import annotations

from collections.abc import Sequence

from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.log import DataFile, Snapshot, TableLog


def swap_files(log: TableLog, request: CommitRequest, swaps: Sequence[tuple[DataFile, DataFile]]) -> list[DataFile]:
    """Puts rewritten files of a table in place of live ones, in one commit.

    Args:
        swaps: the live file, and the one with the same images that takes its place; not empty.

    Returns:
        The files that were not live any more: another writer has moved their rows, and what was written for them is
        deleted.

    Raises:
        CommitError, RunRevokedError: as :func:`vlmflow.catalog.commit.commit`.
    """
    late: list[tuple[DataFile, DataFile]] = []

    def propose(snapshot: Snapshot) -> Change:
        late[:] = [swap for swap in swaps if swap[0].path not in snapshot.files]
        fitting = [swap for swap in swaps if swap[0].path in snapshot.files]
        return Change(add=tuple(new for _, new in fitting), remove=tuple(old for old, _ in fitting))

    if not commit(log, request, propose).repeated:
        log.delete_leftovers([f"{log.name}/{new.path}" for _, new in late])
    return [old for old, _ in late]
