"""Serving a catalog to browsers: the socket, the token, the start and the end."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import secrets
import socket
import string
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote

from vlmflow.config import CatalogConfig, Frozen, Job
from vlmflow.errors import ServeError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from vlmflow.web.desk import Desk

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

PORT = 8377
_MIN_TOKEN_CHARS = 16
# What stands for itself in the query of an address (RFC 3986), without the `&` that would end the token there.
_IN_TOKENS = frozenset(string.ascii_letters + string.digits + "-._~!$'()*+,;=:@/?")


class ServeConfig(Frozen):
    """How the app is reached.

    Attributes:
        host: address to listen at; beyond the machine itself it must be given on purpose.
        port: 0: any that is free.
        token: what lets browsers in; None: one is made. It stands in the address: letters, digits, and what an address
            may hold, as base64 does.
        names: further names under which browsers reach it, such as that of a proxy in front; with a port if it is
            not the one above. At an address that stands for all of the machine's (0.0.0.0) there must be one.
        verdicts_every_s: how long rows wait for verdicts, so that one commit brings many.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    token: str | None = None
    names: tuple[str, ...] = ()
    verdicts_every_s: float = 10.0


class Address(Frozen):
    """Where the app listens.

    Attributes:
        url: the address to open; the token is in it.
        is_exposed: other machines may reach it.
    """

    url: str
    is_exposed: bool


def serve(
    catalog: CatalogConfig,
    config: ServeConfig | None = None,
    *,
    job: Job | None = None,
    ready: Callable[[Address], None] | None = None,
) -> None:
    """Serves a catalog until it is interrupted; verdicts that wait are brought into their rows at the end.

    Args:
        job: profile, models and limits of text and image queries, and how pictures are read; None: the profile of the
            newest run.
        ready: is told where to look, once requests are answered.

    Raises:
        ServeError: the host is no address or needs a name, the port is taken, the token is too short or cannot stand in
            an address, or a package is absent.
        CatalogError: there is no catalog.
        ConfigError, WeightsError: the job's profile is unknown, or its weights are absent.
    """
    config = config or ServeConfig()
    token = config.token or secrets.token_urlsafe(32)
    _check_token(token)
    if _ip(config.host).is_unspecified and not config.names:
        raise ServeError(
            f"host {config.host} is every address of this machine, and no name is given that browsers reach it by",
            remedy="Name what other machines call it with --name, or the one address with --host.",
        )
    if job is not None:
        from vlmflow.models.profiles import resolve_models

        resolve_models(job.model_copy(update={"tasks": ("embed",)}))
    try:
        import uvicorn
    except ImportError as error:
        raise ServeError("uvicorn is not installed", remedy="pip install 'vlmflow[serve]'") from error
    with contextlib.closing(_socket(config.host, config.port)) as listener:
        host, port = listener.getsockname()[:2]
        with running_app(catalog, config, token, _hosts(config, port), f"vlmflow_{port}", job) as (app, _):
            settings = uvicorn.Config(
                app,
                access_log=False,  # it would hold the token, and what people look for
                log_config=None,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
            )
            if ready is not None:  # the socket listens: whoever asks now is answered in a moment
                ready(_address(host, port, token))
            with contextlib.suppress(KeyboardInterrupt):  # raised again at the end, for whoever wants to know
                uvicorn.Server(settings).run([listener])


@contextlib.contextmanager
def running_app(
    catalog: CatalogConfig,
    config: ServeConfig,
    token: str,
    hosts: frozenset[str],
    cookie: str,
    job: Job | None = None,
) -> Iterator[tuple[ASGIApp, Desk]]:
    """The app and the desk behind it, with all that runs beside them, without a socket.

    Raises:
        CatalogError: there is no catalog.
        ServeError: a package is absent.
    """
    try:
        from vlmflow.web.app import make_app
    except ImportError as error:
        raise ServeError(f"{error.name} is not installed", remedy="pip install 'vlmflow[serve]'") from error
    from vlmflow.web.desk import Desk
    from vlmflow.web.judging import Judging
    from vlmflow.web.pictures import Pictures
    from vlmflow.web.sessions import Sessions
    from vlmflow.web.shelf import Shelf

    shelf = Shelf(catalog, job)
    judging = Judging(shelf, every_s=config.verdicts_every_s)
    pictures = Pictures(catalog, job)
    with contextlib.ExitStack() as stack:
        stack.callback(shelf.stop)
        stack.callback(judging.stop)
        shelf.start()
        judging.start()
        desk = Desk(shelf, judging, pictures, job)
        yield make_app(desk, Sessions(token), hosts, cookie), desk


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches an address.

    Raises:
        ServeError: it is none.
    """
    return _ip(host).is_loopback


def _check_token(token: str) -> None:
    """Makes sure that a token is long enough, and lets in whoever writes it into the address.

    Raises:
        ServeError: it does not.
    """
    if len(token) < _MIN_TOKEN_CHARS:
        raise ServeError(
            f"the token has {len(token)} characters",
            remedy=f"Take at least {_MIN_TOKEN_CHARS}, or none for one that is made.",
        )
    wrong = sorted(set(token) - _IN_TOKENS)
    if wrong:
        raise ServeError(
            f"the token holds what cannot stand in an address: {', '.join(map(repr, wrong[:10]))}",
            remedy="Take letters and digits, such as `openssl rand -hex 24` makes, or none for one that is made.",
        )


def _ip(host: str) -> _Ip:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ServeError(f"host {host!r} is no address", remedy="Give an address such as 127.0.0.1.") from error


def _spelled(address: _Ip) -> str:
    """As it stands in a url."""
    return f"[{address}]" if address.version == 6 else str(address)


def _address(host: str, port: int, token: str) -> Address:
    address = ipaddress.ip_address(host)
    is_exposed = not address.is_loopback
    if address.is_unspecified:
        address = ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
    return Address(url=f"http://{_spelled(address)}:{port}/enter?token={quote(token, safe='')}", is_exposed=is_exposed)


def _hosts(config: ServeConfig, port: int) -> frozenset[str]:
    """What browsers may call us: by our address and our own names, and never by a name that leads here by chance."""
    address = _ip(config.host)
    own = {"127.0.0.1", "localhost", "[::1]"} if address.is_loopback or address.is_unspecified else set()
    if not address.is_unspecified:
        own.add(_spelled(address))
    named = {name.lower() for name in config.names}
    every = {f"{host}:{port}" for host in own} | named | {f"{name}:{port}" for name in named if ":" not in name}
    return frozenset(every | (own if port == 80 else set()))


def _socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ServeError: it cannot be had.
    """
    address = _ip(host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(address), port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        code = getattr(error, "errno", None)
        if code == errno.EADDRINUSE:
            raise ServeError(f"port {port} is taken", remedy="Name another with --port; 0 takes any.") from error
        reason = getattr(error, "strerror", None) or error
        raise ServeError(f"{host} port {port}: {reason}", remedy="Name another with --host or --port.") from error
    return listener
