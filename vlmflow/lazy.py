"""Names of a package that are imported at their first use: a worker imports what it needs of it, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def imported_at_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes the ``__getattr__`` of a package (https://peps.python.org/pep-0562).

    Args:
        package: its name.
        homes: the module that each name is imported from.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get
