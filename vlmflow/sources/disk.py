"""Whether the disk that a source lies on is still there: a file that fails is a row, a disk that fails the run."""

from __future__ import annotations

import os
from pathlib import Path

from vlmflow.errors import StoreLostError


def check_folder(folder: Path, *, is_listed: bool) -> None:
    """Makes sure that the source's folder is there.

    Args:
        is_listed: its images were found by listing it. What is unmounted leaves a folder without anything in it.

    Raises:
        StoreLostError: it is gone, empty, or cannot be read.
    """
    try:
        if not is_listed:
            folder.stat()
        elif _is_empty(folder):
            raise _lost(f"{folder} is empty: unmounted?")
    except FileNotFoundError as error:
        raise _lost(f"{folder} is gone") from error
    except OSError as error:
        raise _lost(f"{folder} cannot be read: {error.strerror}") from error


def check_file(path: Path) -> None:
    """Makes sure that a disk still gives a file that it has given before. One that was deleted since says nothing.

    Raises:
        StoreLostError: the file cannot be read, or where it lay is an empty mount point.
    """
    try:
        with path.open("rb") as file:
            file.read(1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if _is_below_nothing(path):
            raise _lost(f"{path}, which was read before, is gone with all that was beside it") from error
    except OSError as error:
        raise _lost(f"{path} was read before and cannot be now: {error.strerror}") from error


def _is_below_nothing(path: Path) -> bool:
    """Whether of the folders that lead to a file the last one that is there is empty, as a mount point is."""
    try:
        return _is_empty(next(folder for folder in path.parents if folder.exists()))
    except PermissionError:  # one may pass through it and not list it
        return False
    except OSError:
        return True


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def _lost(what: str) -> StoreLostError:
    return StoreLostError(what, remedy="Mount or restore it, and run again: what was committed stays.")
