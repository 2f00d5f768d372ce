"""What lies at a path. The methods of :class:`pathlib.Path` tell no absent file from one that cannot be looked at.

Since Python 3.14 they do not, that is: a folder of another user, a name that is too long, a disk out of reach would all
be told of as absent, and defaults be taken in place of what a file says.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP}


def is_there(path: Path) -> bool:
    """Whether anything is, where links lead; as all of these it raises OSError where that cannot be told."""
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether it is a regular file, where links lead."""
    return stat.S_ISREG(_mode(path) or 0)


def is_folder(path: Path) -> bool:
    """Whether it is a folder, where links lead."""
    return stat.S_ISDIR(_mode(path) or 0)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    except ValueError:  # no path at all: it holds a null character
        return None
