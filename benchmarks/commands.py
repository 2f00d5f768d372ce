"""What each command costs on a catalog of 1,000,000 rows: seconds, processor seconds and memory.

``python -m benchmarks.commands`` makes the catalog (see :mod:`benchmarks.large_catalog`) and runs the commands one by
one as a user does, each in a process of its own: first those that read, then those that write. ``--only`` takes some,
``--folder`` keeps the catalog, which those that write have changed then. Workers of Ray are counted too. It takes some
hours of two cores and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.large_catalog import NIGHT_ROWS, make_catalog
from benchmarks.machine import add_results_option, save_result
from vlmflow import Catalog, CatalogConfig
from vlmflow.moderation.policy import read_text

STARTER = ["--profile", "starter"]
TITLES = ["--text-column", "title"]
ERASED = (10, 10_000)


def commands(root: Path) -> dict[str, list[str]]:
    """The commands by name, in the order in which they run."""
    catalog, listed, more, out = (str(root / name) for name in ("catalog", "list.csv", "more.csv", "out"))
    first = str(next((root / "pictures/0000").iterdir()))
    erase = {f"erase {count}": ["erase", catalog, "--ids", f"{out}/erase-{count}", "--yes"] for count in ERASED}
    return {
        "show": ["show", catalog],
        "explain": ["explain", catalog, first],
        "titles": ["titles", catalog],
        "alt-text": ["alt-text", catalog, "--csv", f"{out}/alt-text.csv"],
        "review export": ["review", "export", catalog, f"{out}/queue.csv"],
        "changes, counted": ["changes", catalog, "--since", "1"],
        "plan, manifest": ["plan", listed, catalog, *STARTER, *TITLES],
        "plan, folder": ["plan", str(root / "pictures"), catalog, *STARTER, "--tasks", "embed,moderate,caption"],
        "verify": ["verify", listed, catalog, *STARTER],
        "search, exact": ["search", catalog, "a dog on yellow", "--exact"],
        "search --build-index": ["search", catalog, "--build-index"],
        "search": ["search", catalog, "a dog on yellow"],
        "duplicates": ["duplicates", catalog, "--csv", f"{out}/duplicates.csv"],
        "report": ["report", catalog, "-o", f"{out}/report.html"],
        "export": ["export", catalog, f"{out}/export"],
        "vacuum --dry-run": ["vacuum", catalog, "--dry-run"],
        "enrich, nothing due": ["enrich", listed, catalog, *STARTER, *TITLES],
        "enrich, 100 new": ["enrich", more, catalog, *STARTER, *TITLES],
        "remoderate --dry-run": ["remoderate", catalog, *STARTER, "--policy", f"{out}/policy.yaml", "--dry-run"],
        "remoderate": ["remoderate", catalog, *STARTER, "--policy", f"{out}/policy.yaml"],
        "known add": ["known", "add", catalog, str(root / "demo/sku-0019.gif"), "--name", "banned", "--block"],
        **erase,
        "vacuum": ["vacuum", catalog, "--retention-hours", "0"],
    }


def prepare(root: Path) -> int:
    """Writes what commands are given: ids, and a policy with other thresholds. Returns how many rows there are."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    ids = Catalog.open(CatalogConfig(uri=str(root / "catalog"))).images(["image_id"])["image_id"]
    for count in ERASED:
        some = ids.slice(count, count).to_pylist()
        (out / f"erase-{count}").write_text("\n".join(some))
    lower = re.sub(
        r"(review|block): 0\.(\d)", lambda found: f"{found[1]}: 0.{max(0, int(found[2]) - 1)}", read_text("demo")
    )
    (out / "policy.yaml").write_text(lower.replace('version: "1"', 'version: "2"'))
    return len(ids)


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Runs a command; it, and what it starts."""
    started, peak, seconds = time.perf_counter(), 0.0, dict[int, float]()
    with log.open("wb") as output:
        child = psutil.Popen([sys.executable, "-m", "vlmflow", *command], stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            total = 0
            for process in [child, *_below(child)]:
                try:
                    times = process.cpu_times()
                    seconds[process.pid] = times.user + times.system
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue
            peak = max(peak, total / 2**20)
            time.sleep(0.5)
    took = time.perf_counter() - started
    return {
        "seconds": round(took, 1),
        "cpu_s": round(sum(seconds.values()), 1),
        "peak_mib": round(peak),
        "exit_code": child.returncode,
    }


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", action="append", help="a command by its name here; again for more")
    parser.add_argument("--folder", type=Path, help="keep the catalog here, and take it if it is there")
    parser.add_argument("--shared", action="store_true", help="say that other work ran beside")
    add_results_option(parser)
    options = parser.parse_args()
    root = (options.folder or Path(tempfile.mkdtemp(prefix="vlmflow-commands-"))).absolute()
    found: dict[str, dict[str, float]] = {}
    try:
        if not (root / "more.csv").exists():
            make_catalog(root, options.rows)
        num_rows = prepare(root)
        for name, command in commands(root).items():
            if options.only and name not in options.only:
                continue
            found[name] = timed(command, root / "out/log")
            print(f"{name}: {json.dumps(found[name])}", flush=True)
            if found[name]["exit_code"]:
                print((root / "out/log").read_text()[-2_000:], file=sys.stderr)
            shutil.rmtree(root / "out/export", ignore_errors=True)
    finally:
        if not options.folder:
            shutil.rmtree(root)
    workload = {"rows": num_rows, "rows_a_night": NIGHT_ROWS}
    save_result("commands", {"workload": workload, "shared_machine": options.shared, **found}, options.results)


if __name__ == "__main__":
    main()
