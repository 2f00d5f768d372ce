"""Options that several commands share, and what they are made into."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from vlmflow.cli.screen import Screen
from vlmflow.config import TASKS_TO_ASK_FOR, CatalogConfig, Job, StorageConfig, load_job
from vlmflow.errors import ConfigError, InterruptedByUserError
from vlmflow.validation import describe_validation

if TYPE_CHECKING:
    from vlmflow.engine.progress import ProgressDisplay

SourceArgument = Annotated[
    str | None,
    typer.Argument(
        help="Where the images are: a folder, s3://, gs:// or az:// prefix, a manifest (.csv, .jsonl, .parquet) "
        "or .tar shards. May stand in --config instead."
    ),
]
CatalogArgument = Annotated[
    str | None, typer.Argument(help="The catalog: a folder or a prefix. May stand in --config instead.")
]
CatalogOnly = Annotated[str, typer.Argument(help="The catalog: a folder or a prefix.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A job file (YAML); options here win over it.")
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="A named set of models; `vlmflow profiles` lists them.")
]
TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", help=f"Comma-separated, of: {TASKS_TO_ASK_FOR}. Default: all but answer."),
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="Moderation policy: a YAML file, or the name of one that ships.")
]
DateOption = Annotated[
    datetime | None, typer.Option("--date", formats=["%Y-%m-%d"], help="Logical date of new rows. Default: today, UTC.")
]
RetryOption = Annotated[
    str | None,
    typer.Option(
        "--retry",
        help="Comma-separated, of: failed, partial, missing, unreadable. Rows of these statuses are due again, "
        "however often they were tried.",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        help="At most this many images, for a trial; rows of others get the manifest's columns all the same.",
    ),
]
TextOption = Annotated[
    str | None,
    typer.Option("--text-column", help="Column of the manifest whose text `match` scores against the image."),
]
QuestionOption = Annotated[
    list[str] | None,
    typer.Option("--question", help="For the task `answer`: asked of every image. May be given again and again."),
]
QuestionsOption = Annotated[
    str | None,
    typer.Option("--questions-column", help="Column of the manifest with questions to each image, one a line."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="An existing Ray cluster (auto, host:port). Default: one of its own, whatever RAY_ADDRESS "
        "says; auto takes that.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on standard output, for machines.")]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help="Endpoint of an S3-compatible store, such as http://127.0.0.1:9000, or of Azurite: "
        "http://127.0.0.1:10000/devstoreaccount1.",
    ),
]
AllowEmptyOption = Annotated[bool, typer.Option("--allow-empty", help="A source without images is no error.")]
UnboundOption = Annotated[
    bool,
    typer.Option(
        "--accept-unbound",
        help="Moderate although the policy's thresholds were not set for this model: every image becomes `review`.",
    ),
]
ReuseOption = Annotated[
    bool | None,
    typer.Option(
        "--reuse/--no-reuse", help="Copy what the catalog holds for equal bytes. Default: copy.", show_default=False
    ),
]
PreflightOption = Annotated[
    bool,
    typer.Option(
        "--preflight",
        help="Only try the models on some images, and print batch sizes, actors and hours. `preflight: true` in a job "
        "file does so before each run, and goes on with what it found.",
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, with times.")]


def make_job(
    source: str | None,
    catalog: str | None,
    config: Path | None,
    endpoint: str | None,
    *,
    tasks: str | None = None,
    retry: str | None = None,
    date: datetime | None = None,
    text_column: str | None = None,
    questions: list[str] | None = None,
    questions_column: str | None = None,
    allow_empty: bool = False,
    accept_unbound: bool = False,
    ray_address: str | None = None,
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = dict.copy,
    **options: Any,
) -> Job:
    """The job that a command line and its config file describe.

    Args:
        defaults: as :func:`vlmflow.load_job` takes them.
        options: further keys of a job, as they stand there.

    Raises:
        ConfigError: neither names a source or a catalog, or a value does not fit.
    """
    storage = {"endpoint": storage_config(endpoint).endpoint} if endpoint else None
    overrides: dict[str, Any] = {
        "source": {
            "uri": source,
            "text_column": text_column,
            "questions_column": questions_column,
            "allow_empty": allow_empty or None,
            "storage": storage,
        },
        "catalog": {"uri": catalog, "storage": storage},
        "ray": {"address": ray_address},
        "tasks": _words(tasks),
        "questions": questions or None,
        "retry": _words(retry),
        "date": None if date is None else date.date(),
        "accept_unbound": accept_unbound or None,
        **options,
    }
    if config is None and (source is None or catalog is None):
        raise ConfigError(
            "SOURCE or CATALOG is not given", remedy="Name both, in that order, or a job file that does with --config."
        )
    return load_job(config, overrides, defaults)


def moderation_job(catalog: str, config: Path | None, endpoint: str | None, profile: str | None, **options: Any) -> Job:
    """The job that moderates what a catalog holds: by the profile of its newest run, where none is named.

    Raises:
        ConfigError: no run names a profile, or as :func:`make_job`.
    """
    from vlmflow.engine.report import last_profile

    if profile is None and config is None:
        profile = last_profile(catalog_config(catalog, endpoint))
    # The catalog stands in place of a source, which is not read.
    return make_job(catalog, catalog, config, endpoint, profile=profile, tasks="embed,moderate", pools=(), **options)


def as_its_catalog(data: dict[str, Any]) -> dict[str, Any]:
    """The source of a job file that tells of none: images are read from stores that are reached as the catalog's is."""
    catalog = data.get("catalog")
    return {"source": {"storage": catalog["storage"]}} if isinstance(catalog, dict) and catalog.get("storage") else {}


def _words(text: str | None) -> list[str] | None:
    """What stands between the commas; None: the option was not given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def storage_config(endpoint: str | None) -> StorageConfig:
    """How ``--endpoint`` says that a store is reached.

    Raises:
        ConfigError: it is no url, or holds what may be secret.
    """
    try:
        return StorageConfig(endpoint=endpoint)
    except ValidationError as error:
        message = describe_validation(error, what="--endpoint").replace("endpoint: ", "", 1)
        raise ConfigError(message, remedy="Write it like http://127.0.0.1:9000.") from error


def catalog_config(uri: str, endpoint: str | None) -> CatalogConfig:
    """The catalog that a command names.

    Raises:
        ConfigError: as :func:`storage_config`.
    """
    return CatalogConfig(uri=uri, storage=storage_config(endpoint))


def catalog_of(uri: str, endpoint: str | None, job: Job | None) -> CatalogConfig:
    """The catalog that a command names; where there is a job, reached as the job says."""
    return catalog_config(uri, endpoint) if job is None else job.catalog


@contextlib.contextmanager
def shown_progress(*, as_json: bool, verbose: bool, is_kept: bool = True) -> Iterator[ProgressDisplay]:
    """The display that fits where the output goes; also what an interrupted user is told.

    Args:
        is_kept: what is committed stays after the command; False: it goes into a scratch catalog, or nowhere.
    """
    from vlmflow.engine.progress import JsonProgress, LiveProgress, LogProgress

    console = Screen(stderr=True)
    # A dumb terminal would show nothing of a live display.
    is_live = console.is_interactive and not (as_json or verbose)
    if verbose or not (as_json or is_live):
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        logging.getLogger("vlmflow").setLevel(logging.INFO)
    display: ProgressDisplay
    if as_json:
        display = JsonProgress(sys.stdout)
    elif is_live:
        display = LiveProgress(console)
    else:
        display = LogProgress()
    try:
        yield display
    except KeyboardInterrupt:
        if not is_kept:
            message, remedy = "interrupted; nothing is kept", "Run the same command again: it starts anew."
        else:
            message, remedy = "interrupted; what was committed stays", "Run the same command again to go on."
        raise InterruptedByUserError(message, remedy=remedy) from None
    finally:
        display.close()
