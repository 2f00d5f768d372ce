"""Commands that change nothing: show, export, profiles, job, doctor."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.options import (
    AddressOption,
    CatalogOnly,
    ConfigOption,
    EndpointOption,
    JsonOption,
    catalog_config,
    storage_config,
)
from vlmflow.cli.screen import Screen, emit, show_result
from vlmflow.config import RayConfig, SourceConfig, load_job


class Embeddings(StrEnum):
    """Whether an export carries vectors."""

    WITH = "with"
    WITHOUT = "without"


@app.command()
def show(catalog: CatalogOnly, endpoint: EndpointOption = None, as_json: JsonOption = False) -> None:
    """Show what is in CATALOG: counts by status and decision, examples, versions, the last runs."""
    from vlmflow.views import print_summary, summarize

    summary = summarize(catalog_config(catalog, endpoint))
    show_result(summary, print_summary, as_json=as_json)


@app.command()
def export(
    catalog: CatalogOnly,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="An absent or empty folder, or what a killed export left.")
    ],
    embeddings: Annotated[Embeddings, typer.Option(help="Whether the vectors come along.")] = Embeddings.WITH,
    endpoint: EndpointOption = None,
) -> None:
    """Write the current rows of CATALOG to DIR as plain Parquet, for readers that know no Delta tables.

    DIR/embeddings and then DIR/images appear once they are whole. After a kill the same command starts over. What comes
    after the version that is printed, `vlmflow changes` tells.
    """
    from vlmflow.catalog import Catalog

    written = Catalog.open(catalog_config(catalog, endpoint)).export(
        directory, with_embeddings=embeddings is Embeddings.WITH
    )
    counts = f"{written.num_images:,} images and {written.num_embeddings:,} vectors"
    typer.echo(f"{counts} in {directory}, of version {written.version}")


@app.command()
def profiles(as_json: JsonOption = False) -> None:
    """List the named sets of models: what each is for, sizes, licences, where weights are expected, present or not."""
    from vlmflow.models.profiles import describe_profiles
    from vlmflow.views import print_profiles, profiles_as_json

    described = describe_profiles(None)
    if as_json:
        typer.echo(profiles_as_json(described))
    else:
        print_profiles(described, Screen())


@app.command()
def job(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of job files instead, for editors that check YAML.")
    ] = False,
) -> None:
    """Print a job file with every key: what it means, what it may be, and what it is by default.

    Example: `vlmflow job > job.yaml`, then `vlmflow enrich --config job.yaml`
    """
    from vlmflow.job_file import job_schema, job_template

    emit(json.dumps(job_schema(), indent=2) if schema else job_template(), end="\n" if schema else "")


@app.command()
def doctor(
    source: Annotated[str | None, typer.Option("--source", help="Also list this source.")] = None,
    catalog: Annotated[str | None, typer.Option("--catalog", help="Also write to this catalog's storage.")] = None,
    config: ConfigOption = None,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check Python, torch, GPU, Ray and its workers, storage and weights: what works, what is missing, what to do.

    With --config, for that job: its source, its catalog, its models, its cluster.
    """
    from vlmflow.checks import doctor as diagnose
    from vlmflow.checks import doctor_of
    from vlmflow.views import check_as_json, print_check

    storage = storage_config(endpoint)
    failed = False
    console = Screen()
    if config is None:
        checks = diagnose(
            ray=RayConfig(address=ray_address),
            source=None if source is None else SourceConfig(uri=source, storage=storage),
            catalog_uri=catalog,
            catalog_storage=storage,
        )
    else:
        place = {"storage": {"endpoint": storage.endpoint}}
        given = {
            "source": {"uri": source} | place,
            "catalog": {"uri": catalog} | place,
            "ray": {"address": ray_address},
        }
        checks = doctor_of(load_job(config, given))
    for check in checks:
        failed = failed or check.verdict == "fail"
        if as_json:
            typer.echo(check_as_json(check))
        else:
            print_check(check, console)
    if failed:
        raise typer.Exit(2)
