"""What the command line prints of a catalog's upkeep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from vlmflow.catalog import EraseResult, VacuumResult

_KINDS = {
    "orphan": "files of runs that never committed them",
    "staged": "staged files of runs that are over",
    "old": "files of old versions",
}


def print_vacuum(result: VacuumResult, console: Console) -> None:
    """Prints what a vacuum removed and what it left."""
    total, size = sum(result.num_files.values()), sum(result.num_bytes.values())
    verb = "would remove" if result.dry_run else "removed"
    console.print(f"[bold]{verb} {total:,} files[/bold], {size / 1e6:,.1f} MB")
    for kind, text in _KINDS.items():
        if result.num_files[kind]:
            console.print(f"  {result.num_files[kind]:,} {text}, {result.num_bytes[kind] / 1e6:,.1f} MB")
    if result.revoked:
        verb = "would be" if result.dry_run else "are"
        console.print(f"{len(result.revoked)} dead runs {verb} shut out from committing: {', '.join(result.revoked)}")
    if result.num_kept:
        console.print(f"{result.num_kept:,} files of old versions stay for the retention")
    if result.live_runs:
        console.print(f"{len(result.live_runs)} runs are at work; their {result.num_pending:,} uncommitted files stay")
    if result.num_foreign:
        console.print(
            f"[yellow]{result.num_foreign:,} files are not vlmflow's and stay[/yellow], such as "
            + escape(", ".join(result.foreign))
        )
    if result.failed:
        console.print(f"[red]{len(result.failed):,} files could not be deleted; run it again[/red]")


def print_erasure(result: EraseResult, console: Console) -> None:
    """Prints what an erasure removed, and what is left to do."""
    console.print(
        f"[bold]{result.num_images:,} images erased[/bold]: {result.num_rows:,} rows, {result.num_vectors:,} vectors, "
        f"{result.num_reviews:,} verdicts, {result.num_files:,} older files, {result.num_records:,} records"
    )
    if result.live_runs:
        console.print(
            f"[yellow]not finished:[/yellow] {', '.join(result.live_runs)} at work may hold them in files not yet "
            "committed, and will not commit them; run the same command again when they are over"
        )
    if result.failed:
        console.print(f"[red]{len(result.failed):,} files could not be deleted; run the same command again[/red]")
