"""The command line as a terminal meets it, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmflow.cli import main


def run(*arguments: str | Path) -> int:
    """Runs a command, which always ends by exiting; gives its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)
