"""Whether the disk that a source lies on is still there: a file that fails is a row, a disk that fails the run.

What is unmounted leaves an empty folder or none, and so do files that are moved away or deleted. The number of the
device tells these apart: below a mount point that is empty another disk is found.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlmflow.errors import StoreLostError

_SEEN_FOR_S = 1.0  # a file is as good as the next one, and to remember it asks the disk for every folder on the way


class _Seen(NamedTuple):
    """Where something was.

    Attributes:
        path: without links: those may lie on another disk than what they lead to.
        device: of its folder, or of itself if it is one: on some overlays files have other numbers. None: not known.
    """

    path: Path
    device: int | None
    at_s: float = 0.0


# What this process has seen, by the source's folder. Ray unpickles a reader for every task, and a worker does many of
# them. Numbers of devices mean nothing to other machines, nor after a restart.
_FOLDERS: dict[Path, _Seen] = {}
_FILES: dict[Path, _Seen] = {}


def see_folder(folder: Path, *, anew: bool) -> None:
    """Remembers on which device the source's folder is.

    Args:
        anew: even if that is known: files were read since, and what is mounted again may have another number.
    """
    if anew or folder not in _FOLDERS:
        with contextlib.suppress(OSError):
            path = Path(os.path.realpath(folder))
            _FOLDERS[folder] = _Seen(path, path.stat().st_dev)


def see_file(path: Path, folder: Path) -> None:
    """Remembers a file of a source, and on which device it is. To be called while it is open, so that it is there.

    Args:
        folder: the source's.
    """
    now, last = time.monotonic(), _FILES.get(folder)
    if last is None or now - last.at_s >= _SEEN_FOR_S:
        with contextlib.suppress(OSError):
            real = Path(os.path.realpath(path))
            _FILES[folder] = _Seen(real, real.parent.stat().st_dev, now)


def check_folder(folder: Path, *, is_listed: bool) -> None:
    """Makes sure that the source's folder is there.

    Args:
        is_listed: its images were found by listing it. If not, it may be that of a manifest, and of no image.

    Raises:
        StoreLostError: it is on another disk than it was, or cannot be read, or was listed and is gone.
    """
    if is_listed:
        try:
            with os.scandir(folder) as entries:
                next(entries, None)
        except FileNotFoundError as error:
            raise _lost(f"{folder} is gone") from error
        except OSError as error:
            raise _lost(f"{folder} cannot be read: {error.strerror}") from error
    path, device, _ = _FOLDERS.get(folder) or _Seen(folder, None)
    if _is_elsewhere((path, *path.parents), device):
        raise _lost(f"{folder} is not on the disk that it was on: unmounted?")


def check_file(folder: Path) -> None:
    """Makes sure that a disk still gives a file that it has given before. One that was deleted since says nothing.

    Args:
        folder: the source's.

    Raises:
        StoreLostError: the file cannot be read, or where it lay is another disk now.
    """
    if folder not in _FILES:
        return
    path, device, _ = _FILES[folder]
    try:
        with path.open("rb") as file:
            file.read(1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if _is_elsewhere(path.parents, device):
            raise _lost(f"{path}, which was read before, is gone, and so is its disk: unmounted?") from error
    except OSError as error:
        raise _lost(f"{path} was read before and cannot be now: {error.strerror}") from error


def _is_elsewhere(folders: Iterable[Path], device: int | None) -> bool:
    """Whether the first of these folders that is there is on another device.

    Raises:
        StoreLostError: it does not say.
    """
    for folder in folders:
        try:
            return device not in (None, folder.stat().st_dev)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _lost(f"{folder} cannot be read: {error.strerror}") from error
    return False


def _lost(what: str) -> StoreLostError:
    return StoreLostError(what, remedy="Mount or restore it, and run again: what was committed stays.")
