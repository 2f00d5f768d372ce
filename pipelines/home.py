"""Prefect's folder, where the home folder is none: Prefect is not even imported without one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

_HOME, _PROFILES = "PREFECT_HOME", "PREFECT_PROFILES_PATH"


def settle_home() -> None:
    """Sets ``PREFECT_HOME`` to a folder within the temporary one where ``~/.prefect`` cannot be written to.

    So it is in a container whose user is an arbitrary number, as OpenShift's are (``HOME`` is ``/`` or not set), or
    whose root file system is read-only. Profiles that are there are still read. What the caller has set stays.
    """
    try:
        usual = Path.home() / ".prefect"
    except RuntimeError:  # no such user, and no HOME
        os.environ["HOME"] = "/"  # as container runtimes set it then
        usual = Path("/.prefect")
    if os.environ.get(_HOME) or is_usable(usual):
        return
    with contextlib.suppress(OSError):  # else it stays the usual one, and who needs it says what is wrong
        ours = Path(tempfile.gettempdir()) / f"vlmflow-prefect-{os.geteuid()}"
        ours.mkdir(mode=0o700, exist_ok=True)
        if ours.is_symlink() or ours.stat().st_uid != os.geteuid():  # another user's, who would read the flows' records
            return
        os.environ[_HOME] = str(ours)
        if (profiles := usual / "profiles.toml").is_file():
            os.environ.setdefault(_PROFILES, str(profiles))


def is_usable(folder: Path) -> bool:
    """Whether files can be put into a folder, which is made if it is absent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
