"""Files on this machine that a user names, written in one step: a full disk or a kill leaves what was there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlmflow.errors import VlmflowError
from vlmflow.paths import is_file, is_there

_LEFT_AFTER_S = 3600.0  # nobody is so long over a piece of a file


@contextlib.contextmanager
def locked(folder: Path, error: VlmflowError) -> Iterator[None]:
    """Keeps other processes from working in a folder while the block runs; where a file system has no locks, nobody.

    Args:
        error: is raised where another process works there.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when a process is killed
            except BlockingIOError as held:
                raise error from held
        yield
    finally:
        os.close(lock)


def put_file(path: Path, data: str | bytes | Iterable[str]) -> None:
    """Writes a file anew: beside the old one, whose place and mode it takes. A symbolic link stays one.

    What a kill leaves of it is removed by who writes the file an hour later or more.

    A device or a pipe, a file in a folder that may not be written to, and one that is mounted by itself are written in
    place: nothing can take theirs.

    Args:
        data: texts become UTF-8, with the ends of lines that they have.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if is_there(path) and not is_file(path):
        _write(path, "wb", data)
        return
    beginning = f".{path.name[:64]}."
    for left in path.parent.glob(f"{glob.escape(beginning)}{'[0-9a-f]' * 8}.part"):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            if time.time() - left.stat().st_mtime > _LEFT_AFTER_S:
                left.unlink()
    part = path.with_name(f"{beginning}{secrets.token_hex(4)}.part")
    try:
        try:
            _write(part, "xb", data)
        except PermissionError:
            _write(path, "wb", data)
            return
        if is_there(path):
            part.chmod(path.stat().st_mode & 0o7777)
        try:
            part.replace(path)
        except OSError as error:
            if error.errno != errno.EBUSY:  # of a file that is mounted by itself
                raise
            _write(path, "wb", part.read_bytes())
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _write(path: Path, mode: str, data: str | bytes | Iterable[str]) -> None:
    pieces = [data] if isinstance(data, str | bytes) else data
    with path.open(mode) as sink:
        for piece in pieces:
            sink.write(piece.encode("utf-8") if isinstance(piece, str) else piece)
        sink.flush()
        if is_file(path):
            os.fsync(sink.fileno())  # some disks say only now that they are full
