"""Commands about policies: list, check, diff; and calibrate, which sets their thresholds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlmflow.cli.app import app
from vlmflow.cli.options import EndpointOption, JsonOption, ProfileOption, catalog_config

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
        print_policies(policies, Console())


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
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        print_policy_check(report, Console())
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
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        print_policy_diff(found, Console())


def _load(name: str, endpoint: str | None) -> Policy:
    from vlmflow.moderation.policy import load_policy

    catalog, at, digest = name.rpartition("@")
    if not at or Path(name).suffix in (".yaml", ".yml"):
        return load_policy(name)
    from vlmflow.catalog import Catalog
    from vlmflow.engine.archive import archived_policy, full_digest

    opened = Catalog.open(catalog_config(catalog, endpoint))
    return archived_policy(opened, full_digest(opened, digest))
