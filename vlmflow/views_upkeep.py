"""What the command line prints of a catalog's upkeep."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from vlmflow.catalog import EraseResult, VacuumResult, Verification

_REMEDIES = {
    "missing": "vlmflow enrich",
    "stale": "vlmflow enrich",
    "lost_files": "restore them from a backup, or from a version of the bucket",
    "lost_vectors": "vlmflow enrich --tasks embed, after restoring what can be",
    "orphan_files": "vlmflow vacuum",
    "dead_runs": "vlmflow vacuum",
    "given_up": "vlmflow enrich --retry failed,partial,missing",
    "old_fingerprint": "vlmflow enrich",
}
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
        f"{result.num_reviews:,} verdicts, {result.num_files:,} older files, {result.num_index_files:,} index files, "
        f"{result.num_records:,} records"
    )
    if result.live_runs:
        console.print(
            f"[yellow]not finished:[/yellow] {', '.join(result.live_runs)} at work may hold them in files not yet "
            "committed, and will not commit them; run the same command again when they are over"
        )
    if result.failed:
        console.print(f"[red]{len(result.failed):,} files could not be deleted; run the same command again[/red]")


def print_verification(found: Verification, console: Console) -> None:
    """Prints what was found, errors first."""
    from vlmflow.catalog.verify import ERRORS, WARNINGS

    console.print(f"{found.num_listed:,} images in the source, {found.num_rows:,} rows in the catalog")
    if found.num_erased:
        console.print(f"{found.num_erased:,} images of the source were erased from the catalog and count for neither")
    for texts, level in ((ERRORS, "[red]error[/red]"), (WARNINGS, "[yellow]warning[/yellow]")):
        for kind, text in texts.items():
            finding = found.findings.get(kind)
            if finding is None:
                continue
            tasks = ", ".join(f"{task} {count:,}" for task, count in finding.tasks.items())
            console.print(f"{level}: {finding.count:,} {text}" + (f" ({tasks})" if tasks else ""))
            for example in finding.examples:  # on a line of its own, never folded: it will be copied
                console.print(f"    {example}", style="dim", soft_wrap=True, markup=False)
            if kind in _REMEDIES:
                console.print(f"  remedy: {_REMEDIES[kind]}")
    if found.is_sound:
        console.print("[green]every image has its row, and every row its files[/green]")


def verification_as_json(found: Verification) -> str:
    """The verification as one JSON object."""
    return json.dumps({"is_sound": found.is_sound, **dataclasses.asdict(found)})
