"""One message through a notification block: sent, or failed with a reason in words that hold nothing of its address."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import threading
from typing import Any

import httpx
from prefect.blocks.abstract import NotificationBlock, NotificationError
from prefect.utilities.asyncutils import run_coro_as_sync

from vlmflow.errors import UnsentError
from vlmflow.threads import started

_ANSWER_S = 60.0
# They name the whole address, which is the secret of a webhook, below the level of a warning.
_TALKATIVE = ("apprise", "httpx", "urllib3.connectionpool")
# Of `requests` and of `httpx`, whose texts hold the address.
_CAUSES = (
    (r"certificate.?verify.?failed", "its certificate is not trusted here; a file in REQUESTS_CA_BUNDLE and in "
     "SSL_CERT_FILE says whose are"),
    (r"ProxyError|Unable to connect to proxy", "the proxy of HTTPS_PROXY or HTTP_PROXY does not let it through"),
    (r"NameResolutionError|getaddrinfo|name resolution|Name or service not known|No address associated",
     "there is no host of that name"),
    (r"timed? ?out|Timeout", "no answer came in time"),
    (r"refused", "the connection is refused, by its host or by a proxy"),
    (r"unreachable|no route", "its host is out of reach"),
)  # fmt: skip
_STATUS = re.compile(r"error=(\d{3})\b")
_BUSY = 429


class _Discretion(logging.Filter):
    """Keeps addresses out of logs while a message is sent, and remembers what a messenger has caught."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._num_sending = 0
        self.caught: BaseException | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._num_sending += 1
            self.caught = None

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_sending -= 1

    def filter(self, record: logging.LogRecord) -> bool:
        """Apprise logs a warning in the block that handles the exception."""
        if not self._num_sending:
            return True
        self.caught = sys.exc_info()[1] or self.caught
        return record.levelno >= logging.WARNING


_discretion = _Discretion()
for _name in _TALKATIVE:
    logging.getLogger(_name).addFilter(_discretion)


def post(block: NotificationBlock, subject: str, body: str) -> None:
    """Sends a message.

    Raises:
        UnsentError: the block failed, or no answer came to its end.
    """
    # What is redirected reaches nobody, as at a page to log in, whose 200 would count as sent; and another host.
    for messenger in getattr(block, "_apprise_client", ()):
        messenger.redirects = False

    def send() -> None:
        with _discretion, block.raise_on_failure():  # most blocks would say nothing
            sent: Any = block.notify(body, subject)
            if inspect.iscoroutine(sent):  # within a running event loop
                run_coro_as_sync(sent)

    try:
        started(send).result(_ANSWER_S)  # a block's own limit is for the time between two bytes
    except Exception as error:  # noqa: BLE001 - a block may be of any package
        raise UnsentError(_told(error)) from None  # the text of the error may hold the address


def _told(error: Exception) -> str:
    """The class of an error, and its cause where that is known."""
    kind = type(error).__name__
    if isinstance(error, httpx.HTTPStatusError):
        return f"{kind}: {_answer(error.response.status_code)}"
    cause: BaseException = error
    if isinstance(error, NotificationError):
        if found := _STATUS.search(error.log or ""):
            return f"{kind}: {_answer(int(found[1]))}"
        cause = _discretion.caught or error
    text = f"{type(cause).__name__} {cause}"
    reason = next((words for pattern, words in _CAUSES if re.search(pattern, text, re.IGNORECASE)), None)
    return f"{kind}: {reason}" if reason else kind


def _answer(status: int) -> str:
    return f"it answered {status}" + (", it takes no more messages for a while" if status == _BUSY else "")
