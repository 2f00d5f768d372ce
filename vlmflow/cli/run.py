"""Commands that run images: enrich, plan, demo."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.options import (
    AddressOption,
    AllowEmptyOption,
    CatalogArgument,
    ConfigOption,
    DateOption,
    EndpointOption,
    JsonOption,
    LimitOption,
    PolicyOption,
    PreflightOption,
    ProfileOption,
    QuestionOption,
    QuestionsOption,
    RetryOption,
    ReuseOption,
    SourceArgument,
    TasksOption,
    TextOption,
    UnboundOption,
    VerboseOption,
    make_job,
    shown_progress,
)
from vlmflow.cli.screen import Screen, show_result
from vlmflow.config import Job
from vlmflow.errors import ConfigError


@app.command()
def enrich(
    source: SourceArgument = None,
    catalog: CatalogArgument = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    tasks: TasksOption = None,
    policy: PolicyOption = None,
    text_column: TextOption = None,
    question: QuestionOption = None,
    questions_column: QuestionsOption = None,
    date: DateOption = None,
    retry: RetryOption = None,
    limit: LimitOption = None,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    allow_empty: AllowEmptyOption = False,
    accept_unbound: UnboundOption = False,
    reuse: ReuseOption = None,
    preflight: PreflightOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Enrich the images of SOURCE into CATALOG: whatever is due, and nothing else.

    New and changed images, tasks that are new, and tasks whose model changed are due. Rows of other images get the
    values that a manifest has of its own columns now, without reading the image. Interrupt it whenever you like: the
    same command goes on where it stopped.

    Of images at http(s) urls a change is seen by a column `etag` of the manifest, or by asking for them again after
    `source.http.recheck_days` of a job file; `vlmflow plan` counts those of which it is not.

    Example: `vlmflow enrich photos/ catalog/ --profile base --policy marketplace --accept-unbound`
    """
    from vlmflow.engine import enrich as run
    from vlmflow.engine import preflight as try_out
    from vlmflow.views import print_report
    from vlmflow.views_preflight import print_preflight

    job = make_job(
        source,
        catalog,
        config,
        endpoint,
        profile=profile,
        tasks=tasks,
        policy=policy,
        text_column=text_column,
        questions=question,
        questions_column=questions_column,
        date=date,
        retry=retry,
        limit=limit,
        ray_address=ray_address,
        allow_empty=allow_empty,
        accept_unbound=accept_unbound,
        reuse=reuse,
    )
    _check_read(job, policy, text_column, question, questions_column)
    if preflight:
        with shown_progress(as_json=False, verbose=verbose, is_kept=False) as display:
            tried = try_out(job, progress=display)
        show_result(tried, print_preflight, as_json=as_json)
        return
    with shown_progress(as_json=as_json, verbose=verbose) as display:
        report = run(job, progress=display)
    if as_json:
        typer.echo(json.dumps({"event": "report", **report.model_dump(mode="json")}))
    else:
        print_report(report, Screen())


@app.command()
def plan(
    source: SourceArgument = None,
    catalog: CatalogArgument = None,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    tasks: TasksOption = None,
    policy: PolicyOption = None,
    text_column: TextOption = None,
    question: QuestionOption = None,
    questions_column: QuestionsOption = None,
    date: DateOption = None,
    retry: RetryOption = None,
    limit: LimitOption = None,
    endpoint: EndpointOption = None,
    allow_empty: AllowEmptyOption = False,
    accept_unbound: UnboundOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what `enrich` would do, by task and reason, and how many other rows would get the manifest's columns anew.

    Reads the listing and the catalog; runs and writes nothing.
    """
    from vlmflow.engine import plan as make_plan
    from vlmflow.views import print_plan

    job = make_job(
        source,
        catalog,
        config,
        endpoint,
        profile=profile,
        tasks=tasks,
        policy=policy,
        text_column=text_column,
        questions=question,
        questions_column=questions_column,
        date=date,
        retry=retry,
        limit=limit,
        allow_empty=allow_empty,
        accept_unbound=accept_unbound,
    )
    _check_read(job, policy, text_column, question, questions_column)
    summary = make_plan(job)
    show_result(summary, print_plan, as_json=as_json)


def _check_read(
    job: Job, policy: str | None, text_column: str | None, question: list[str] | None, questions_column: str | None
) -> None:
    """Refuses an option that was given for a task that will not run."""
    options = {
        "--policy": (policy, "moderate"),
        "--text-column": (text_column, "match"),
        "--question": (question, "answer"),
        "--questions-column": (questions_column, "answer"),
    }
    for option, (given, task) in options.items():
        if given and task not in job.tasks:
            raise ConfigError(
                f"{option} is for the task {task}, and the tasks are {', '.join(job.tasks)}",
                remedy=f"Add {task} to --tasks, or leave {option} out.",
            )


@app.command()
def demo(
    catalog: Annotated[str, typer.Argument(help="Where to put the demo's catalog.")] = "demo-catalog",
    verbose: VerboseOption = False,
) -> None:
    """Enrich the demo images with the starter models, with no network, and show what came out."""
    from vlmflow.demo import run_demo

    with shown_progress(as_json=False, verbose=verbose) as display:
        run_demo(catalog, display, Screen())
