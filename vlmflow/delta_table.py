"""Delta tables as deltalake takes them: their addresses, and the settings of their stores."""

from __future__ import annotations

import re

from vlmflow.config import StorageConfig
from vlmflow.errors import ConfigError
from vlmflow.storage import MAX_BACKOFF, Address, parse_address, provider_of

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


def delta_storage_options(config: StorageConfig, uri: str) -> dict[str, str]:
    """The same settings in the words of deltalake; empty for the local disk."""
    address = parse_address(uri)
    if address.is_local:
        return {}
    options = {
        "timeout": f"{config.timeout_s:g}s",
        "allow_http": "true",
        "max_retries": str(config.max_retries),
        "backoff_config.max_backoff": f"{MAX_BACKOFF.total_seconds():g}s",
    }
    prefix = provider_of(address)
    if config.endpoint is not None:
        options["google_base_url" if prefix == "google" else f"{prefix}_endpoint"] = config.endpoint
    if config.region is not None and prefix == "aws":
        options["aws_region"] = config.region
    if config.anonymous:
        options[f"{prefix}_skip_signature"] = "true"
    return options
