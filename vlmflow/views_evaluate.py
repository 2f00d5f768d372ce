"""What the command line prints of an evaluation: figures, what they are broken down by, and the field's beside ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vlmflow.views_search import printable, table_of

if TYPE_CHECKING:
    from vlmflow.evaluation import EvaluationReport, Figure

_MAX_GROUPS = 40


def print_evaluation(report: EvaluationReport, console: Console) -> None:
    """Prints the figures in per cent, as the field does (CIDEr too)."""
    models = ", ".join(dict.fromkeys(report.models.values())) or "predictions from a file"
    head = f"{report.task} on {report.dataset}: {report.num_images:,} images, {models}"
    console.print(f"[bold]{escape(printable(head))}[/bold]", highlight=False)
    if report.num_missing:
        how = "review" if report.task == "moderate" else "wrong"  # moderation fails closed
        console.print(f"[yellow]{report.num_missing:,} without a result count as {how}[/yellow]", highlight=False)
    table = table_of("figure", "%", "95% interval", "of")
    for name, figure in report.figures.items():
        table.add_row(escape(name), *_cells(figure))
    console.print(table)
    for group, members in report.groups.items():
        _print_group(group, members, console)
    if report.published:
        _print_published(report, console)
    for note in report.notes:
        console.print(escape(printable(note)), style="dim", highlight=False)
    kept = f", kept in {report.catalog}" if report.catalog else ""
    console.print(escape(f"{report.seconds:.1f} s{kept}"), style="dim", highlight=False)


def _print_group(group: str, members: dict[str, dict[str, Figure]], console: Console) -> None:
    names = list(dict.fromkeys(name for figures in members.values() for name in figures))
    table = table_of(group, *(f"{name} %" for name in names), "of")
    for member, figures in list(members.items())[:_MAX_GROUPS]:
        most = max((figure.num or 0 for figure in figures.values()), default=0)
        cells = [_percent(figures[name].value) if name in figures else "-" for name in names]
        table.add_row(escape(printable(member)), *cells, f"{most:,}")
    console.print()
    console.print(table)
    if len(members) > _MAX_GROUPS:
        console.print(f"and {len(members) - _MAX_GROUPS:,} more, which --json shows", style="dim", highlight=False)


def _print_published(report: EvaluationReport, console: Console) -> None:
    """Ours first, then the papers' rows, with the figures that any of them has."""
    names = [name for name in report.figures if any(name in row.figures for row in report.published)]
    table = table_of("model", *(f"{name} %" for name in names), "setting", "source")
    ours = [_percent(report.figures[name].value) for name in names]
    table.add_row("[bold]this run[/bold]", *ours, escape(report.profile or "predictions"), "")
    for row in report.published:
        cells = [_percent(row.figures.get(name)) for name in names]
        table.add_row(escape(row.model), *cells, escape(row.setting), escape(row.source))
    console.print()
    console.print(table)


def _cells(figure: Figure) -> tuple[str, str, str]:
    interval = "" if figure.low is None else f"{_percent(figure.low)} to {_percent(figure.high)}"
    return _percent(figure.value), interval, "" if figure.num is None else f"{figure.num:,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
