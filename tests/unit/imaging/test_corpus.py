"""Every file of the corpus ends as a person would expect, within the limits, and in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.broken import corpus
from tests.images import good_images
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode

MAX_SECONDS = 10.0  # the worst takes half a second on an idle core
MAX_MEMORY_MIB = 768

# One process decodes all, in memory that is limited: what allocates as its header says would die.
CHILD = f"""
import json, resource, sys, time
from tests.broken import corpus
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError
from vlmflow.imaging import PixelRequest, decode

files = corpus()
requests = [PixelRequest(32, "bicubic", ("squash", "center")), PixelRequest(48, "bilinear", ("squash",))]
resource.setrlimit(resource.RLIMIT_DATA, ({MAX_MEMORY_MIB} << 20,) * 2)
for name, (data, _) in files.items():
    started = time.perf_counter()
    try:
        decode(data, requests, ImageLimits())
        found = (None, "")
    except ImageError as error:
        found = (str(error.error_class), str(error))
    print(json.dumps([name, *found, time.perf_counter() - started]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str | None, str, float]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    lines: list[list[Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    last = lines[-1][0] if lines else "nothing"
    assert done.returncode == 0, f"the process ended after {last}: {done.stderr[-2000:]}"
    return {name: (error_class, message, seconds) for name, error_class, message, seconds in lines}


def test_there_are_enough_of_them() -> None:
    assert len(corpus()) >= 300


def test_each_has_a_class_that_fits(outcomes: dict[str, tuple[str | None, str, float]]) -> None:
    assert outcomes.keys() == corpus().keys()
    wrong = {
        name: (found, message)
        for name, (found, message, _) in outcomes.items()
        if found not in [expected and str(expected) for expected in corpus()[name][1]]
    }
    assert wrong == {}


def test_each_is_told_in_words(outcomes: dict[str, tuple[str | None, str, float]]) -> None:
    for name, (error_class, message, _) in outcomes.items():
        if error_class is not None:
            assert 10 < len(message) < 200, (name, message)
            assert message.isprintable(), (name, message)
            assert not re.search(r"0x[0-9a-f]{6}|Traceback|<_io|<PIL", message), (name, message)


def test_none_takes_long(outcomes: dict[str, tuple[str | None, str, float]]) -> None:
    slow = {name: seconds for name, (_, _, seconds) in outcomes.items() if seconds > MAX_SECONDS}
    assert slow == {}


def test_what_they_were_made_of_decodes() -> None:
    for data in good_images().values():
        assert decode(data, [PixelRequest(32, "bicubic", ("squash",))], ImageLimits()).facts.width > 0
