"""Where workers look for modules: where the driver does, and nowhere else.

Ray has them look in the driver's working folder, and there first, which the driver of a command does not do itself.
Users work where their own files are: a ``types.py`` among these ends every worker, and a ``PIL.py`` that came with
a downloaded data set would be run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from ray.job_config import JobConfig


class _OfDriver(list[str]):
    """Takes of the folders that Ray adds those in which the driver looks for modules."""

    def extend(self, paths: Iterable[str]) -> None:
        own = {Path(path).resolve() for path in sys.path}  # an empty one is the working folder
        super().extend(path for path in paths if Path(path).resolve() in own)


def own_import_paths() -> JobConfig:
    """What to tell :func:`ray.init`, for it has no option for this."""
    config = JobConfig()
    config._py_driver_sys_path = _OfDriver()  # not as an argument: an empty list of ours would be replaced
    return config
