"""Whether the disk that a source lies on is still there: a file that fails is a row, a disk that fails the run.

What is unmounted leaves an empty folder or none, and so do files that are moved away or deleted. The number of the
device tells these apart: below a mount point that is empty another disk is found. Numbers mean nothing to a process
that has not seen the disk before; paths do, so planning notes where the disk is mounted.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlmflow.errors import StoreLostError
from vlmflow.paths import is_folder
from vlmflow.storage import Address

_SEEN_FOR_S = 1.0  # a file is as good as the next one, and to remember it asks the disk for every folder on the way


class Home(NamedTuple):
    """The folder that holds a source.

    Attributes:
        mount: where the disk of the source is mounted on the machine that planned; None: it is that of ``/``, or none.
    """

    uri: str
    mount: Path | None = None


def home_of(folder: Address, source: Address) -> Home:
    """To be called before the source is listed, which tells then whether its disk was there.

    Args:
        source: the folder itself, or what it holds.
    """
    return Home(str(folder), _mount_of(Path(source.path)) if source.is_local else None)


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


def check_folder(folder: Path, mount: Path | None, *, is_listed: bool) -> None:
    """Makes sure that the source's folder is there.

    Args:
        mount: as of its :class:`Home`.
        is_listed: its images were found by listing it. If not, it may be that of a manifest, and of no image.

    Raises:
        StoreLostError: its disk is another than it was, or cannot be read, or it was listed and is gone.
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
        # What was mounted again, as on demand, may have another number; a file of it shows that, or the mount point.
        if not (_gives_file(folder) if mount is None else _is_mounted(mount, path)):
            raise _lost(f"{folder} is not on the disk that it was on: unmounted?")
        see_folder(folder, anew=True)


def check_files(folder: Path, mount: Path | None, failed: Iterable[Path]) -> None:
    """Makes sure that a disk still gives a file that it has given before. One that was deleted since says nothing.

    Where this process has read none, it makes sure that something is mounted where the files were that failed.

    Args:
        folder: the source's.
        mount: as of its :class:`Home`.

    Raises:
        StoreLostError: the file cannot be read, or where it lay is another disk now; or nothing is mounted.
    """
    if folder not in _FILES:
        if mount is not None:
            _check_mounted(mount, failed)
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


def _check_mounted(mount: Path, failed: Iterable[Path]) -> None:
    """Where files below a mount point failed: whether the disk of one is mounted, though it may lack what it had."""
    # Others say nothing: the images of a manifest may lie where its own disk is not needed.
    below = [path for path in map(Path, map(os.path.realpath, failed)) if path.is_relative_to(mount)]
    if below and not any(_is_mounted(mount, path) for path in below):
        raise _lost(f"nothing is mounted at {mount}, where the disk of the source was")


def _gives_file(folder: Path) -> bool:
    """Whether a file that was read before can be, and is on the disk that the source's folder is on now."""
    seen = _FILES.get(folder)
    if seen is None:
        return False
    try:
        with seen.path.open("rb") as file:
            file.read(1)
        return seen.path.parent.stat().st_dev == folder.stat().st_dev
    except OSError:
        return False


def _is_mounted(mount: Path, path: Path) -> bool:
    """Whether what is on the disk mounted there where planning ran is so here, or on a part of it mounted below.

    Or lies there on a disk mounted elsewhere, as on the server of what others mount: a mount point alone is empty.
    """
    found = _mount_of(path)
    if found is not None and found.is_relative_to(mount):
        return True
    try:
        with os.scandir(mount) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _mount_of(path: Path) -> Path | None:
    """Where the disk is mounted that holds this, or would: the first folder above that is there tells.

    Returns:
        The mount point, without links; None: it is ``/``, or cannot be told.
    """
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        try:
            if not is_folder(folder):
                continue
            with contextlib.suppress(PermissionError), os.scandir(folder):
                pass  # what is mounted on demand is so by that, and not by a look at its number
            return _mount_above(folder)
        except OSError:  # it may not be looked at, or its disk is out of reach
            continue
    return None


def _mount_above(folder: Path) -> Path | None:
    device = folder.stat().st_dev
    while folder != folder.parent:
        if folder.parent.stat().st_dev != device:
            return folder
        folder = folder.parent
    return None


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
