"""What the command line prints of the quality gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmflow.views_search import printable

if TYPE_CHECKING:
    from vlmflow.gate import GateReport, GoldenValues


def print_values(values: GoldenValues, path: Path, console: Console) -> None:
    """Prints the values of a golden set, for a person to accept or not."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("image", "status", "decision", "caption"):
        table.add_column(column, overflow="fold")
    for image in values.images.values():
        cells = (image.name, image.status, image.decision, image.caption or "-")
        table.add_row(*(escape(printable(cell)) for cell in cells))
    console.print(table)
    console.print(
        f"[bold]{len(values.images):,} images[/bold] of profile {escape(values.profile)}, "
        f"policy {escape(values.policy or 'none')}: accepted values written to {escape(str(path))}. "
        "Look at them, and keep the file under versions."
    )


def print_gate(report: GateReport, console: Console) -> None:
    """Prints whether the gate is open, and what differs."""
    verdict = "[green]gate open[/green]" if report.passed else "[red]gate closed: a regression[/red]"
    facts = [f"{report.num_images:,} images"]
    if report.equal_captions is not None:
        facts.append(f"{report.equal_captions:.1%} of captions equal")
    if report.margin_shift is not None:
        facts.append(f"largest mean shift of margins {report.margin_shift:.4f}")
    console.print(f"[bold]{verdict}[/bold]: {', '.join(facts)}")
    for problem in report.problems:
        console.print(f"[red]-[/red] {escape(printable(problem))}", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]-[/yellow] {escape(printable(note))}", highlight=False)
    if not report.passed:
        console.print(
            "If the change is meant, look at the new values and accept them: `vlmflow gate accept`.", highlight=False
        )
