"""The command by which other systems follow a catalog."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.files import check_outputs, write_output
from vlmflow.cli.options import CatalogOnly, EndpointOption, JsonOption, catalog_config
from vlmflow.cli.screen import Screen, emit
from vlmflow.cli.view import Embeddings
from vlmflow.errors import ConfigError


@app.command()
def changes(
    catalog: CatalogOnly,
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="Where to write the rows: an absent or empty folder, or what a killed command left. "
            "Default: they are counted.",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            help="A version of the catalog, as `show` and this command print it (0: all rows are new), or a time in "
            "UTC, such as 2026-03-01 or 2026-03-01T02:00.",
        ),
    ] = None,
    bookmark: Annotated[
        Path | None,
        typer.Option(
            "--bookmark",
            help="In place of --since: a file that says how far the last such command came. Absent: all rows are new. "
            "With DIR it is moved on, once all is written.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            help="Comma-separated: tell of these columns alone. Default: all, but a row counts as changed only if more "
            "than run, times and attempts differ.",
        ),
    ] = None,
    embeddings: Annotated[
        Embeddings | None,
        typer.Option(
            help="Whether the vectors that are new come along. Default: with DIR, unless --columns.", show_default=False
        ),
    ] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which rows of CATALOG were added, changed or removed since a version, and write them to DIR.

    For systems that follow a catalog: a search index, a shop, a data warehouse. DIR/images holds the rows as they are
    now, with columns before them: `change` (added, changed, removed), `changed_columns` and `decision_before`.
    DIR/embeddings holds the vectors that are new. Take over added and changed rows by `image_id`, and delete the
    removed ones (erased; of these only the id is left). Nothing is ever left out. Where a vacuum or an erasure has
    removed what a row was before, it is told as changed, with `changed_columns` null; it may be as it was.

    Example: `vlmflow changes catalog/ changes/2026-03-01 --bookmark shop.bookmark`
    """
    from vlmflow.catalog import Catalog
    from vlmflow.catalog.export import check_target
    from vlmflow.catalog.follow import Bookmark
    from vlmflow.views_upkeep import changes_as_json, print_changes

    if (since is None) == (bookmark is None):
        told = "neither --since nor --bookmark is given" if since is None else "--since and --bookmark are both given"
        remedy = "Give one of them: `--since 0` tells of all rows, and prints the version to go on from."
        raise ConfigError(told, remedy=remedy)
    if directory is None and embeddings is Embeddings.WITH:
        raise ConfigError("--embeddings with, but no DIR to write them to", remedy="Name a folder.")
    check_outputs(bookmark)
    if directory is not None:
        check_target(directory)
    start = _parsed(since) if bookmark is None else Bookmark.read(bookmark) or 0
    names = None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]
    if names == []:  # of an empty variable, say: of what changed he would be told nothing
        raise ConfigError("--columns names none", remedy="Name some, or leave it out: then all are compared.")
    with_embeddings = embeddings is Embeddings.WITH if embeddings is not None else columns is None
    feed = Catalog.open(catalog_config(catalog, endpoint)).changes(start, names)
    result = feed.write(directory, with_embeddings=with_embeddings)
    if bookmark is not None and directory is not None:  # who only looks has taken nothing over
        write_output(bookmark, result.bookmark.as_json())
    if as_json:
        emit(changes_as_json(result))
    else:
        print_changes(result, catalog, directory, bookmark, Screen())


def _parsed(since: str | None) -> int | dt.datetime:
    """A version, or a time: of UTC where it names no zone.

    Raises:
        ConfigError: it is neither, or to come.
    """
    text = since or ""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        time = dt.datetime.fromisoformat(text)
    except ValueError as error:
        remedy = "Give a version, such as 41, or a time, such as 2026-03-01 or 2026-03-01T02:00."
        raise ConfigError(f"--since {text!r} is neither a version nor a time", remedy=remedy) from error
    time = time if time.tzinfo else time.replace(tzinfo=dt.UTC)
    if time > dt.datetime.now(dt.UTC):
        raise ConfigError(f"--since {text} is still to come", remedy="Give a time that is over; it is taken as UTC.")
    return time
