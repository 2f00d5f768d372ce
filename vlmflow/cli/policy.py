"""Commands about policies: list, show, check, diff; and calibrate, which sets their thresholds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.files import check_outputs, write_output
from vlmflow.cli.options import (
    CatalogOnly,
    ConfigOption,
    EndpointOption,
    JsonOption,
    ProfileOption,
    catalog_config,
    moderation_job,
)
from vlmflow.cli.screen import Screen, emit, show_result
from vlmflow.errors import ConfigError, PolicyError
from vlmflow.paths import is_there

if TYPE_CHECKING:
    from vlmflow.moderation.policy import Policy

policy_app = typer.Typer(
    name="policy", no_args_is_help=True, help="Look at moderation policies, check and compare them."
)
app.add_typer(policy_app)

PolicyArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a policy that ships.")]
_COMPARED = "A YAML file, the name of a policy that ships, or CATALOG@DIGEST of one that a catalog keeps."


@policy_app.command("list")
def list_policies(as_json: JsonOption = False) -> None:
    """List the policies that ship."""
    from vlmflow.moderation.policy import load_policy, shipped_policies
    from vlmflow.views_policy import print_policies

    policies = [load_policy(name) for name in shipped_policies()]
    if as_json:
        shown = [
            {
                "name": policy.name,
                "version": policy.version,
                "digest": policy.digest,
                "description": policy.description,
                "labels": ["/".join(ref) for ref in policy.labels],
                "bindings": [binding.model for binding in policy.bindings],
            }
            for policy in policies
        ]
        typer.echo(json.dumps(shown))
    else:
        print_policies(policies, Screen())


@policy_app.command()
def show(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help=_COMPARED)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it into this file instead.")] = None,
    endpoint: EndpointOption = None,
) -> None:
    """Print the YAML of POLICY: one that ships as the beginning of yours, or one that a catalog keeps, to go back to.

    A file that is there already is not overwritten.

    Example: `vlmflow policy show catalog/@9f3c12ab --output before.yaml`
    """
    from vlmflow.moderation.policy import read_text, to_yaml

    check_outputs(output)
    if output is not None and is_there(output):
        raise PolicyError(f"policy {output}: is there already", remedy="Name another file with --output.")
    text = to_yaml(_load(policy, endpoint)) if _is_kept(policy) else read_text(policy)
    if output is None:
        emit(text, end="")
    else:
        write_output(output, text)


@policy_app.command()
def check(
    file: PolicyArgument,
    profile: ProfileOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail the check too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check FILE: schema, prompts that stand twice, thresholds, bindings. Exit code 2 where there are errors.

    With `--profile` the text tower of that profile's embedder also says which prompts it hardly tells apart: those
    closer to each other than 99% of the pairs of neutral prompts are.

    Example: `vlmflow policy check mine.yaml --profile starter`
    """
    from vlmflow.moderation.check import check_policy
    from vlmflow.views_policy import print_policy_check

    embedder = identity = None
    if profile is not None:
        from vlmflow.config import Job
        from vlmflow.models import identify, load_embedder, resolve_models

        # Of the job only the profile counts: nothing is listed and nothing written.
        job = Job.model_validate(
            {"source": {"uri": "."}, "catalog": {"uri": "."}, "profile": profile, "tasks": ["embed"]}
        )
        config = resolve_models(job)["embed"]
        embedder, identity = load_embedder(config, "cpu"), identify("embed", config)
    report = check_policy(file, embedder=embedder, identity=identity)
    show_result(report, print_policy_check, as_json=as_json)
    if report.count("error") or (strict and report.count("warning")):
        raise typer.Exit(2)


@policy_app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help=_COMPARED)],
    after: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two policies: labels, prompts, thresholds, bindings; and what a catalog needs to go from A to B.

    Example: `vlmflow policy diff catalog/@9f3c12ab stricter.yaml`
    """
    from vlmflow.moderation.diff import diff_policies
    from vlmflow.views_policy import print_policy_diff

    found = diff_policies(_load(before, endpoint), _load(after, endpoint))
    show_result(found, print_policy_diff, as_json=as_json)


def _load(name: str, endpoint: str | None) -> Policy:
    from vlmflow.moderation.policy import load_policy

    if not _is_kept(name):
        return load_policy(name)
    from vlmflow.catalog import Catalog
    from vlmflow.engine.archive import archived_policy, full_digest

    catalog, _, digest = name.rpartition("@")
    opened = Catalog.open(catalog_config(catalog, endpoint))
    return archived_policy(opened, full_digest(opened, digest))


def _is_kept(name: str) -> bool:
    """Whether a policy is named as one that a catalog keeps."""
    from vlmflow.moderation.policy import POLICY_SUFFIXES

    return "@" in name and Path(name).suffix not in POLICY_SUFFIXES


@app.command()
def calibrate(
    catalog: CatalogOnly,
    policy: Annotated[str, typer.Option("--policy", help="A YAML file, or the name of a policy that ships.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            help="Verdicts, Parquet or CSV: image_id or uri, label, value (true, false); weight and content_hash "
            "if there are any; so a queue of `review export`, filled in. Default: those on labels that `review import` "
            "brought in.",
        ),
    ] = None,
    profile: ProfileOption = None,
    config: ConfigOption = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="To block at: 0.95, or LABEL=0.99 for one label. May be repeated."),
    ] = None,
    recall: Annotated[
        list[str] | None,
        typer.Option("--recall", help="To review at: 0.9, or LABEL=0.99 for one label. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new policy file. Default: NAME-vVERSION.yaml.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write a report: .html or .json.")] = None,
    accept_uncalibrated: Annotated[
        bool,
        typer.Option("--accept-uncalibrated", help="Labels without verdicts enough decide by the policy's thresholds."),
    ] = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set a policy's thresholds by people's verdicts on images of CATALOG, and write its next version.

    Per label a curve turns margins into probabilities; `block` starts where the precision asked for is reached,
    `review` where the recall is. Labels with fewer than 20 verdicts of either kind stay as they are.

    Example: `vlmflow calibrate catalog/ --labels verdicts.parquet --policy mine.yaml --report calibration.html`
    """
    from vlmflow.calibration import calibrate as run
    from vlmflow.moderation.calibrate import Targets
    from vlmflow.moderation.calibration_report import calibration_html
    from vlmflow.views_policy import print_calibration

    if report is not None and report.suffix not in (".html", ".json"):
        raise ConfigError(f"--report {report}: neither .html nor .json", remedy="Name an .html or .json file.")
    check_outputs(report)  # once the policy is written it is too late: the next version is there then
    job = moderation_job(catalog, config, endpoint, profile, policy=policy, accept_unbound=True)
    precisions, recalls = _targets("precision", precision, 0.95), _targets("recall", recall, 0.9)
    targets = Targets(precision=precisions.pop(""), recall=recalls.pop(""), precisions=precisions, recalls=recalls)
    done = run(job, labels, output=output, targets=targets, accept_uncalibrated=accept_uncalibrated)
    if report is not None:
        write_output(report, calibration_html(done) if report.suffix == ".html" else done.model_dump_json(indent=2))
    show_result(done, print_calibration, as_json=as_json)


def _targets(name: str, given: list[str] | None, default: float) -> dict[str, float]:
    """Targets by label; under the empty name, that of all others."""
    targets = {"": default}
    for text in given or ():
        label, _, value = text.rpartition("=")
        try:
            targets[label] = float(value)
        except ValueError as error:
            raise ConfigError(f"--{name} {text}: no number", remedy="Write 0.9, or LABEL=0.9.") from error
        if not 0 < targets[label] < 1:
            raise ConfigError(f"--{name} {text}: not between 0 and 1", remedy="Write a share such as 0.9.")
    return targets
