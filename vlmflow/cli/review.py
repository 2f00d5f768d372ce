"""Commands about review by people: export a queue, import verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.files import check_outputs
from vlmflow.cli.options import CatalogOnly, EndpointOption, JsonOption, catalog_config
from vlmflow.cli.screen import show_result

review_app = typer.Typer(
    name="review", no_args_is_help=True, help="Send images to people, and take their verdicts into the catalog."
)
app.add_typer(review_app)


@review_app.command("export")
def export_command(
    catalog: CatalogOnly,
    output: Annotated[Path, typer.Argument(help="queue.parquet, queue.csv, or queue.json (tasks for Label Studio).")],
    near: Annotated[int, typer.Option(min=0, help="Images whose labels are nearest to a threshold.")] = 100,
    disagreement: Annotated[
        int, typer.Option(min=0, help="Images whose labels, caption, match scores or detectors contradict each other.")
    ] = 50,
    random: Annotated[
        int,
        typer.Option(
            min=0, help="An audit sample, with weights that `calibrate` takes into account; for rare labels thousands."
        ),
    ] = 50,
    seed: Annotated[int, typer.Option(help="Of the audit sample.")] = 0,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the images that a person should look at.

    Fill in `verdict` (allow, review, block; none takes an earlier one back), or `label` and `value` (true, false), and
    `reviewer`; then import the file. Images with a verdict on their present bytes are left out, and those with labels
    said of these: once a queue is imported, the next one holds others.

    Example: `vlmflow review export catalog/ queue.csv --near 200`
    """
    from vlmflow.moderation.queue import QueueSizes
    from vlmflow.review import export_queue
    from vlmflow.views_moderation import print_queue

    check_outputs(output)
    sizes = QueueSizes(near, disagreement, random)
    report = export_queue(catalog_config(catalog, endpoint), output, sizes=sizes, seed=seed)
    show_result(report, print_queue, as_json=as_json)


@review_app.command("import")
def import_command(
    catalog: CatalogOnly,
    source: Annotated[Path, typer.Argument(help="A file as `review export` writes it, or an export of Label Studio.")],
    reviewer: Annotated[str | None, typer.Option(help="Who judged, where the file does not say.")] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take people's verdicts into the catalog. They win over models and policies until an image's bytes change.

    Of several verdicts on one image the newest counts: by its time in the column `at`, or without one by the time when
    the file was last changed. Importing a file twice, or a copy of it, changes nothing: a row without a time that
    repeats what the same person said before keeps the time of then. To say it again after somebody decided otherwise,
    fill in `at`. Verdicts on images that have changed since the export are left out and counted, and labels without a
    value. Of Label Studio the labels that are ticked are true; that the others do not hold it does not say, and
    `calibrate` needs labels of which that is said.

    Example: `vlmflow review import catalog/ queue.csv --reviewer ada`
    """
    from vlmflow.review import import_verdicts
    from vlmflow.views_moderation import print_review

    report = import_verdicts(catalog_config(catalog, endpoint), source, reviewer=reviewer)
    show_result(report, print_review, as_json=as_json)
