"""Commands that keep a catalog in order: vacuum, verify, erase."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.options import (
    CatalogArgument,
    CatalogOnly,
    ConfigOption,
    EndpointOption,
    JsonOption,
    PolicyOption,
    ProfileOption,
    SourceArgument,
    TasksOption,
    catalog_config,
    make_job,
    storage_config,
)
from vlmflow.cli.screen import Screen
from vlmflow.config import SourceConfig
from vlmflow.errors import ConfigError

_DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]


@app.command()
def vacuum(
    catalog: CatalogOnly,
    retention_hours: Annotated[
        float, typer.Option("--retention-hours", help="How long files of old versions stay, for time travel: 0 to 720.")
    ] = 168.0,
    dry_run: _DryRunOption = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove leftovers of killed runs, and files of old versions, from CATALOG.

    Safe beside running jobs: what a live run has written and not yet committed is never touched. A run without a sign
    of life for ten minutes is dead; it is shut out from committing before its files go. Records of upkeep (erasures,
    vacuums, updates of indexes, verdicts brought into rows) go as old files do. Many small files of verdicts, or of
    tombstones, become one.
    """
    from vlmflow.catalog import Catalog
    from vlmflow.catalog.log import LONGEST_RETENTION
    from vlmflow.views_upkeep import print_vacuum

    longest = LONGEST_RETENTION // dt.timedelta(hours=1)
    if not 0 <= retention_hours <= longest:  # here, because a range of Typer's lets nan through
        raise ConfigError(
            f"--retention-hours {retention_hours:g} is not between 0 and {longest}",
            remedy=f"Give at most {longest}: the log forgets removed files after that.",
        )
    opened = Catalog.open(catalog_config(catalog, endpoint))
    result = opened.vacuum(retention=dt.timedelta(hours=retention_hours), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_vacuum(result, Screen())
    if result.failed:
        raise typer.Exit(4)


@app.command()
def verify(
    source: SourceArgument = None,
    catalog: CatalogArgument = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    tasks: TasksOption = None,
    policy: PolicyOption = None,
    examples: Annotated[int, typer.Option("--examples", min=0, help="Examples of each finding.")] = 5,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold CATALOG against SOURCE and against its own files. Reads no image and writes nothing.

    Errors (exit code 1): images without a row, images with two, rows of another version of the object than the listed
    one, files of the tables that are lost, vectors that are lost. The rest are warnings. Rows with old fingerprints
    are told by --profile, else by the newest run.

    Example: `vlmflow verify photos/ catalog/`
    """
    from vlmflow.verification import verify as check
    from vlmflow.views_upkeep import print_verification, verification_as_json

    if config is None and profile is None and (tasks is not None or policy is not None):
        raise ConfigError(
            "--tasks and --policy say which fingerprints rows should have only together with a profile",
            remedy="Give --profile or --config too, or leave them out: the newest run tells then.",
        )
    if config is None and profile is None and source is not None and catalog is not None:
        storage = storage_config(endpoint)
        found = check(
            SourceConfig(uri=source, storage=storage), catalog_config(catalog, endpoint), num_examples=examples
        )
    else:
        job = make_job(
            source,
            catalog,
            config,
            endpoint,
            profile=profile,
            tasks=tasks,
            policy=policy,
            accept_unbound=True,
        )
        found = check(job.source, job.catalog, job=job, num_examples=examples)
    if as_json:
        typer.echo(verification_as_json(found))
    else:
        print_verification(found, Screen())
    if not found.is_sound:
        raise typer.Exit(1)


@app.command()
def erase(
    catalog: CatalogOnly,
    uri: Annotated[list[str] | None, typer.Option("--uri", help="Address of an image. May be given again.")] = None,
    ids: Annotated[
        Path | None,
        typer.Option("--ids", help="File with an image_id a line, or a CSV or Parquet file with a column image_id."),
    ] = None,
    lift: Annotated[
        bool,
        typer.Option(
            "--lift", help="Let erased images come back with the next run, named by --uri or --ids as they were then."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: _DryRunOption = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase images from CATALOG for good: rows, embeddings, verdicts, and every old file that holds them.

    An address stands for every image that has it, whatever its key (source.key_column). A tombstone (the id, or a hash
    of the address, and the time) keeps each from coming back until `--lift`, also those that have no row yet: the
    answer names them, for one may be mistyped. Time travel ends at versions whose files held one of them. The source
    itself, and exports made from the catalog, are not touched. While runs are at work the images are out of sight at
    once; ask again when the runs are over (exit code 3 says so).

    Example: `vlmflow erase catalog/ --uri s3://shop/photos/1.jpg`
    """
    from vlmflow.catalog import Catalog
    from vlmflow.erasure import find_images
    from vlmflow.views_upkeep import counted, lifted, print_erasure, unfound

    opened = Catalog.open(catalog_config(catalog, endpoint))
    images = find_images(opened, uri or [], ids)
    num_images = images.num_images
    told: dict[str, object] = {"dry_run": dry_run, "lift": lift, "num_images": num_images, "num_rows": images.num_rows}
    without = {"erased_before": images.erased, "absent": images.absent}
    if dry_run:
        verb = "lift" if lift else "erase"
        lines = [f"would {verb} {counted(num_images, 'image')}, {counted(images.num_rows, 'row')} now"]
        text = "\n".join(lines if lift else lines + unfound(images))
        typer.echo(json.dumps(told | without) if as_json else text)
        return
    if lift:
        erased = counted(num_images, "erased image")
        _agree(f"let {erased} come back with the next run?", yes)
        kept_out = [key.hex() for key in opened.lift(images.keys, images.uris).to_pylist()]
        text = "\n".join(lifted(images, kept_out))
        typer.echo(json.dumps(told | without | {"kept_out": kept_out}) if as_json else text)
        return
    _agree(f"erase {counted(num_images, 'image')} for good?", yes)
    result = opened.erase(images.keys, images.uris)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result) | without | {"is_complete": result.is_complete}))
    else:
        print_erasure(result, images, Screen())
    if not result.is_complete:
        raise typer.Exit(3)


def _agree(question: str, yes: bool) -> None:
    """Asks, where nobody has said ``--yes``, and ends the command unless the answer is yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody can be asked", remedy="Give --yes where that is meant.")
    if not typer.confirm(question, err=True):  # standard output may be JSON
        raise typer.Exit(130)
