"""The command that serves a catalog to browsers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.options import CatalogOnly, ConfigOption, EndpointOption, ProfileOption, catalog_of
from vlmflow.cli.screen import tell
from vlmflow.cli.search import query_job
from vlmflow.errors import ServeError

if TYPE_CHECKING:
    from vlmflow.web.server import Address

_TOKEN = "VLMFLOW_SERVE_TOKEN"


@app.command()
def serve(
    catalog: CatalogOnly,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8377,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; beyond this machine together with --expose.")
    ] = "127.0.0.1",
    expose: Annotated[
        bool, typer.Option("--expose", help="Let other machines in, by a --host that they reach. Nothing is encrypted.")
    ] = False,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="A further name that browsers reach it by, as of a proxy in front; --host 0.0.0.0 needs one.",
        ),
    ] = None,
    profile: ProfileOption = None,
    config: ConfigOption = None,
    endpoint: EndpointOption = None,
) -> None:
    """Serve CATALOG to your browser: search it, look at images with their evidence, review them.

    Open the address that is printed: it holds a token, which lets you in (VLMFLOW_SERVE_TOKEN sets it). Verdicts go
    into the catalog as `review import` takes them; their rows follow within seconds, in large catalogs minutes. Models
    load at the first search by text; lists, images and review need none. Ctrl-C ends it, and writes what waits.

    Example: `vlmflow serve catalog/ --port 8377`
    """
    from vlmflow.web.server import ServeConfig, is_loopback
    from vlmflow.web.server import serve as serve_catalog

    if not is_loopback(host) and not expose:
        raise ServeError(f"--host {host} lets other machines in", remedy="Say so with --expose, or leave --host out.")
    token = os.environ.get(_TOKEN) or None
    settings = ServeConfig(host=host, port=port, token=token, names=tuple(name or ()))
    job = query_job(catalog, profile, config, endpoint)
    typer.echo(f"Reading {catalog} ...", err=True)
    place = catalog_of(catalog, endpoint, job)
    serve_catalog(place, settings, job=job, ready=lambda address: _tell(address, token))
    typer.echo("Ended.", err=True)


def _tell(address: Address, token: str | None) -> None:
    shown = address.url if token is None else address.url.partition("token=")[0] + f"token=${_TOKEN}"
    typer.echo(f"Open {shown}")
    if address.is_exposed:
        warning = (
            "Warning: other machines can reach this. Nothing is encrypted, and idle connections are not closed: put a "
            "proxy with TLS in front of it, and name that with --name. Whoever has the token sees every image and can "
            "decide on it."
        )
        tell(warning, "yellow")
    typer.echo("Ctrl-C ends it.", err=True)
