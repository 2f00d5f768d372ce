"""The command that explains a decision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.files import check_outputs
from vlmflow.cli.options import (
    CatalogOnly,
    ConfigOption,
    EndpointOption,
    JsonOption,
    ProfileOption,
    as_its_catalog,
    catalog_of,
    moderation_job,
)
from vlmflow.cli.screen import Screen, emit
from vlmflow.errors import ConfigError


@app.command()
def explain(
    catalog: CatalogOnly,
    image: Annotated[str, typer.Argument(help="An image_id, or a uri as the catalog has it.")],
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Draw the regions that raise the score into this .png file.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            "--label", help="Of the map: `gun`, `weapon/gun` or `gun (DETECTOR)`. Default: the one that decided."
        ),
    ] = None,
    show_flagged: Annotated[
        bool, typer.Option("--show-flagged", help="Draw the map on the image itself; else a flagged one is blurred.")
    ] = False,
    profile: ProfileOption = None,
    config: ConfigOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why an image was decided as it was: labels, margins, thresholds, view and time, policy, verdict.

    Example: `vlmflow explain catalog/ photos/1.jpg --heatmap why.png`
    """
    from vlmflow.explain import find_evidence, write_heatmap
    from vlmflow.moderation.detections import name_of
    from vlmflow.views_moderation import print_evidence

    if heatmap is None and (label is not None or show_flagged):
        option = "--show-flagged" if label is None else f"--label {label}"
        raise ConfigError(
            f"{option} is of a map, and --heatmap was not given",
            remedy="Give --heatmap FILE.png too, or leave it out: the table shows all labels.",
        )
    check_outputs(heatmap)
    job = None
    if heatmap is not None or profile is not None or config is not None:
        job = moderation_job(catalog, config, endpoint, profile, accept_unbound=True, defaults=as_its_catalog)
    evidence = find_evidence(catalog_of(catalog, endpoint, job), image)
    drawn = None
    if heatmap is not None and job is not None:
        drawn = write_heatmap(job, evidence, heatmap, label=label, show_flagged=show_flagged)
    if as_json:
        emit(evidence.model_dump_json())
        return
    console = Screen()
    print_evidence(evidence, console)
    if drawn is not None:
        shown = f"{name_of(drawn)} on view {drawn['view']}"
        console.print(f"{heatmap}: what raises {shown}, in red", markup=False, soft_wrap=True)
