"""Folders on the local disk for what is put aside: each is its process's, and goes with it or is swept up after it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from vlmflow.errors import WorkspaceError
from vlmflow.paths import is_there
from vlmflow.storage import MORE_OPEN_FILES

_PREFIX = "vlmflow-workspace-"


class Workspace:
    """A folder that is removed when it is closed; one whose process was killed, when another is made on this machine.

    Its owner holds a lock on it, which the kernel lets go of when the process ends, however it does: so neither a
    number of a process that another has now, nor another container on the same disk, can mislead who sweeps up.

    Raises:
        WorkspaceError: it cannot be made.
    """

    def __init__(self) -> None:
        with in_our_words():
            parent = Path(tempfile.gettempdir())
            _sweep(parent)
            self.path, self._lock = _locked_folder(parent)

    def close(self) -> None:
        """Removes the folder. To close it again does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Says what is wrong with the temporary folder where it cannot be written to.

    Raises:
        WorkspaceError: as the system says.
    """
    try:
        yield
    except OSError as error:
        place = tempfile.tempdir or "(none)"
        is_full_of_files = error.errno in (errno.EMFILE, errno.ENFILE)
        raise WorkspaceError(
            f"the temporary folder {place} cannot be used: {' '.join(str(error).split())}",
            remedy=MORE_OPEN_FILES
            if is_full_of_files
            else "Free some space there, or set TMPDIR to a folder with more.",
        ) from error


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # whoever sweeps was first
            continue
        with contextlib.suppress(OSError):  # a file system without locks: nobody can have it, nobody sweeps it up
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_there(path):
            return path, lock
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Removes the folders of this user whose owners are gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # just removed, or somebody else's
            if path.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
