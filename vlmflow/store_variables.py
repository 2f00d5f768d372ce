"""Variables of the environment by which object stores are reached, checked before a client takes them."""

from __future__ import annotations

import os
import re

from vlmflow.config_parts import plain_url
from vlmflow.errors import ConfigError

_OF_SEVERAL_LINES = {"GOOGLE_SERVICE_ACCOUNT_KEY"}  # JSON
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENDPOINTS = re.compile(r"(?:AWS_ENDPOINT(?:_URL(?:_S3)?)?|GOOGLE_BASE_URL|AZURE_(?:STORAGE_)?ENDPOINT)")
_IN_HEADERS = re.compile(r"(?:KEY_ID|TOKEN|REGION|NAME)$")  # paths may hold more than ASCII


def check_variables(provider: str, root: str, *, names_endpoint: bool) -> None:
    """Refuses a variable that no request can carry, such as a key that was read from a file with its end of line.

    obstore would panic when it makes one.

    Args:
        provider: ``aws``, ``google`` or ``azure``; variables of others are left alone.
        root: of the store, for errors.
        names_endpoint: the environment does, as the job names none.

    Raises:
        ConfigError: names the variable; keys are not repeated.
    """
    prefix = f"{provider.upper()}_"
    for name, value in os.environ.items():
        if not name.startswith(prefix) or name in _OF_SEVERAL_LINES:
            continue
        if _CONTROL.search(value) or (_IN_HEADERS.search(name) and not value.isascii()):
            raise ConfigError(
                f"{root} cannot be opened: {name} holds a line break or another character that no key has",
                remedy="Set it again without: `printf %s` adds no line break where `echo` does.",
            )
        if names_endpoint and _ENDPOINTS.fullmatch(name):
            try:
                plain_url(value)
            except ValueError as error:
                raise ConfigError(
                    f"{root} cannot be opened: {name} {error if value else 'is empty'}",
                    remedy="Set it to an url such as http://127.0.0.1:9000, or unset it.",
                ) from None
