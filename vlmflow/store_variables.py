"""Variables of the environment by which object stores are reached, checked before a client takes them."""

from __future__ import annotations

import os
import re

from vlmflow.config_parts import plain_url
from vlmflow.errors import ConfigError

# What a request carries. Other names are those of other programs, such as AZURE_CREDENTIALS, which is JSON.
_SENT = {
    "aws": r"AWS_(?:ACCESS_KEY_ID|SECRET_ACCESS_KEY|(?:SESSION_)?TOKEN|(?:DEFAULT_)?REGION"
    r"|ENDPOINT(?:_URL(?:_S3|_STS)?)?|METADATA_ENDPOINT|CONTAINER_CREDENTIALS_(?:RELATIVE|FULL)_URI"
    r"|ROLE_(?:ARN|SESSION_NAME)|SSE_\w+|USER_AGENT)",
    "google": r"GOOGLE_(?:BASE_URL|BEARER_TOKEN|USER_AGENT)|GCE_METADATA_(?:HOST|IP)",
    "azure": r"AZURE_(?:STORAGE_)?(?:ACCOUNT_NAME|ACCOUNT_KEY|ACCESS_KEY|MASTER_KEY|SAS_KEY|SAS_TOKEN|TOKEN|ENDPOINT"
    r"|CLIENT_ID|CLIENT_SECRET|TENANT_ID|AUTHORITY_ID|AUTHORITY_HOST)|AZURE_(?:OBJECT_ID|MSI_RESOURCE_ID|USER_AGENT)"
    r"|(?:AZURE_)?(?:IDENTITY|MSI)_ENDPOINT|IDENTITY_HEADER",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENDPOINTS = re.compile(r"(?:AWS_ENDPOINT(?:_URL(?:_S3)?)?|GOOGLE_BASE_URL|AZURE_(?:STORAGE_)?ENDPOINT)")
_IN_HEADERS = re.compile(r"(?:KEY_ID|TOKEN|REGION|NAME|AGENT|IDENTITY_HEADER)$")
# Whoever has one of these asks no other server for credentials.
_KEYS = re.compile(
    r"AWS_ACCESS_KEY_ID|GOOGLE_(?:BEARER_TOKEN|APPLICATION_CREDENTIALS|SERVICE_ACCOUNT(?:_PATH|_KEY)?)"
    r"|AZURE_STORAGE_(?:(?:ACCOUNT|ACCESS|MASTER|SAS)_KEY|(?:SAS_)?TOKEN)"
)
# Of the servers that hand out credentials, whole or in part, and what stands before it in the url.
_OF_CREDENTIALS = {
    r"AWS_ENDPOINT_URL_STS|AWS_METADATA_ENDPOINT": "",
    r"AZURE_(?:STORAGE_)?AUTHORITY_HOST|(?:AZURE_)?(?:IDENTITY|MSI)_ENDPOINT": "",
    r"GCE_METADATA_(?:HOST|IP)": "http://",
    r"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "http://169.254.170.2",
    r"AZURE_(?:STORAGE_)?(?:TENANT|AUTHORITY)_ID": "https://login.microsoftonline.com/",
}


def check_variables(provider: str, root: str, *, names_endpoint: bool, signs: bool) -> None:
    """Refuses a variable that no request can carry, such as a key that was read from a file with its end of line.

    obstore would panic when it makes one.

    Args:
        provider: ``aws``, ``google`` or ``azure``; variables of others are left alone.
        root: of the store, for errors.
        names_endpoint: the environment does, as the job names none.
        signs: requests need credentials.

    Raises:
        ConfigError: names the variable; values are not repeated.
    """
    given = {name: value for name, value in os.environ.items() if re.fullmatch(_SENT[provider], name)}
    asks = signs and not any(value and _KEYS.fullmatch(name) for name, value in _of_provider(provider).items())
    for name, value in given.items():
        if _CONTROL.search(value) or (_IN_HEADERS.search(name) and not value.isascii()):
            raise ConfigError(
                f"{root} cannot be opened: {name} holds a line break or another character that no key has",
                remedy="Set it again without: `printf %s` adds no line break where `echo` does.",
            )
        if names_endpoint and _ENDPOINTS.fullmatch(name):
            _check_url(root, name, value, value)
        before = next((start for names, start in _OF_CREDENTIALS.items() if re.fullmatch(names, name)), None)
        if asks and before is not None:
            _check_url(root, name, value, before + value.partition("?")[0])


def _of_provider(provider: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(f"{provider.upper()}_")}


def _check_url(root: str, name: str, value: str, url: str) -> None:
    is_whole = url.startswith(value)
    try:
        plain_url(url)
    except ValueError as error:
        what = (error if is_whole else "cannot be part of an url") if value else "is empty"
        wanted = "Set it to an url such as http://127.0.0.1:9000" if is_whole else "Set it again"
        raise ConfigError(f"{root} cannot be opened: {name} {what}", remedy=f"{wanted}, or unset it.") from None
