"""The command line: thin commands over the Python API.

Exit codes: 0 done (bad rows included), 2 bad input or configuration, 3 unreconciled or over the error budget, 4 store
lost, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vlmflow.config import CatalogConfig, Job, RayConfig, SourceConfig, StorageConfig, load_job
from vlmflow.errors import ConfigError, VlmflowError

if TYPE_CHECKING:
    from vlmflow.engine.progress import ProgressDisplay

app = typer.Typer(
    name="vlmflow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Enrich an image catalog with captions, moderation labels, match scores and embeddings.

Images come from a folder, a bucket, a manifest or tar shards; results go to Delta tables. Run the same command again
and only what is due is done.

Try it without any set-up or network: `vlmflow demo`
""",
)

SourceArgument = Annotated[
    str | None,
    typer.Argument(
        help="Where the images are: a folder, s3://, gs:// or az:// prefix, a manifest (.csv, .jsonl, .parquet) "
        "or .tar shards. May stand in --config instead."
    ),
]
CatalogArgument = Annotated[
    str | None, typer.Argument(help="The catalog to write: a folder or a prefix. May stand in --config instead.")
]
CatalogOnly = Annotated[str, typer.Argument(help="The catalog: a folder or a prefix.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A job file (YAML); options here win over it.")
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="A named set of models; `vlmflow profiles` lists them.")
]
TasksOption = Annotated[
    str | None, typer.Option("--tasks", help="Comma-separated, of: embed, moderate, caption, match. Default: all.")
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="Moderation policy: a YAML file, or the name of one that ships.")
]
DateOption = Annotated[
    datetime | None, typer.Option("--date", formats=["%Y-%m-%d"], help="Logical date of new rows. Default: today, UTC.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many images, for a trial.")]
TextOption = Annotated[
    str | None,
    typer.Option("--text-column", help="Column of the manifest whose text `match` scores against the image."),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="An existing Ray cluster (auto, host:port, ray://...). Default: embedded."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output, for machines.")]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", help="Endpoint of an S3-compatible store, such as http://127.0.0.1:9000.")
]
AllowEmptyOption = Annotated[bool, typer.Option("--allow-empty", help="A source without images is no error.")]
UnboundOption = Annotated[
    bool,
    typer.Option(
        "--accept-unbound",
        help="Moderate although the policy's thresholds were not set for this model: every image becomes `review`.",
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, with times.")]


class Embeddings(StrEnum):
    """Whether an export carries vectors."""

    WITH = "with"
    WITHOUT = "without"


def _job(source: str | None, catalog: str | None, config: Path | None, endpoint: str | None, **options: Any) -> Job:
    tasks: str | None = options.pop("tasks")
    date: datetime | None = options.pop("date")
    storage = {"endpoint": endpoint} if endpoint else None
    overrides: dict[str, Any] = {
        "source": {
            "uri": source,
            "text_column": options.pop("text_column"),
            "allow_empty": options.pop("allow_empty") or None,
            "storage": storage,
        },
        "catalog": {"uri": catalog, "storage": storage},
        "ray": {"address": options.pop("ray_address")},
        "tasks": None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()],
        "date": None if date is None else date.date(),
        "accept_unbound": options.pop("accept_unbound") or None,
        **options,
    }
    if config is None and (source is None or catalog is None):
        raise ConfigError(
            "SOURCE or CATALOG is not given", remedy="Write `vlmflow enrich SOURCE CATALOG`, or --config."
        )
    return load_job(config, overrides)


@app.command()
def enrich(
    source: SourceArgument = None,
    catalog: CatalogArgument = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    tasks: TasksOption = None,
    policy: PolicyOption = None,
    text_column: TextOption = None,
    date: DateOption = None,
    limit: LimitOption = None,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    allow_empty: AllowEmptyOption = False,
    accept_unbound: UnboundOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Enrich the images of SOURCE into CATALOG: whatever is due, and nothing else.

    New and changed images, tasks that are new, and tasks whose model changed are due. Interrupt it whenever you like:
    the same command goes on where it stopped.

    Example: `vlmflow enrich photos/ catalog/ --profile base --policy marketplace`
    """
    from vlmflow.engine import enrich as run
    from vlmflow.views import print_report

    job = _job(
        source,
        catalog,
        config,
        endpoint,
        profile=profile,
        tasks=tasks,
        policy=policy,
        text_column=text_column,
        date=date,
        limit=limit,
        ray_address=ray_address,
        allow_empty=allow_empty,
        accept_unbound=accept_unbound,
    )
    with _display(as_json=as_json, verbose=verbose) as display:
        report = run(job, progress=display)
    if as_json:
        typer.echo(json.dumps({"event": "report", **report.model_dump(mode="json")}))
    else:
        print_report(report, Console())


@app.command()
def plan(
    source: SourceArgument = None,
    catalog: CatalogArgument = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    tasks: TasksOption = None,
    policy: PolicyOption = None,
    text_column: TextOption = None,
    date: DateOption = None,
    limit: LimitOption = None,
    endpoint: EndpointOption = None,
    allow_empty: AllowEmptyOption = False,
    accept_unbound: UnboundOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what `enrich` would do, by task and reason. Reads the listing and the catalog; runs and writes nothing."""
    from vlmflow.engine import plan as make_plan
    from vlmflow.views import print_plan

    job = _job(
        source,
        catalog,
        config,
        endpoint,
        profile=profile,
        tasks=tasks,
        policy=policy,
        text_column=text_column,
        date=date,
        limit=limit,
        ray_address=None,
        allow_empty=allow_empty,
        accept_unbound=accept_unbound,
    )
    summary = make_plan(job)
    if as_json:
        typer.echo(summary.model_dump_json())
    else:
        print_plan(summary, Console())


@app.command()
def show(catalog: CatalogOnly, endpoint: EndpointOption = None, as_json: JsonOption = False) -> None:
    """Show what is in CATALOG: counts by status and decision, examples, versions, the last runs."""
    from vlmflow.views import print_summary, summarize

    summary = summarize(_catalog_config(catalog, endpoint))
    if as_json:
        typer.echo(summary.model_dump_json())
    else:
        print_summary(summary, Console())


@app.command()
def export(
    catalog: CatalogOnly,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or absent folder.")],
    embeddings: Annotated[Embeddings, typer.Option(help="Whether the vectors come along.")] = Embeddings.WITH,
    endpoint: EndpointOption = None,
) -> None:
    """Write the current rows of CATALOG to DIR as plain Parquet, for readers that know no Delta tables."""
    from vlmflow.catalog import Catalog

    written = Catalog.open(_catalog_config(catalog, endpoint)).export(
        directory, with_embeddings=embeddings is Embeddings.WITH
    )
    typer.echo(f"{written.num_images:,} images and {written.num_embeddings:,} vectors in {directory}")


@app.command()
def profiles(as_json: JsonOption = False) -> None:
    """List the named sets of models: what each is for, sizes, licences, where weights are expected, present or not."""
    from vlmflow.models.profiles import describe_profiles
    from vlmflow.views import print_profiles, profiles_as_json

    described = describe_profiles(None)
    if as_json:
        typer.echo(profiles_as_json(described))
    else:
        print_profiles(described, Console())


@app.command()
def doctor(
    source: Annotated[str | None, typer.Option("--source", help="Also list this source.")] = None,
    catalog: Annotated[str | None, typer.Option("--catalog", help="Also write to this catalog's storage.")] = None,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check Python, torch, GPU, Ray and its workers, storage and weights: what works, what is missing, what to do."""
    from vlmflow.doctor import doctor as diagnose
    from vlmflow.views import check_as_json, print_check

    storage = StorageConfig(endpoint=endpoint)
    failed = False
    console = Console()
    for check in diagnose(
        ray=RayConfig(address=ray_address),
        source=None if source is None else SourceConfig(uri=source, storage=storage),
        catalog_uri=catalog,
        catalog_storage=storage,
    ):
        failed = failed or check.verdict == "fail"
        if as_json:
            typer.echo(check_as_json(check))
        else:
            print_check(check, console)
    if failed:
        raise typer.Exit(2)


@app.command()
def demo(
    catalog: Annotated[str, typer.Argument(help="Where to put the demo's catalog.")] = "demo-catalog",
    verbose: VerboseOption = False,
) -> None:
    """Enrich the demo images with the starter models, with no network, and show what came out."""
    from vlmflow.demo import run_demo

    with _display(as_json=False, verbose=verbose) as display:
        run_demo(catalog, display, Console())


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors become one line on standard error and an exit code."""
    try:
        app(args=arguments)
    except VlmflowError as error:
        message = f"vlmflow: {error}" + (f" - {error.remedy}" if error.remedy else "")
        typer.secho(" ".join(message.split()), err=True, fg="red")
        sys.exit(error.exit_code)


def _catalog_config(uri: str, endpoint: str | None) -> CatalogConfig:
    return CatalogConfig(uri=uri, storage=StorageConfig(endpoint=endpoint))


@contextlib.contextmanager
def _display(*, as_json: bool, verbose: bool) -> Iterator[ProgressDisplay]:
    """The display that fits where the output goes; also what an interrupted user is told."""
    from vlmflow.engine.progress import JsonProgress, LiveProgress, LogProgress

    console = Console(stderr=True)
    if verbose or not (as_json or console.is_terminal):
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        logging.getLogger("vlmflow").setLevel(logging.INFO)
    display: ProgressDisplay
    if as_json:
        display = JsonProgress(sys.stdout)
    elif console.is_terminal and not verbose:
        display = LiveProgress(console)
    else:
        display = LogProgress()
    try:
        yield display
    except KeyboardInterrupt:
        display.close()
        typer.secho("vlmflow: interrupted; what was committed stays, run the same command again to go on", err=True)
        raise typer.Exit(130) from None
    finally:
        display.close()
