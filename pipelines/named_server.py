"""The Prefect server that ``PREFECT_API_URL`` names, asked before a flow begins: in words, and within a minute.

Prefect's clients try for minutes where a server answers 503, longer where one takes a connection and says nothing, and
repeat the password of an address in what they raise.
"""

from __future__ import annotations

import time

import httpx
from packaging.version import InvalidVersion, Version
from prefect import __version__ as own_version
from prefect.client.base import ServerType
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from pipelines.ray_jobs import without_user
from vlmflow.errors import FlowServerError

_PATIENCE_S = 60.0  # for a server that is just being started behind a proxy, which answers 503
_ANSWER_S = 10.0
_OLDEST = Version("3.8")  # one of 3.4 refuses tags of tasks (405) and deployments (422)


def check_named_server(url: str) -> None:
    """Makes sure that a Prefect server answers whose version fits; Prefect's cloud is not asked.

    Args:
        url: as in ``PREFECT_API_URL``.

    Raises:
        FlowServerError: none does.
    """
    name = without_user(url)
    if not url.startswith(("http://", "https://")):
        raise FlowServerError(f"PREFECT_API_URL: {name} is no address", remedy=_AS_URL)
    until = time.monotonic() + _PATIENCE_S
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _ANSWER_S}):
        while True:  # the client itself waits a little after a 503
            try:
                found = _version()
            except PrefectHTTPStatusError as error:
                status = error.response.status_code
                if status < httpx.codes.INTERNAL_SERVER_ERROR or time.monotonic() > until:
                    remedy = _CREDENTIALS if status in (401, 403) else _SERVER
                    raise FlowServerError(f"the Prefect server at {name} answers {status}", remedy=remedy) from None
            except httpx.TimeoutException:
                if time.monotonic() > until:
                    what = f"the Prefect server at {name} does not answer in time"
                    raise FlowServerError(what, remedy=_SERVER) from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                what = f"the Prefect server at {name} cannot be reached ({type(error).__name__})"
                raise FlowServerError(what, remedy=_SERVER) from None
            except (ValueError, TypeError):
                what = f"what answers at {name} is no Prefect server: it gives no version"
                raise FlowServerError(what, remedy=_AS_URL) from None
            else:
                break
    own = Version(own_version)
    if found is not None and (found.major != own.major or found < _OLDEST):
        raise FlowServerError(
            f"the Prefect server at {name} is of version {found}, too far from {own}, which is installed here",
            remedy=f"Start a server of version {own}, or of a later one below {own.major + 1}.",
        )


def _version() -> Version | None:
    """Of the server; None: it is Prefect's cloud, which has none.

    Raises:
        httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError: it does not say.
    """
    with get_client(sync_client=True) as client:
        if client.server_type == ServerType.CLOUD:
            return None
        try:
            return Version(client.api_version())
        except InvalidVersion as error:
            raise ValueError from error


_AS_URL = "Give the address of a server with its /api, such as http://127.0.0.1:4200/api; or unset the variable."
_SERVER = (
    "Check PREFECT_API_URL (http://127.0.0.1:4200/api, say), that the server runs, and the network; or unset the "
    "variable: then the flow has a server of its own."
)
_CREDENTIALS = "Set PREFECT_API_AUTH_STRING to the user:password of the server, or PREFECT_API_KEY to a key for it."
