"""`import vlmflow` names what is public, and starts nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import vlmflow


def test_every_public_name_is_there() -> None:
    for name in vlmflow.__all__:
        assert getattr(vlmflow, name) is not None


def test_completion_and_help_know_names_before_their_first_use() -> None:
    assert set(vlmflow.__all__) <= set(dir(vlmflow))


def test_no_public_name_is_that_of_a_module_which_would_take_its_place_once_imported() -> None:
    for name in vlmflow.__all__:
        assert not isinstance(getattr(vlmflow, name), ModuleType), name
        assert find_spec(f"vlmflow.{name}") is None, name


def test_importing_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, vlmflow, vlmflow.cli; print([name for name in ('torch', 'ray', 'pyarrow') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_a_worker_imports_no_more_than_it_needs() -> None:
    """Each process of a run pays for it: readers and pools do without the driver's tables, displays and http."""
    unneeded = ("httpcore", "rich", "torch", "vlmflow.catalog.catalog", "vlmflow.engine.run", "vlmflow.engine.report")
    code = (
        "import sys, vlmflow.engine.decoding, vlmflow.engine.pools;"
        f"print([name for name in {unneeded} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
