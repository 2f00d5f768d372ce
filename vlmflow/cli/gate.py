"""Commands of the quality gate: accept the values of a golden set, and hold a job's models against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.files import check_outputs
from vlmflow.cli.options import (
    AddressOption,
    EndpointOption,
    JsonOption,
    PolicyOption,
    ProfileOption,
    TasksOption,
    UnboundOption,
    VerboseOption,
    make_job,
    shown_progress,
    storage_config,
)
from vlmflow.cli.screen import Screen
from vlmflow.config import Job, SourceConfig
from vlmflow.errors import RegressionError

gate_app = typer.Typer(
    no_args_is_help=True,
    help="""Hold a job's models against accepted values of a golden set: a few known images.

Put `check` before every run that writes: a wrong checkpoint or a changed library is found before it fills the table.
The nightly flow does.
""",
)
app.add_typer(gate_app, name="gate")

_Golden = Annotated[
    str | None, typer.Argument(help="A few images that represent the catalog. Default: the job file's source.")
]
_Accepted = Annotated[Path, typer.Option("--accepted", help="File of accepted values (JSON); keep it under versions.")]
_Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="The job file (YAML) of the run that the gate stands before.")
]
_Scratch = Annotated[
    str | None,
    typer.Option("--scratch", help="Folder or prefix for a temporary catalog, which all nodes of a cluster reach."),
]


@gate_app.command("accept")
def accept(
    golden: _Golden = None,
    accepted: _Accepted = Path("accepted.json"),
    config: _Config = None,
    profile: ProfileOption = None,
    tasks: TasksOption = None,
    policy: PolicyOption = None,
    scratch: _Scratch = None,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    accept_unbound: UnboundOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Enrich GOLDEN with the job's models and write what came out as the accepted values.

    Look at the values before you keep them: they are what later runs are held against.

    Example: `vlmflow gate accept golden/ --config job.yaml --accepted accepted.json`
    """
    from vlmflow.gate import golden_values, write_accepted
    from vlmflow.views_gate import print_values

    check_outputs(accepted)
    job, source = _job(golden, config, profile, tasks, policy, ray_address, endpoint, accept_unbound)
    with shown_progress(as_json=as_json, verbose=verbose, is_kept=False) as display:
        values = golden_values(job, source, scratch=scratch, progress=display)
    write_accepted(accepted, values)
    if as_json:
        typer.echo(json.dumps({"event": "report", "accepted": str(accepted), "num_images": len(values.images)}))
    else:
        print_values(values, accepted, Screen())


@gate_app.command("check")
def check(
    golden: _Golden = None,
    accepted: _Accepted = Path("accepted.json"),
    config: _Config = None,
    profile: ProfileOption = None,
    tasks: TasksOption = None,
    policy: PolicyOption = None,
    min_equal_captions: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of captions that must be equal, word for word.")
    ] = 0.95,
    max_margin_shift: Annotated[
        float,
        typer.Option(min=0, help="How far a label's margins or detector scores may move: mean of the absolute shift."),
    ] = 0.02,
    scratch: _Scratch = None,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    accept_unbound: UnboundOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Enrich GOLDEN with the job's models and compare with the accepted values. Exit code 1: a regression.

    A decision that flips toward `allow`, an accepted image, caption or score that does not come out, and drift beyond
    the limits are regressions. The job's catalog is not touched.

    Example: `vlmflow gate check golden/ --config job.yaml --accepted accepted.json`
    """
    from vlmflow.gate import GateLimits, compare, golden_values, read_accepted
    from vlmflow.views_gate import print_gate

    expected = read_accepted(accepted)
    job, source = _job(golden, config, profile, tasks, policy, ray_address, endpoint, accept_unbound)
    with shown_progress(as_json=as_json, verbose=verbose, is_kept=False) as display:
        observed = golden_values(job, source, scratch=scratch, progress=display)
    limits = GateLimits(min_equal_captions=min_equal_captions, max_margin_shift=max_margin_shift)
    report = compare(expected, observed, limits)
    if as_json:
        typer.echo(json.dumps({"event": "report", **report.model_dump(mode="json")}))
    else:
        print_gate(report, Screen())
    if not report.passed:
        raise typer.Exit(RegressionError.exit_code)


def _job(
    golden: str | None,
    config: Path | None,
    profile: str | None,
    tasks: str | None,
    policy: str | None,
    ray_address: str | None,
    endpoint: str | None,
    accept_unbound: bool,
) -> tuple[Job, SourceConfig]:
    """The job, and the golden set as its source: the set's columns are named as those of the job's own source."""
    job = make_job(
        golden if config is None else None,
        "unused" if config is None else None,  # a scratch catalog takes the place of the job's
        config,
        endpoint,
        profile=profile,
        tasks=tasks,
        policy=policy,
        ray_address=ray_address,
        accept_unbound=accept_unbound,
    )
    if golden is None:
        return job, job.source
    storage = storage_config(endpoint) if endpoint else job.source.storage
    # Not its `columns`: the set need not have them, and nothing of it is kept.
    update = {"uri": golden, "kind": "auto", "columns": None, "storage": storage}
    return job, job.source.model_copy(update=update)
