"""Commands about known images: lists that block or allow without asking a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vlmflow.cli.app import app
from vlmflow.cli.options import CatalogOnly, EndpointOption, JsonOption, catalog_config
from vlmflow.cli.screen import Screen, emit
from vlmflow.errors import KnownImagesError

if TYPE_CHECKING:
    from vlmflow.catalog.known_images import Kind

known_app = typer.Typer(
    name="known", no_args_is_help=True, help="Lists of known images that block or allow without asking a model."
)
app.add_typer(known_app)


@known_app.command("add")
def add_command(
    catalog: CatalogOnly,
    source: Annotated[
        Path, typer.Argument(help="A text file of hashes, one a line (sha256, or 16 digits of a pHash), or an image.")
    ],
    block: Annotated[
        bool | None,
        typer.Option("--block/--allow", help="What the list means; one of them is required.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the list. Default: the file's name without its ending.")] = None,
    max_distance: Annotated[int, typer.Option(help="Of the 64 bits of a pHash that may differ, up to 16.")] = 4,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a list of known images into the catalog, in place of one of its name, and apply it to the rows.

    Images are blocked by their bytes (sha256) or by how they look (pHash, within the distance); they are allowed by
    their bytes alone. A plain image is blocked by its bytes alone too: all plain ones look alike to a pHash. Later runs
    apply the lists to every image that they read; a run that is at work does so when it ends. People's verdicts go
    before any list.

    Example: `vlmflow known add catalog/ banned.txt --block --max-distance 6`
    """
    from vlmflow.known import add_list, is_text, read_hashes

    if block is None:
        raise KnownImagesError(
            f"{source}: neither --block nor --allow was given", remedy="Give one of them: it says what the list means."
        )
    hashes, phashes = read_hashes(source, with_look=block)
    config = catalog_config(catalog, endpoint)
    kind: Kind = "block" if block else "allow"
    report = add_list(config, name or source.stem.lower(), kind, hashes, phashes, max_distance)
    if as_json:
        emit(report.model_dump_json())
        return
    console = Screen()
    console.print(
        f"list {escape(report.name)}: {report.num_hashes:,} hashes of bytes, {report.num_phashes:,} perceptual ones; "
        f"[bold]{report.num_changed:,} images[/bold] came under another verdict"
    )
    for change, count in report.flips.items():
        console.print(f"  {change} {count:,}")
    if block and not phashes and not is_text(source):
        console.print("the image is plain, and all plain ones look alike to a pHash: it is listed by its bytes alone")
    if report.num_without_look:
        left_out = f"{report.num_without_look:,} perceptual hashes were left out"
        console.print(f"{left_out}: plain images have them, whatever their colour")


@known_app.command("remove")
def remove_command(
    catalog: CatalogOnly,
    name: Annotated[str, typer.Argument(help="Of the list.")],
    endpoint: EndpointOption = None,
) -> None:
    """Take a list out of the catalog; its images are decided by people and models again."""
    from vlmflow.known import remove_list

    report = remove_list(catalog_config(catalog, endpoint), name)
    Screen().print(f"list {escape(name)} removed; {report.num_changed:,} images came under another verdict")


@known_app.command("list")
def list_command(catalog: CatalogOnly, endpoint: EndpointOption = None, as_json: JsonOption = False) -> None:
    """Show the lists of a catalog: how many images each knows by their bytes, and how many by how they look."""
    from vlmflow.catalog import Catalog

    lists = Catalog.open(catalog_config(catalog, endpoint)).known_images.lists()
    if as_json:
        shown = [
            {
                "name": known.name,
                "kind": known.kind,
                "hashes": len(known.hashes),
                "phashes": len(known.phashes) - known.num_ignored,
                "phashes_ignored": known.num_ignored,
                "max_distance": known.max_distance,
                "added_at": known.added_at,
            }
            for known in lists
        ]
        typer.echo(json.dumps(shown))
        return
    table = Table("list", "kind", "bytes", "looks", "distance", "added", box=None, pad_edge=False, header_style="dim")
    for known in lists:
        counts = (f"{len(known.hashes):,}", f"{len(known.phashes) - known.num_ignored:,}", str(known.max_distance))
        table.add_row(escape(known.name), known.kind, *counts, known.added_at)
    console = Screen()
    console.print(table if lists else "no lists; `vlmflow known add` makes one")
    for known in lists:
        if known.num_ignored:
            console.print(
                f"[yellow]list {escape(known.name)}: {known.num_ignored:,} more perceptual hashes are those of plain "
                "images and block nothing. Add clips that begin plain again, with `vlmflow known add --name` and a "
                "name that no list has.[/yellow]"
            )
