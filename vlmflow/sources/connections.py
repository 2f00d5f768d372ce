"""Connections to http(s) servers that anyone may have named: to public addresses alone, or through a proxy."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from functools import cache
from urllib.parse import unquote, urlsplit

import httpcore

from vlmflow.config import HttpConfig, read_secret
from vlmflow.errors import ConfigError, ImageError, RowErrorClass

_CONNECT_S = 5.0  # for each address of a host but the last, which has all the time that is left
_MAX_CONNECTIONS, _MAX_IDLE = 128, 32  # of all batches that a process reads at once, each of which has 16
KEPT_S = 5.0  # that an idle connection is kept; most servers keep theirs as long or longer
# NAT64, its local form and IPv4-compatible addresses embed an IPv4 address in the last 32 bits, which a gateway would
# connect to.
_EMBEDDING = tuple(ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96"))
# Of the public range, but what answers there is the host of an Azure machine.
_AZURE_HOST = ipaddress.ip_address("168.63.129.16")


class ProxyUnreachable(httpcore.ConnectError):
    """No connection to the proxy itself."""


def open_pool(config: HttpConfig) -> httpcore.AsyncConnectionPool:
    """Connections for one event loop, through the proxy that the job names, if any.

    Raises:
        ConfigError: the environment variable of the proxy is not set on this machine, or holds no proxy's url.
    """
    proxy = proxy_of(config)
    backend = _CheckedBackend(config) if proxy is None else _ProxyBackend(config)
    return httpcore.AsyncConnectionPool(
        ssl_context=_ssl_context(),
        proxy=proxy,
        network_backend=backend,
        max_connections=_MAX_CONNECTIONS,
        max_keepalive_connections=_MAX_IDLE,
        keepalive_expiry=KEPT_S,
    )


def proxy_of(config: HttpConfig) -> httpcore.Proxy | None:
    """The proxy that images are downloaded through; None: the job names none.

    Raises:
        ConfigError: as above. The message does not hold the value, in which a password may be.
    """
    variable = config.proxy_env
    if variable is None:
        return None
    value = read_secret(variable, "source.http.proxy_env")
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")  # as curl takes it
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError(
            f"environment variable {variable} holds no url of an http proxy",
            remedy="Set it to such as http://proxy.example:3128, with user:password@ before the host if it wants them.",
        )
    authority = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme}://{authority}:{port or (443 if parts.scheme == 'https' else 80)}"
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    auth = (user.encode(), password.encode()) if parts.username is not None else None
    return httpcore.Proxy(url, auth=auth, ssl_context=_ssl_context() if parts.scheme == "https" else None)


def check_host(host: str, config: HttpConfig) -> None:
    """Refuses what a proxy is not to be asked for: addresses written as numbers, in whatever way, and this machine.

    What another name leads to, the proxy alone can tell.

    Raises:
        ImageError: as of an address that is refused.
    """
    if config.allow_private_addresses:
        return
    name = host.rstrip(".").lower()
    try:
        numbers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        numbers = []
    is_here = name == "localhost" or name.endswith(".localhost")
    if is_here or any(not is_public(str(entry[4][0])) for entry in numbers):
        raise _refused()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; those inside IPv6 transition addresses count too."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and any(ip in network for network in _EMBEDDING):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.teredo is not None or ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and ip != _AZURE_HOST


@cache
def _ssl_context() -> ssl.SSLContext:
    """One for all: reading the certificates takes longer than all else of a download, and every pool would do it for
    each of its connections."""
    return httpcore.default_ssl_context()


def _refused() -> ImageError:
    message = "the host is a private, loopback or link-local address"
    return ImageError(message, error_class=RowErrorClass.ADDRESS_REFUSED)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a host, and connects only to public addresses."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to the first address of the host that answers."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise httpcore.ConnectError("the host cannot be resolved") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._config.allow_private_addresses:
            addresses = [address for address in addresses if is_public(address)]
        if not addresses:
            raise _refused()
        # Where packets to one address vanish, as those of IPv6 do in some networks, the next one must have its turn.
        patience_s = min(_CONNECT_S, self._config.timeout_s / len(addresses))
        for address in addresses[:-1]:
            try:
                return await self._sockets.connect_tcp(address, port, patience_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._sockets.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """Sleeps between the pool's own attempts."""
        await asyncio.sleep(seconds)


class _ProxyBackend(httpcore.AnyIOBackend):
    """Connects to the proxy, wherever that is."""

    def __init__(self, config: HttpConfig) -> None:
        self._patience_s = min(_CONNECT_S, config.timeout_s / 4)  # of several attempts

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to the proxy."""
        try:
            return await super().connect_tcp(host, port, self._patience_s, local_address, socket_options)
        except (httpcore.ConnectError, httpcore.ConnectTimeout, OSError) as error:
            raise ProxyUnreachable(type(error).__name__) from error
