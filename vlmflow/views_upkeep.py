"""What the command line prints of a catalog's upkeep."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vlmflow.views_search import printable, table_of

if TYPE_CHECKING:
    from pathlib import Path

    from vlmflow.catalog import EraseResult, VacuumResult, Verification
    from vlmflow.catalog.follow import ChangesResult
    from vlmflow.erasure import Images

_NUM_NAMES = 5  # of addresses that were not found
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
    if result.num_records:
        console.print(f"{verb} {counted(result.num_records, 'record')} of upkeep")
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
            + escape(", ".join(map(printable, result.foreign)))
        )
    if result.failed:
        console.print(f"[red]{len(result.failed):,} files could not be deleted; run it again[/red]")


def counted(count: int, name: str) -> str:
    """A number with what it counts: ``1 row``, ``1,000 rows``."""
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def print_erasure(result: EraseResult, images: Images, console: Console) -> None:
    """Prints what an erasure removed, what it was asked for and did not find, and what is left to do."""
    others = (
        (result.num_vectors, "vector"),
        (result.num_reviews, "verdict"),
        (result.num_files, "older file"),
        (result.num_index_files, "index file"),
        (result.num_records, "record"),
    )
    console.print(
        f"[bold]{counted(result.num_rows, 'row')} erased[/bold], "
        + ", ".join(counted(count, name) for count, name in others)
    )
    for line in unfound(images):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if result.live_runs:
        console.print(
            f"[yellow]not finished:[/yellow] {', '.join(result.live_runs)} at work may hold them in files not yet "
            "committed, and will not commit them; run the same command again when they are over"
        )
    if result.failed:
        console.print(
            f"[red]{len(result.failed):,} files could not be deleted or changed, or somebody may be writing them; run "
            "the same command again, in ten minutes[/red]"
        )


def unfound(images: Images) -> list[str]:
    """What is to be said of addresses and ids without a row; nothing if all have one."""
    num_found = images.num_named - len(images.erased) - len(images.absent)
    if num_found == images.num_named:
        return []
    lines = [f"{num_found:,} of the {counted(images.num_named, 'image')} named had rows"]
    if images.erased:
        lines.append(f"erased before: {_some(images.erased)}")
    if images.absent:
        lines.append(f"no row has this address or id; kept from coming back all the same: {_some(images.absent)}")
    return lines


def lifted(images: Images, kept_out: Sequence[str]) -> list[str]:
    """What is to be said of a lifting.

    Args:
        kept_out: ids of the images named that stay away, because their address is erased.
    """
    lines = [f"{counted(len(images.erased) - len(kept_out), 'image')} may come back with the next run"]
    if images.absent:
        lines.append(f"was not erased by this address or id: {_some(images.absent)}")
    if kept_out:
        lines.append(f"stays away until its address is lifted, by --uri: {_some(kept_out)}")
    return lines


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMES
    return ", ".join(printable(name) for name in names[:_NUM_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def print_changes(
    result: ChangesResult, catalog: str, directory: Path | None, bookmark: Path | None, console: Console
) -> None:
    """Prints how many rows have changed since a version, in which columns, and how to go on from there."""
    counts = result.counts
    from_to = f"version {result.since} ({_minute(result.since_at)}) to {result.version} ({_minute(result.version_at)})"
    console.print(f"[bold]{escape(catalog)}[/bold]: {from_to}", soft_wrap=True)
    table = table_of("rows", "", "")
    table.add_row("added", f"{counts.num_added:,}", "")
    columns = ", ".join(f"{name} {count:,}" for name, count in counts.columns.most_common())
    table.add_row("changed", f"{counts.num_changed:,}", escape(columns))
    table.add_row("removed", f"{counts.num_removed:,}", "")
    console.print(table)
    if counts.decisions:
        moves = [f"{before} -> {now} {count:,}" for (before, now), count in counts.decisions.most_common()]
        console.print(f"decisions: {', '.join(moves)}")
    if counts.num_unknown:
        console.print(
            f"[yellow]of {counts.num_unknown:,} of the changed rows it is not known any more how they were[/yellow]: a "
            "vacuum or an erasure has removed the files"
        )
    if directory is not None:
        vectors = "" if result.num_vectors is None else f", {counted(result.num_vectors, 'new vector')}"
        console.print(f"written to {escape(str(directory))}{vectors}", soft_wrap=True)
    console.print(escape(_next_time(result, directory, bookmark)), soft_wrap=True)


def _next_time(result: ChangesResult, directory: Path | None, bookmark: Path | None) -> str:
    if bookmark is None:
        return f"next time: --since {result.version}"
    if directory is None:
        return f"{bookmark} was left at version {result.since}: with DIR rows are written, and it is moved on"
    return f"{bookmark} stands at version {result.version}"


def changes_as_json(result: ChangesResult) -> str:
    """The same on one line, for machines."""
    counts = result.counts
    moves = [{"before": before, "now": now, "num_rows": count} for (before, now), count in counts.decisions.items()]
    times = {name: time and time.isoformat() for name, time in vars(result).items() if name.endswith("_at")}
    told = {
        "since": result.since,
        "version": result.version,
        **times,
        "table_id": result.bookmark.table_id,
        "num_added": counts.num_added,
        "num_changed": counts.num_changed,
        "num_removed": counts.num_removed,
        "num_unknown": counts.num_unknown,
        "columns": dict(counts.columns),
        "decisions": moves,
        "num_vectors": result.num_vectors,
    }
    return json.dumps(told)


def _minute(time: dt.datetime | None) -> str:
    return "of an unknown time" if time is None else f"{time:%Y-%m-%d %H:%M} UTC"


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
                console.print(f"    {printable(example)}", style="dim", soft_wrap=True, markup=False)
            if kind in _REMEDIES:
                console.print(f"  remedy: {_REMEDIES[kind]}")
    if found.is_sound:
        console.print("[green]every image has its row, and every row its files[/green]")


def verification_as_json(found: Verification) -> str:
    """The verification as one JSON object."""
    return json.dumps({"is_sound": found.is_sound, **dataclasses.asdict(found)})
