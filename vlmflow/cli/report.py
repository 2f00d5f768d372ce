"""The command that writes a page about a catalog and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.app import app
from vlmflow.cli.files import check_outputs
from vlmflow.cli.options import CatalogOnly, ConfigOption, EndpointOption, JsonOption, catalog_of
from vlmflow.cli.screen import emit
from vlmflow.cli.search import query_job


@app.command()
def report(
    catalog: CatalogOnly,
    run: Annotated[str | None, typer.Option("--run", help="Id of a run. Default: the newest that wrote rows.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    config: ConfigOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one page about CATALOG: what a run did, score distributions, what is newly flagged, examples, duplicates.

    It works from a file, offline. Flagged images are blurred until clicked; the clear small pictures are in the file.
    With --config images are read as that job's `source.http`, `source.storage` and `source.bytes_column` say.

    Example: `vlmflow report catalog/ -o report.html`
    """
    from vlmflow.report.write import write_report

    check_outputs(output)
    job = query_job(catalog, None, config, endpoint, has_queries=False)
    written = write_report(catalog_of(catalog, endpoint, job), output, run=run, job=job)
    if as_json:
        emit(written.model_dump_json())
    else:
        typer.echo(
            f"{written.path}: {written.size_bytes / 1e6:.1f} MB, {written.num_rows:,} of {written.num_images:,} rows, "
            f"{written.num_pictures:,} pictures"
        )
