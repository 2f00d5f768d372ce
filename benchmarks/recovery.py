"""What a kill costs: images read and computed again, against the commit interval.

Workload: that of ``benchmarks.end_to_end`` with the starter models, the images served over HTTP by this process, which
counts what is asked of it. For each interval a run is killed with SIGKILL three times, each time when a random share of
what was left had been read, and started again until nothing is due. Every read beyond one per image is work that was
lost: images that were finished and not committed, that were being worked on, and that waited decoded. Beside it
stands what the interval costs: the share of an undisturbed run's time that the driver spent in commits, which overlaps
with the computation.

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
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.end_to_end import write_images
from benchmarks.machine import save_result
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, CommitConfig, HttpConfig, Job, SourceConfig
from vlmflow.engine import enrich

INTERVALS = (100, 250, 1000)
KILLS = 3


class _Counting(SimpleHTTPRequestHandler):
    """Serves a folder and counts the images asked for."""

    num_reads = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        with _Counting.lock:
            _Counting.num_reads += 1
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def run(root: Path, catalog: str, max_rows: int) -> None:
    """A whole run; the last line that it prints is what it did."""
    job = Job(
        source=SourceConfig(uri=str(root / "images.csv"), http=HttpConfig(allow_private_addresses=True)),
        catalog=CatalogConfig(uri=str(root / catalog)),
        profile="starter",
        policy="demo",
        views=("squash",),
        commit=CommitConfig(max_rows=max_rows),
    )
    report = enrich(job)
    working_s = report.seconds - report.startup_s
    print(json.dumps({"seconds": working_s, "commit_s": sum(c.seconds for c in report.commits)}))


def measure(root: Path, max_rows: int, num_images: int, dice: random.Random) -> dict[str, object]:
    def command(catalog: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.recovery", "--child", str(root), catalog, str(max_rows)]

    _Counting.num_reads = 0
    whole = subprocess.run(command(f"whole-{max_rows}"), check=True, stdout=subprocess.PIPE, text=True)
    undisturbed = json.loads(whole.stdout.splitlines()[-1])
    assert _Counting.num_reads == num_images
    rate = num_images / undisturbed["seconds"]
    config = CatalogConfig(uri=str(root / f"killed-{max_rows}"))
    lost = []
    for _ in range(KILLS):
        before = _num_rows(config)
        start = _Counting.num_reads
        wanted = start + int(dice.uniform(0.3, 0.7) * (num_images - before))
        child = subprocess.Popen(command(f"killed-{max_rows}"), stdout=subprocess.DEVNULL, start_new_session=True)
        while child.poll() is None and _Counting.num_reads < wanted:
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        lost.append(_Counting.num_reads - start - (_num_rows(config) - before))
    subprocess.run(command(f"killed-{max_rows}"), check=True, stdout=subprocess.DEVNULL)
    assert _num_rows(config) == num_images
    return {
        "max_rows": max_rows,
        "images_lost": lost,
        "seconds_lost": [round(number / rate, 1) for number in lost],
        "images_per_s_undisturbed": round(rate, 1),
        "share_of_time_in_commits": round(undisturbed["commit_s"] / undisturbed["seconds"], 4),
    }


def _num_rows(config: CatalogConfig) -> int:
    return Catalog.open(config).images(["image_id"]).num_rows if Catalog.exists(config) else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "CATALOG", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(Path(options.child[0]), options.child[1], int(options.child[2]))
        return
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", options.images)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Counting, directory=str(root / "images")))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = sorted(path.name for path in (root / "images").iterdir())
        lines = [f"http://127.0.0.1:{server.server_port}/{name}" for name in names]
        (root / "images.csv").write_text("\n".join(["uri", *lines]), encoding="utf-8")
        results = [measure(root, max_rows, options.images, dice) for max_rows in INTERVALS]
    for result in results:
        print(json.dumps(result))
    save_result("recovery", {"workload": f"{options.images} images, starter models, 3 kills", "runs": results})


if __name__ == "__main__":
    main()
