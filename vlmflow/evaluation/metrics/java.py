"""METEOR and SPICE by the programs of their authors, which are Java: optional, and used only where they are installed.

METEOR 1.5 (Denkowski and Lavie 2014) comes with ``pip install 'vlmflow[captions]'``; SPICE (Anderson et al. 2016,
arXiv:1607.08822) does too, but not CoreNLP 3.6.0 and its models, which it needs, and nothing here downloads any. Each
says why it cannot run.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vlmflow.errors import EvaluationError
from vlmflow.paths import is_file
from vlmflow.workspace import Workspace

_METEOR = "meteor/meteor-1.5.jar"
_SPICE = "spice/spice-1.0.jar"
_CORENLP = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")
_UTF8 = "-Dfile.encoding=UTF-8"
_SEPARATOR = "|||"


def missing_for_meteor(folder: Path | None = None) -> str | None:
    """Why METEOR cannot run here; None: it can."""
    return _missing("METEOR", (_METEOR,), folder)


def missing_for_spice(folder: Path | None = None) -> str | None:
    """Why SPICE cannot run here; None: it can."""
    return _missing("SPICE", (_SPICE, *_CORENLP), folder)


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]], folder: Path | None = None) -> float:
    """METEOR 1.5 of a corpus, as the COCO caption scorer runs it (English, normalised).

    Args:
        candidates: captions of tokens with blanks between them.

    Raises:
        EvaluationError: the program fails.
    """
    return meteor_each(candidates, references, folder)[0]


def meteor_each(
    candidates: Sequence[str], references: Sequence[Sequence[str]], folder: Path | None = None
) -> tuple[float, list[float]]:
    """As :func:`meteor`, and of each caption."""
    command = ["java", _UTF8, "-jar", "-Xmx2G", Path(_METEOR).name, "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = [
        f" {_SEPARATOR} ".join(("SCORE", *(map(_clean, several)), _clean(candidate)))
        for candidate, several in zip(candidates, references, strict=True)
    ]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as problems,
        subprocess.Popen(
            command,
            cwd=_jars(folder) / "meteor",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=problems,
            encoding="utf-8",
        ) as process,
    ):
        try:
            # A line in, a line out: the program answers before it reads on.
            statistics = [_exchange(process, line) for line in lines]
            first = _exchange(process, f" {_SEPARATOR} ".join(("EVAL", *statistics)))
            each = [float(first), *(float(_read(process)) for _ in lines[1:])]
            return float(_read(process)), each
        except (OSError, ValueError) as error:
            problems.seek(0)
            said = " ".join(problems.read().split())[-200:]
            raise EvaluationError(f"METEOR failed: {said or error}", remedy="Check `java -version`.") from error
        finally:
            process.kill()


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]], folder: Path | None = None) -> float:
    """SPICE of a corpus: the mean F over its captions, those that have none left out.

    Raises:
        EvaluationError: the program fails.
    """
    items = [
        {"image_id": number, "test": candidate, "refs": list(several)}
        for number, (candidate, several) in enumerate(zip(candidates, references, strict=True))
    ]
    with Workspace() as workspace:
        given, out = workspace.path / "captions.json", workspace.path / "scores.json"
        given.write_text(json.dumps(items), encoding="utf-8")
        command = ["java", _UTF8, "-jar", "-Xmx8G", Path(_SPICE).name, str(given), "-out", str(out), "-silent"]
        done = subprocess.run(command, cwd=_jars(folder) / "spice", capture_output=True, text=True, check=False)
        if done.returncode or not is_file(out):
            said = " ".join(done.stderr.split())[-200:]
            raise EvaluationError(f"SPICE failed: {said}", remedy="It needs 8 GB of memory and Java 8 or later.")
        found = [float(item["scores"]["All"]["f"]) for item in json.loads(out.read_text(encoding="utf-8"))]
    counted = [value for value in found if not math.isnan(value)]
    return float(np.mean(counted)) if counted else 0.0


def _missing(metric: str, files: Sequence[str], folder: Path | None) -> str | None:
    if shutil.which("java") is None:
        return f"{metric} needs Java (such as Debian's default-jre-headless)"
    if folder is None and find_spec("pycocoevalcap") is None:
        return f"{metric} needs pip install 'vlmflow[captions]'"
    absent = [name for name in files if not is_file(_jars(folder) / name)]
    return f"{metric} needs {' and '.join(absent)} in the folder of pycocoevalcap" if absent else None


def _jars(folder: Path | None) -> Path:
    if folder is not None:
        return folder
    spec = find_spec("pycocoevalcap")
    assert spec is not None
    assert spec.submodule_search_locations  # a package without an __init__ has no origin
    return Path(next(iter(spec.submodule_search_locations)))


def _clean(caption: str) -> str:
    # The program's own separator must not occur, and a line ends a command.
    return " ".join(caption.replace(_SEPARATOR, " ").split())


def _exchange(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return _read(process)


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    answer = process.stdout.readline()
    if not answer:
        raise OSError("it ended before it answered")
    return answer.strip()
