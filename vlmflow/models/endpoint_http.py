"""Requests to an OpenAI-compatible endpoint: in bounded time, again where a failure may pass, and no more than sense.

What a server says of an error is not repeated in messages: it may echo the request, or a part of the key.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from vlmflow.config import EndpointConfig, read_secret
from vlmflow.errors import ConfigError, EndpointError, RowErrorClass

_MAX_ANSWER_BYTES = 1024 * 1024
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
_OF_ONE_REQUEST = (400, 413, 415, 422)  # such as an image that is too large, or against the service's rules
_LONGEST_ASKED_DELAY_S = 120.0  # by Retry-After; a server that wants more is not waited for
# Which httpx reads.
_NETWORK_VARIABLES = [
    *(name for upper in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY") for name in (upper, upper.lower())),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
]
_PROBE_EVERY_S = 30.0  # of an endpoint that has stopped answering


class EndpointHttp:
    """Posts chat completions to one endpoint; any number of threads may do so at once.

    Args:
        pause: what waiting is done with.

    Raises:
        ConfigError: the environment variable of the key is not set on this machine, or one of proxies or certificates
            cannot be used.
    """

    def __init__(self, config: EndpointConfig, pause: Callable[[float], None] = time.sleep) -> None:
        self._config, self._pause = config, pause
        self._host = urlsplit(config.url).netloc
        headers = {"User-Agent": "vlmflow"}
        if config.api_key_env is not None:
            headers["Authorization"] = f"Bearer {read_secret(config.api_key_env, 'api_key_env')}"
        limits = httpx.Limits(max_connections=config.max_concurrency)
        # A redirect would carry images, and maybe the key, to where nobody has sent them.
        try:
            self._client = httpx.Client(headers=headers, limits=limits, follow_redirects=False)
        except (httpx.InvalidURL, ImportError, OSError, ValueError):
            # Not with what it says: of a proxy's address it repeats what it takes for a port, part of a password maybe.
            variables = ", ".join(name for name in _NETWORK_VARIABLES if os.environ.get(name))
            raise ConfigError(
                f"endpoint {self._host} cannot be asked with what {variables} say",
                remedy="Give proxies as http://host:port, in NO_PROXY names and numbers without brackets, and files of "
                "certificates that are there.",
            ) from None
        self._breaker = _Breaker(max(8, 2 * config.max_concurrency))
        self._lock = threading.Lock()
        self._num_requests = 0

    def take_num_requests(self) -> int:
        """Requests made since it was last asked, repeated ones included."""
        with self._lock:
            count, self._num_requests = self._num_requests, 0
        return count

    def post(self, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Posts one request, and again as the job allows.

        Args:
            deadline: by ``time.monotonic()``; then it gives up, whatever is left of the retries.

        Returns:
            The JSON object of the answer.

        Raises:
            EndpointError: there is none.
        """
        retries = self._breaker.allowed_retries(self._config.max_retries)
        for attempt in range(retries + 1):
            try:
                answer = self._attempt(body, deadline)
            except _Passing as failure:
                delay = _delay_s(attempt) if failure.retry_after_s is None else failure.retry_after_s
                last = attempt == retries or time.monotonic() + delay >= deadline
                if last or delay > _LONGEST_ASKED_DELAY_S:
                    raise self._breaker.count(failure.error) from failure
                self._pause(delay)
            except _OfOneRequestError as failure:
                raise failure.error from failure
            except EndpointError as error:
                raise self._breaker.count(error) from error
            else:
                self._breaker.reset()
                return answer
        raise AssertionError("unreachable")

    def _attempt(self, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        ends = min(deadline, time.monotonic() + self._config.timeout_s)
        left = ends - time.monotonic()
        if left <= 0:
            raise self._error(RowErrorClass.ENDPOINT_TIMEOUT, "no time was left for this request in its batch")
        with self._lock:
            self._num_requests += 1
        try:
            url = f"{self._config.url}/chat/completions"
            with self._client.stream("POST", url, json=body, timeout=left) as response:
                self._check_status(response)
                return self._parse(self._read(response, ends))
        except httpx.TimeoutException as error:
            raise _Passing(self._timed_out()) from error
        except httpx.TransportError as error:
            what = f"cannot be reached, or breaks off ({type(error).__name__})"
            raise _Passing(self._error(RowErrorClass.ENDPOINT_UNREACHABLE, what)) from error
        except httpx.HTTPError as error:
            what = f"answers what is no HTTP ({type(error).__name__})"
            raise self._error(RowErrorClass.BAD_ANSWER, what) from error

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        if status == 429:
            busy = self._error(RowErrorClass.ENDPOINT_BUSY, "takes no more requests (status 429)")
            raise _Passing(busy, _retry_after_s(response))
        if status in (408, 409, 425) or status >= 500:
            failed = self._error(RowErrorClass.ENDPOINT_FAILED, f"fails with status {status}")
            raise _Passing(failed, _retry_after_s(response))
        refused = self._error(RowErrorClass.ENDPOINT_REFUSED, f"refuses the request with status {status}")
        raise _OfOneRequestError(refused) if status in _OF_ONE_REQUEST else refused

    def _read(self, response: httpx.Response, ends: float) -> bytes:
        content = bytearray()
        for part in response.iter_bytes():
            content += part
            if len(content) > _MAX_ANSWER_BYTES:
                raise self._error(RowErrorClass.BAD_ANSWER, f"answers more than {_MAX_ANSWER_BYTES:,} bytes")
            if time.monotonic() > ends:  # the client's limit is of each piece, and they may drip
                raise _Passing(self._timed_out())
        return bytes(content)

    def _parse(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._error(RowErrorClass.BAD_ANSWER, "answers what is no JSON") from error
        if not isinstance(answer, dict):
            raise self._error(RowErrorClass.BAD_ANSWER, f"answers a JSON {type(answer).__name__}, not an object")
        return answer

    def _timed_out(self) -> EndpointError:
        return self._error(RowErrorClass.ENDPOINT_TIMEOUT, f"does not answer within {self._config.timeout_s:g} s")

    def _error(self, error_class: RowErrorClass, what: str) -> EndpointError:
        return EndpointError(f"endpoint {self._host} {what}", error_class=error_class)


class _Passing(Exception):  # noqa: N818 (never leaves this module)
    """A failure that may pass when the request is made again."""

    def __init__(self, error: EndpointError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.retry_after_s = error, retry_after_s


class _OfOneRequestError(Exception):
    """A refusal of what this one request holds; it says nothing of the next image."""

    def __init__(self, error: EndpointError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class _Breaker:
    """Stops asking an endpoint that has stopped answering, so that a run ends in minutes, every image with its row.

    From ``limit`` failed requests in a row on, one request is let through from time to time, without retries.
    """

    limit: int
    _num_failed: int = 0
    _last: EndpointError | None = None
    _probe_at: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def allowed_retries(self, wanted: int) -> int:
        """How often a new request may be repeated.

        Raises:
            EndpointError: it is not to be made at all.
        """
        with self._lock:
            if self._num_failed < self.limit or self._last is None:
                return wanted
            if time.monotonic() >= self._probe_at:
                self._probe_at = time.monotonic() + _PROBE_EVERY_S
                return 0
            raise EndpointError(
                f"not asked: {self._num_failed} requests failed in a row, the last because {self._last}",
                error_class=self._last.error_class,
            )

    def count(self, error: EndpointError) -> EndpointError:
        """Takes note of a request that failed; gives the error back. One bad answer says nothing of the next."""
        if error.error_class is not RowErrorClass.BAD_ANSWER:
            with self._lock:
                self._num_failed += 1
                self._last = error
                if self._num_failed >= self.limit:
                    self._probe_at = time.monotonic() + _PROBE_EVERY_S
        return error

    def reset(self) -> None:
        """Takes note of a request that was answered."""
        with self._lock:
            self._num_failed = 0


def _delay_s(attempt: int) -> float:
    """At random, up to a limit that doubles: those that failed together part ways."""
    return random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**attempt))


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds or a date, as the server asks for; None: it asks for nothing that can be understood."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
