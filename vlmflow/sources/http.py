"""Fetching images from http(s) urls that anyone may have put into a manifest.

The address is checked where the connection is made, not before: a name that resolves to another address the second
time (DNS rebinding) gains nothing. Proxies of the environment are used only where a job names one, since they resolve
the name again.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from vlmflow.config import HttpConfig
from vlmflow.errors import ImageError, RowErrorClass, StorageAccessError, TransientError, VlmflowError
from vlmflow.sources.connections import ProxyUnreachable, check_host, open_pool

_ATTEMPTS = 3
_FIRST_BACKOFF_S = 0.2
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = [("User-Agent", "vlmflow"), ("Accept", "image/*,*/*;q=0.5"), ("Accept-Encoding", "identity")]
_PROXY_WANTS_USER = 407
# Of the answers to conditional requests: the bytes are still those, or the server makes nothing of the condition.
_NOT_MODIFIED, _PRECONDITION_FAILED = 304, 412
_STRONG_TAG = re.compile(r'"[\x21\x23-\x7e]{1,500}"')
# Before it is said of a moment that the image was last changed then: later in that second, by another clock perhaps, it
# may have been changed again.
_SURELY_PAST_S = 60.0
_COMPRESSIONS = ("gzip", "x-gzip", "deflate", "compress", "br", "zstd")


@dataclass(frozen=True, slots=True)
class Download:
    """A downloaded image.

    Attributes:
        object_version: its ETag or Last-Modified; None where the server gives neither.
        validator: the same as it was sent, if the server may be asked by it whether it still has these very bytes.
    """

    data: bytes
    object_version: str | None
    validator: str | None


class _Unsettled(Exception):  # noqa: N818 (never leaves this module)
    """An attempt that may succeed when repeated."""

    def __init__(self, failure: VlmflowError, after_s: float = 0.0) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.after_s = after_s  # what the server asks to wait


class _Unconfirmed(Exception):  # noqa: N818 (never leaves this module)
    """An answer to a condition that does not say surely that the bytes are the same."""


class HttpFetcher:
    """Downloads from urls.

    Args:
        pool: of :func:`vlmflow.sources.connections.open_pool`, of the event loop in which this is used.
    """

    def __init__(self, config: HttpConfig, max_bytes: int, pool: httpcore.AsyncConnectionPool) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self._pool = pool

    async def fetch(self, url: str, validator: str | None = None) -> Download | None:
        """Downloads one image, within one time limit for all its redirects and attempts.

        Args:
            validator: of an earlier download from this url; None: there is none to ask by.

        Returns:
            None: the server still has the bytes that the validator came with.

        Raises:
            ImageError: with the class that its row records.
            TransientError: the proxy is out of reach.
            StorageAccessError: the proxy wants another user or password.
        """
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await self._attempts(url, validator)
        except TimeoutError as error:
            message = f"not read within http.timeout_s of {self._config.timeout_s:g} s"
            raise ImageError(message, error_class=RowErrorClass.READ_TIMEOUT) from error

    async def _attempts(self, url: str, validator: str | None) -> Download | None:
        ends = time.monotonic() + self._config.timeout_s
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if attempt == 1:
                    return await self._follow(self._pool, url, validator)
                # Of connections that were idle several may be dead: those of a server that was started anew.
                async with open_pool(self._config) as fresh:
                    return await self._follow(fresh, url, validator)
            except _Unsettled as error:
                delay_s = max(error.after_s, _FIRST_BACKOFF_S * 2**attempt * random.uniform(0.5, 1.0))
                if attempt == _ATTEMPTS or time.monotonic() + delay_s >= ends:
                    raise error.failure from error
            await asyncio.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    async def _follow(self, pool: httpcore.AsyncConnectionPool, url: str, validator: str | None) -> Download | None:
        """Follows redirects by hand: each hop's scheme and address are checked like the first."""
        moved = False
        for _ in range(self._config.max_redirects + 1):
            try:
                found = await self._get(pool, url, validator)
            except _Unconfirmed:
                found = await self._get(pool, url, None)
            if not isinstance(found, str):
                return replace(found, validator=None) if found and moved else found
            # A tag tells versions of one resource apart: another, where the next redirect may lead, can have the same.
            url, validator, moved = found, None, True
        message = f"more redirects than http.max_redirects of {self._config.max_redirects}"
        raise ImageError(message, error_class=RowErrorClass.TOO_MANY_REDIRECTS)

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: str, validator: str | None) -> Download | str | None:
        """Downloads, or returns where a redirect points to; None: the bytes are still those of the validator."""
        asked = [] if validator is None else [_condition(validator)]
        target = _ascii_url(url)
        is_by_proxy = self._config.proxy_env is not None
        if is_by_proxy:
            check_host(urlsplit(target).hostname or "", self._config)
        try:
            async with pool.stream("GET", target, headers=[*_HEADERS, *asked]) as response:
                headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                if response.status in _REDIRECTS and "location" in headers:
                    return _target(url, headers["location"])
                if validator is not None and response.status in (_NOT_MODIFIED, _PRECONDITION_FAILED):
                    _check_confirmed(response.status, headers, validator)
                    await response.aread()  # nothing, but only then the connection serves again
                    return None
                is_refused = is_by_proxy and response.status == _PROXY_WANTS_USER and target.startswith("http:")
                if is_refused and await self._does_proxy_refuse(target):
                    raise _proxy_failure(self._config, response.status)
                if response.status != 200:
                    raise _status_failure(response.status, headers.get("retry-after", ""))
                data = await self._body(response, headers)
        except ProxyUnreachable as error:
            raise _proxy_unreachable(self._config) from error
        except httpcore.ProxyError as error:  # to the request for a tunnel
            raise _proxy_failure(self._config, _leading_number(str(error))) from error
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError) as error:
            if distrust := _distrust(error):
                raise ImageError(distrust, error_class=RowErrorClass.READ_FAILED) from error
            failure = ImageError(_connection_message(error), error_class=RowErrorClass.READ_FAILED)
            raise _Unsettled(failure) from error
        except (httpcore.LocalProtocolError, httpcore.UnsupportedProtocol, ValueError) as error:
            raise ImageError("the url is not valid", error_class=RowErrorClass.READ_FAILED) from error
        except OSError as error:  # of the resolver, out of sockets
            failure = ImageError(_connection_message(error), error_class=RowErrorClass.READ_FAILED)
            raise _Unsettled(failure) from error
        version = headers.get("etag", "").strip('"') or headers.get("last-modified")
        return Download(data, version, _validator(headers))

    async def _does_proxy_refuse(self, url: str) -> bool:
        """Whether 407 is the proxy's word: any server can say it too, and one url must not end a run.

        A request for a tunnel is answered by the proxy itself.
        """
        try:
            await self._pool.request("HEAD", f"https://{urlsplit(url).netloc}/", headers=_HEADERS)
        except httpcore.ProxyError as error:
            return _leading_number(str(error)) == _PROXY_WANTS_USER
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError):
            pass  # the tunnel was there
        return False

    async def _body(self, response: httpcore.Response, headers: dict[str, str]) -> bytes:
        too_large = ImageError(
            f"more bytes than limits.max_bytes of {self._max_bytes:,}", error_class=RowErrorClass.TOO_MANY_BYTES
        )
        coding = headers.get("content-encoding", "").strip().lower()
        if coding in _COMPRESSIONS:  # other values are common mistakes (binary, utf-8) and change no byte
            message = f"sent as {coding}, which was not asked for"
            raise ImageError(message, error_class=RowErrorClass.READ_FAILED)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise too_large
        data = bytearray()
        async for chunk in response.aiter_stream():
            data += chunk
            if len(data) > self._max_bytes:
                raise too_large
        return bytes(data)


def _validator(headers: Mapping[str, str]) -> str | None:
    """The ETag or Last-Modified of a response, if it is a strong validator (RFC 9110, 8.8): one of no other bytes."""
    if "etag" in headers:
        return headers["etag"] if _STRONG_TAG.fullmatch(headers["etag"]) else None
    modified, sent = (_http_date(headers.get(name, "")) for name in ("last-modified", "date"))
    if modified is None or sent is None or sent - modified < _SURELY_PAST_S:
        return None
    return headers["last-modified"]


def _condition(validator: str) -> tuple[str, str]:
    return "If-None-Match" if _STRONG_TAG.fullmatch(validator) else "If-Modified-Since", validator


def _check_confirmed(status: int, headers: Mapping[str, str], validator: str) -> None:
    """Demands that an answer repeats the validator.

    Else the tags may have been compared weakly, as is right for caches, or the image be another of an earlier date.

    Raises:
        _Unconfirmed: it does not.
    """
    name = "etag" if _STRONG_TAG.fullmatch(validator) else "last-modified"
    if status != _NOT_MODIFIED or headers.get(name) != validator:
        raise _Unconfirmed


def _http_date(text: str) -> float | None:
    """Seconds since 1970; None: it is not a date as RFC 9110 wants it sent."""
    try:
        seconds = parsedate_to_datetime(text).timestamp()
        return seconds if formatdate(seconds, usegmt=True) == text else None
    except (ValueError, OverflowError, OSError):
        return None


def _target(url: str, location: str) -> str:
    # Some servers write UTF-8 here. Whatever it is: they know their path again by the very bytes, as escapes.
    escaped = re.sub(r"[\x80-\xff]", lambda letter: f"%{ord(letter[0]):02X}", location)
    try:
        return urljoin(url, escaped)
    except ValueError as error:
        message = "a redirect leads to a url that is not valid"
        raise ImageError(message, error_class=RowErrorClass.READ_FAILED) from error


def _status_failure(status: int, retry_after: str) -> Exception:
    if status in (404, 410):
        return ImageError(f"HTTP {status}", error_class=RowErrorClass.MISSING)
    if status in (401, 403):
        return ImageError(f"HTTP {status}", error_class=RowErrorClass.ACCESS_DENIED)
    failure = ImageError(f"HTTP {status}", error_class=RowErrorClass.HTTP_STATUS)
    return _Unsettled(failure, _seconds(retry_after)) if status == 429 or status >= 500 else failure


def _proxy_unreachable(config: HttpConfig) -> Exception:
    return _Unsettled(
        TransientError(
            f"the proxy that {config.proxy_env} names is out of reach",
            remedy=f"See that {config.proxy_env} is right where the workers run, and that the proxy is up.",
        )
    )


def _proxy_failure(config: HttpConfig, status: int) -> Exception:
    """What a proxy's own answer means: that it takes nothing from us, which would cost every image, or of one host."""
    if status == _PROXY_WANTS_USER:
        return StorageAccessError(
            f"the proxy that {config.proxy_env} names wants another user or password (HTTP {status})",
            remedy=f"Set {config.proxy_env} to a url with user:password@ before the host.",
        )
    if status in (401, 403):
        return ImageError(f"the proxy refuses the host (HTTP {status})", error_class=RowErrorClass.ACCESS_DENIED)
    return _Unsettled(
        ImageError(f"the proxy cannot reach the host (HTTP {status})", error_class=RowErrorClass.READ_FAILED)
    )


def _leading_number(text: str) -> int:
    found = re.match(r"[0-9]{3}\b", text)
    return int(found[0]) if found else 502


def _distrust(error: BaseException) -> str | None:
    """Why a server's certificate is not trusted, if that is what an error comes from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the server's certificate is not trusted: {cause.verify_message}"
        cause = cause.__cause__ or cause.__context__
    return None


def _seconds(retry_after: str) -> float:
    """How long a server asks to wait, in seconds or until a date; 0: it does not say."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return 0.0


def _connection_message(error: Exception) -> str:
    if "resolved" in str(error):
        return "the host cannot be resolved"
    kind = "connection failed" if isinstance(error, httpcore.ConnectError) else "connection broke off"
    return f"the {kind} ({type(error).__name__})"


def _ascii_url(url: str) -> str:
    """Writes a url for the wire: the host in IDNA, other letters percent-encoded, no userinfo and no fragment.

    Raises:
        ImageError: it is not an http(s) url.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ImageError("the url is not valid", error_class=RowErrorClass.READ_FAILED) from error
    if parts.scheme.lower() not in ("http", "https"):
        message = "a redirect leads to something other than http(s)"
        raise ImageError(message, error_class=RowErrorClass.ADDRESS_REFUSED)
    if not host:
        raise ImageError("the url names no host", error_class=RowErrorClass.READ_FAILED)
    authority = f"[{host}]" if ":" in host else host.encode("idna").decode("ascii")
    if port is not None:
        authority = f"{authority}:{port}"
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
    return f"{parts.scheme.lower()}://{authority}{path}{query}"
