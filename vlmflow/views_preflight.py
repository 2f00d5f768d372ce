"""What a preflight is printed as."""

from __future__ import annotations

import yaml
from rich.console import Console
from rich.markup import escape

from vlmflow.config import PoolConfig
from vlmflow.engine.progress import duration
from vlmflow.engine.sizing import PreflightReport
from vlmflow.views_search import table_of

_GIB = 1024**3


def print_preflight(report: PreflightReport, console: Console) -> None:
    """Prints what was measured, what follows for the run, and the pools as a job file may say them."""
    console.print(
        f"[bold]{report.num_due:,} images[/bold] to do: about {duration(max(1.0, report.hours * 3600))} at "
        f"{report.images_per_s:,.1f} images/s, limited by {escape(report.limited_by)}; start-up comes on top"
    )
    console.print(
        f"measured on {report.num_sampled} of them: reading {report.read_images_per_s:,.1f} images/s of one worker, "
        f"decoding {report.decode_images_per_s:,.1f} of one processor"
    )
    for plan in report.pools:
        table = table_of("batch", "images/s of an actor", "memory", "images/s by task")
        for trial in plan.trials:
            chosen = "[green]*[/green]" if trial.batch_size == plan.pool.batch_size else ""
            memory = f"{trial.memory_bytes / _GIB:.1f} of {plan.memory_total / _GIB:.0f} GiB"
            tasks = ", ".join(f"{task} {rate:,.1f}" for task, rate in trial.tasks.items())
            fits = "" if trial.fits else " (ran out)"
            table.add_row(f"{trial.batch_size}{chosen}", f"{trial.images_per_s:,.1f}", memory + fits, tasks)
        console.print(f"pool {'+'.join(plan.pool.tasks)}")
        console.print(table)
    console.print("in a job file:", style="dim")
    console.print(as_yaml(report.chosen), markup=False, highlight=False, soft_wrap=True)


def as_yaml(pools: tuple[PoolConfig, ...]) -> str:
    """Pools as they stand in a job file."""
    said = [pool.model_dump(mode="json", exclude_unset=True) for pool in pools]
    return "pools:\n" + "".join(
        f"  - {yaml.safe_dump(pool, default_flow_style=True, width=1000, sort_keys=False)}" for pool in said
    )
