"""Commands that keep a catalog in order: vacuum."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from typing import Annotated

import typer
from rich.console import Console

from vlmflow.cli.app import app
from vlmflow.cli.options import CatalogOnly, EndpointOption, JsonOption, catalog_config

_DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]


@app.command()
def vacuum(
    catalog: CatalogOnly,
    retention_hours: Annotated[
        float, typer.Option("--retention-hours", help="How long files of old versions stay, for time travel.")
    ] = 168.0,
    dry_run: _DryRunOption = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove leftovers of killed runs, and files of old versions, from CATALOG.

    Safe beside running jobs: what a live run has written and not yet committed is never touched. A run without a sign
    of life for ten minutes is dead; it is shut out from committing before its files go.
    """
    from vlmflow.catalog import Catalog
    from vlmflow.views_upkeep import print_vacuum

    opened = Catalog.open(catalog_config(catalog, endpoint))
    result = opened.vacuum(retention=dt.timedelta(hours=retention_hours), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_vacuum(result, Console())
    if result.failed:
        raise typer.Exit(4)
