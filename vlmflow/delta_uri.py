"""Addresses of Delta tables, as deltalake takes them."""

from __future__ import annotations

import re

from vlmflow.errors import ConfigError
from vlmflow.storage import Address

_ESCAPE = re.compile("%[0-9A-Fa-f]{2}")


def delta_uri(folder: Address, table: str = "") -> str:
    """The uri of a table in a folder, or of the folder that is one.

    Raises:
        ConfigError: deltalake cannot open a table there.
    """
    if escape := _ESCAPE.search(folder.path):
        # However it is written: deltalake decodes once what it makes a table with, and twice to read it.
        raise ConfigError(
            f"{folder}: Delta tables cannot lie in a folder with {escape[0]} in its name",
            remedy="Name a folder without a percent sign, or rename this one.",
        )
    if not folder.is_local:  # a uri there, of whose path no more than these two is taken for something else
        folder = folder._replace(path=folder.path.replace("#", "%23").replace("?", "%3F"))
    return folder.child(table) if table else str(folder)
