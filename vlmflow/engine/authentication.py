"""The token of an embedded Ray, where the home folder cannot keep it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from vlmflow.paths import is_there

_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_BYTES = 32  # as many as Ray's own has


def ensure_token() -> None:
    """Sets ``RAY_AUTH_TOKEN`` to a new secret if Ray would find no token and could make none.

    Ray writes one to ``~/.ray/auth_token`` and does not start otherwise. A container has no such place whose user is an
    arbitrary number, as OpenShift's are (``HOME`` is ``/`` or not set), or whose root file system is read-only.
    """
    if os.environ.get(_TOKEN) or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    with contextlib.suppress(OSError, RuntimeError):  # the latter: there is no home folder
        file = Path.home() / ".ray" / "auth_token"
        if os.access(file, os.R_OK):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        if not is_there(file) and os.access(file.parent, os.W_OK):
            return
    os.environ[_TOKEN] = secrets.token_hex(_TOKEN_BYTES)
