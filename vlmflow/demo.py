"""The demo: the catalog that ships with the package, enriched by the models that ship with it. No network."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.engine import RunReport, enrich
from vlmflow.engine.progress import ProgressDisplay
from vlmflow.report.write import write_report
from vlmflow.storage import parse_address
from vlmflow.summary import summarize
from vlmflow.views import print_report, print_summary

_NUM_MISFITS = 5


def demo_job(catalog: str) -> Job:
    """The demo's job: the shipped manifest, the starter models, the demo policy, two questions."""
    manifest = Path(str(resources.files("vlmflow"))) / "starter" / "demo" / "manifest.csv"
    return Job(
        source=SourceConfig(uri=str(manifest), text_column="title"),
        catalog=CatalogConfig(uri=catalog),
        profile="starter",
        policy="demo",
        tasks=("embed", "moderate", "caption", "match", "answer"),
        questions=("what is in the picture?", "what color is the background?"),
    )


def run_demo(catalog: str, display: ProgressDisplay, console: Console) -> RunReport:
    """Enriches the demo catalog and prints what came out of it, and where to look."""
    job = demo_job(catalog)
    report = enrich(job, progress=display)
    display.close()
    print_report(report, console)
    console.print()
    print_summary(summarize(job.catalog), console)
    _print_misfits(job.catalog, console)
    page = write_report(job.catalog, _page(job.catalog)).path
    shown = escape(catalog)
    word = escape(shlex.quote(catalog))
    console.print(
        """
The starter models know drawings of a small world; `vlmflow profiles` names those for photographs.
Open in a browser, to see what the run did, what was flagged and why, what does not fit its title:""",
        highlight=False,
    )
    # What is copied is on lines that nothing folds.
    console.print(
        f"""  {escape(str(page))}
Look further:
  vlmflow show {word}
  vlmflow serve {word}                    search it and review it in your browser
  vlmflow export {word} demo-parquet      plain Parquet, for any reader
  vlmflow demo {word}                     once more: nothing is due
In Python:
  vlmflow.Catalog.open(vlmflow.CatalogConfig(uri="{shown}")).images()""",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"Anywhere else: {shown}/images and {shown}/embeddings are Delta tables (polars.read_delta, Spark, Trino, ...)",
        highlight=False,
    )
    return report


def _page(catalog: CatalogConfig) -> Path:
    """Where the report goes: into the catalog's folder, or here for a catalog in a bucket."""
    address = parse_address(catalog.uri)
    return Path(address.path) / "report.html" if address.is_local else Path("report.html")


def _print_misfits(config: CatalogConfig, console: Console) -> None:
    rows = Catalog.open(config).images(["uri", "caption", "text_itm", "source"])
    rows = rows.filter(rows["text_itm"].is_valid()).sort_by("text_itm").slice(0, _NUM_MISFITS)
    table = Table("title that fits least", "caption", "text match", box=None, pad_edge=False, header_style="dim")
    for row in rows.to_pylist():
        table.add_row(escape(row["source"]["title"]), escape(row["caption"] or "-"), f"{row['text_itm']:.2f}")
    console.print(table)
