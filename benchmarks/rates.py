"""The rate of a job without its start-up: what a larger run took more than a smaller one."""

from __future__ import annotations

import sys

from vlmflow.engine import RunReport


def smaller_run(num_images: int) -> tuple[int, int]:
    """Of how many images the smaller run is, and how many of them it and the larger may read ahead.

    That is less by more than a block: what is decoded while the models load is as much in both, and none of it is among
    the images that the larger run has more.
    """
    return max(1, num_images * 7 // 16), max(1, num_images * 3 // 8)


def job_rate(num_small: int, small: RunReport, num_large: int, large: RunReport) -> float:
    """Images per second behind the first block, of those that the larger run has more; see :func:`smaller_run`.

    The start-up of both is left out: it differs by seconds from run to run. Ends the process where there is no telling.
    """
    behind_first = [run.seconds - run.startup_s for run in (small, large)]
    seconds = behind_first[1] - behind_first[0]
    if seconds <= 0:
        sys.exit(
            f"no rate: behind the first block {num_large} images took {behind_first[1]:.2f} s, and {num_small} of them "
            f"{behind_first[0]:.2f} s; give more --images"
        )
    return round((num_large - num_small) / seconds, 2)
