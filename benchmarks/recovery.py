"""What a kill costs: images computed and not yet committed, against the commit interval.

Workload: that of ``benchmarks.end_to_end`` with the starter models. For each interval a run is killed with SIGKILL
three times, at random moments after its first commit, and started again; what had left the last pool and was not in the
table is lost and computed once more. Beside it stands what the interval costs: the share of the run's time that the
driver spent in commits, which overlaps with the computation.

    python -m benchmarks.recovery [--images 1500]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.end_to_end import write_images
from benchmarks.machine import save_result
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, CommitConfig, Job, SourceConfig
from vlmflow.engine import enrich
from vlmflow.engine.progress import SilentProgress, Tally

INTERVALS = (100, 250, 1000)
KILLS = 3


class _Told(SilentProgress):
    """Writes each count to a file, which outlives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def update(self, tally: Tally) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps([tally.done, tally.committed, tally.elapsed_s]))
        partial.replace(self._path)


def run(root: Path, max_rows: int) -> None:
    """A whole run; the last line that it prints is what it did."""
    job = Job(
        source=SourceConfig(uri=str(root / "images")),
        catalog=CatalogConfig(uri=str(root / f"catalog-{max_rows}")),
        profile="starter",
        policy="demo",
        views=("squash",),
        commit=CommitConfig(max_rows=max_rows),
    )
    report = enrich(job, progress=_Told(root / "told"))
    print(json.dumps({"seconds": report.seconds - report.startup_s, "commit_s": [c.seconds for c in report.commits]}))


def measure(root: Path, max_rows: int, num_images: int, dice: random.Random) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.recovery", "--child", str(root), str(max_rows)]
    lost: list[int] = []
    lost_s: list[float] = []
    config = CatalogConfig(uri=str(root / f"catalog-{max_rows}"))
    for _ in range(KILLS):
        (root / "told").unlink(missing_ok=True)
        before = _num_rows(config)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while child.poll() is None and _num_rows(config) == before:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, max_rows / 60))
        if child.poll() is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        done, _, elapsed_s = json.loads((root / "told").read_text())
        lost.append(max(0, done - (_num_rows(config) - before)))
        lost_s.append(round(lost[-1] / max(done / max(elapsed_s, 1e-9), 1e-9), 2))
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    last = json.loads(finished.stdout.splitlines()[-1])
    assert _num_rows(config) == num_images
    return {
        "max_rows": max_rows,
        "images_lost": lost,
        "seconds_lost": lost_s,
        "seconds_in_commits": round(sum(last["commit_s"]), 2),
        "seconds_of_last_run": round(last["seconds"], 2),
    }


def _num_rows(config: CatalogConfig) -> int:
    return Catalog.open(config).images(["image_id"]).num_rows if Catalog.exists(config) else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(Path(options.child[0]), int(options.child[1]))
        return
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", options.images)
        results = [measure(root, max_rows, options.images, dice) for max_rows in INTERVALS]
    for result in results:
        print(json.dumps(result))
    save_result("recovery", {"workload": f"{options.images} images, starter models, 3 kills", "runs": results})


if __name__ == "__main__":
    main()
