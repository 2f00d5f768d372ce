"""The command that puts a catalog under another policy."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.options import (
    AddressOption,
    CatalogOnly,
    ConfigOption,
    EndpointOption,
    JsonOption,
    PolicyOption,
    ProfileOption,
    UnboundOption,
    VerboseOption,
    moderation_job,
    shown_progress,
)
from vlmflow.cli.screen import show_result
from vlmflow.errors import ConfigError


@app.command()
def remoderate(
    catalog: CatalogOnly,
    policy: PolicyOption = None,
    profile: ProfileOption = None,
    config: ConfigOption = None,
    where: Annotated[
        str | None, typer.Option("--where", help="Only rows of which this SQL condition is true (DuckDB).")
    ] = None,
    start: Annotated[
        datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="First ingest date. Default: all.")
    ] = None,
    end: Annotated[datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="Last ingest date.")] = None,
    rollback: Annotated[
        str | None,
        typer.Option("--rollback", help="Digest of a policy, or its beginning: its rows go back to the one before."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change; write nothing.")] = False,
    ray_address: AddressOption = None,
    endpoint: EndpointOption = None,
    accept_unbound: UnboundOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Put the rows of CATALOG under another moderation policy, without reading an image.

    Labels and decisions are computed anew from the stored embeddings, by the very function that `enrich` uses; where
    only thresholds changed, from the stored margins. Interrupt it whenever you like: the same command goes on.

    Example: `vlmflow remoderate catalog/ --policy stricter.yaml --dry-run`
    """
    from vlmflow.engine.remoderate import remoderate as run
    from vlmflow.engine.scope import Scope
    from vlmflow.views_moderation import print_remoderation

    if policy is not None and rollback is not None:
        raise ConfigError(
            f"remoderate was given --policy {policy} and --rollback {rollback}",
            remedy="Give one of them: a rollback goes to the policy that each row had before.",
        )
    if policy is None and rollback is None and config is None:
        raise ConfigError("remoderate takes --policy or --rollback, one of them", remedy="Name a policy to go to.")
    job = moderation_job(
        catalog, config, endpoint, profile, policy=policy, ray_address=ray_address, accept_unbound=accept_unbound
    )
    scope = Scope(start and start.date(), end and end.date(), where)
    with shown_progress(as_json=as_json, verbose=verbose) as display:
        report = run(job, scope=scope, rollback=rollback, dry_run=dry_run, progress=display)
    show_result(report, print_remoderation, as_json=as_json)
