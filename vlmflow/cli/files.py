"""Files that commands write beside what they print: looked at before the work, written after it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vlmflow.errors import ConfigError
from vlmflow.files import put_file
from vlmflow.paths import is_folder, is_there
from vlmflow.storage import check_on_disk


def check_outputs(*files: Path | None) -> None:
    """Before the work, which may take hours: whether the files can be written, as far as that can be told.

    Raises:
        ConfigError: one cannot be.
    """
    for file in files:
        if file is None:
            continue
        check_on_disk(file)
        if is_folder(file):
            raise ConfigError(f"{file} is a folder", remedy="Name a file.")
        if not is_folder(file.parent):
            raise ConfigError(f"{file}: no folder {file.parent}", remedy="Make the folder first.")
        if not os.access(file if is_there(file) else file.parent, os.W_OK):
            raise ConfigError(f"{file}: Permission denied", remedy="Name a file that can be written.")


def write_output(file: Path, text: str | Iterable[str]) -> None:
    """Writes a file, in one step.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        put_file(file, text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}", remedy="Name a file that can be written.") from error
