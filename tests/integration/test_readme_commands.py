"""The README from its first command to its last, as a newcomer would type them, in a folder of their own."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import ROOT, started, wait_for
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig

DOCUMENTS = ("README.md", "vlmflow/models/README.md", "vlmflow/engine/README.md", "vlmflow/catalog/README.md")
CONTRIBUTORS = "vlmflow/models/README.md"  # whose commands run tests
ELSEWHERE = {
    "make demo     # enriches the demo catalog with the starter models and shows what came out": (
        "python -m vlmflow demo demo-catalog"  # as the Makefile has it, without its set-up
    ),
    "make test     # lint, types, tests": ":",  # which this is part of
    ". .venv/bin/activate": ":",
    "vlmflow serve demo-catalog          # prints an address with a token; Ctrl-C ends it": ":",  # below
}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def write_modules(document: str, folder: Path) -> None:
    """The blocks that are files: their first line names them."""
    for block in blocks(document, "python"):
        if named := re.match(r"# (\S+\.py)\n", block):
            (folder / named[1]).parent.mkdir(exist_ok=True)
            (folder / named[1]).write_text(block, encoding="utf-8")


def fill_in_verdicts(folder: Path) -> None:
    with (folder / "queue.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    write(folder / "queue.csv", [row | {"verdict": "allow"} for row in rows])


def label_images(folder: Path) -> None:
    """By the models that ship, which know nothing of a marketplace: a policy of drawings takes the place of its."""
    shutil.copy(folder / "vlmflow/moderation/policies/demo.yaml", folder / "mine.yaml")
    rows = Catalog.open(CatalogConfig(uri=str(folder / "catalog"))).images(["uri", "labels"]).to_pylist()
    margins = sorted(
        (row["labels"][0]["margin"], row["labels"][0]["label"], row["uri"]) for row in rows if row["labels"]
    )
    said = ({"uri": uri, "label": label, "value": str(at > 0)} for at, (_, label, uri) in enumerate(margins, -150))
    write(folder / "verdicts.csv", list(said))


def take_photo(folder: Path) -> None:
    shutil.copy(folder / "vlmflow/starter/demo/sku-0003.jpg", folder / "photo.jpg")


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(folder: Path, *command: str) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=400, check=False, env=environment()
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stdout + done.stderr, command[-1]


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


# What the README has a reader do between two commands.
BETWEEN: dict[str, Callable[[Path], None]] = {
    "vlmflow review import": fill_in_verdicts,
    "vlmflow calibrate": label_images,
    "vlmflow search catalog --image": take_photo,
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_as_written(tmp_path: Path) -> None:
    for room in ("vlmflow", "pipelines", "benchmarks", "deploy"):
        (tmp_path / room).symlink_to(ROOT / room)
    for document in DOCUMENTS:
        for block in [] if document == CONTRIBUTORS else blocks(document, "sh"):
            lines = "\n".join(ELSEWHERE.get(line, line) for line in block.splitlines())
            for command in re.split(r"\n(?=vlmflow |python )", lines):
                for beginning, deed in BETWEEN.items():
                    if command.startswith(beginning):
                        deed(tmp_path)
                run(tmp_path, "bash", "-euc", command)
        write_modules(document, tmp_path)
        for block in blocks(document, "yaml"):
            if named := re.match(r"# (\S+): ((?:python -m )?vlmflow .*)", block):
                (tmp_path / named[1]).write_text(block, encoding="utf-8")
                if "s3://" not in block:  # no bucket is at hand
                    run(tmp_path, "bash", "-euc", named[2])
        for block in blocks(document, "python"):
            if "job.yaml" not in block:
                run(tmp_path, sys.executable, "-c", block)
    command = [sys.executable, "-m", "vlmflow", "serve", str(tmp_path / "demo-catalog")]
    with started(command, tmp_path / "log", environment=environment()) as process:
        wait_for(lambda: "token=" in (tmp_path / "log").read_text(), process)
