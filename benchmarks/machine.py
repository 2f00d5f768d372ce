"""What a result must say of where it was measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from vlmflow.engine.report import installed_versions

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, object]:
    """Processor, cores, GPU, versions and time."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "versions": installed_versions(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def add_results_option(parser: argparse.ArgumentParser) -> None:
    """``--results FOLDER``, for :func:`save_result`."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to; default: benchmarks/results")


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--tiny`` and ``--results``, for :func:`parse_gpu_options`."""
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and images: a test of the script")
    add_results_option(parser)


def parse_gpu_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with ``size`` of the images; ends the process where they ask for a GPU that is not there."""
    import torch

    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: only with --tiny")
    options.size = (320, 240) if options.tiny else (1600, 1200)
    return options


def save_result(name: str, result: Mapping[str, object], folder: Path = RESULTS) -> Path:
    """Writes a result as JSON into a folder, with what it was measured on; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**result, "machine": describe_machine()}, indent=2) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def watched_gpu() -> Iterator[dict[str, float]]:
    """Looks at the first GPU once a second, through nvidia-smi: behind the block the means of when it was at work.

    A card that has reached its power limit lowers its clock, and with it every figure; empty without such a card.
    """
    found: dict[str, float] = {}
    fields = {"utilization.gpu": "busy_percent", "clocks.sm": "sm_mhz", "power.draw": "power_w"}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-l", "1"]
    try:
        watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        watch.terminate()
        lines = watch.communicate()[0].splitlines()
    looks = [dict(zip(fields.values(), map(_number, line.split(",")), strict=False)) for line in lines]
    at_work = [look for look in looks if look.get("busy_percent")]
    for name in fields.values():
        if told := [value for look in at_work if (value := look.get(name)) is not None]:
            found[name] = round(statistics.mean(told), 1)
    if at_work:
        found["looks"] = len(at_work)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]": not every card tells everything
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
