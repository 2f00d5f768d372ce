"""How a run shows what it does: a live display on a terminal, lines in a log, JSON lines for machines."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

logger = logging.getLogger("vlmflow")

LOG_INTERVAL_S = 10.0
# The rate is that of the last minutes: over a night the cluster grows, or a store slows down.
_RATE_S = 300.0


@dataclass
class Tally:
    """The counts of a run so far.

    Attributes:
        total: images due.
        done: images that have left the last pool.
        committed: rows in the catalog.
        errors: rows by error class.
        elapsed_s: since the first images came out, which start-up delayed.
        num_first: those first images; the rate leaves them out.
    """

    total: int = 0
    done: int = 0
    committed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0
    num_first: int = 0
    _came: deque[tuple[float, int]] = field(default_factory=deque, repr=False)  # when, and how many were done then

    def at(self, elapsed_s: float) -> None:
        """Moves the clock to now, as the counts are."""
        self.elapsed_s = elapsed_s
        if not self._came:
            self._came.append((0.0, self.num_first))
        if self.done > self._came[-1][1]:
            self._came.append((elapsed_s, self.done))
        # Two stay, however old: with slow models an image may take minutes.
        while len(self._came) > 2 and self._came[1][0] <= elapsed_s - _RATE_S:
            self._came.popleft()

    @property
    def images_per_s(self) -> float:
        """Images per second of the last minutes, without the first ones to come out; 0 until there are more."""
        since_s, before = self._came[0] if self._came else (0.0, self.num_first)
        return (self.done - before) / (self.elapsed_s - since_s) if self.elapsed_s > since_s else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at that rate; None before there is one."""
        return (self.total - self.done) / self.images_per_s if self.images_per_s > 0 else None


class ProgressDisplay(Protocol):
    """What the engine tells of its progress."""

    def stage(self, text: str) -> None:
        """Names what is going on now: listing, planning, starting models, enriching."""

    def update(self, tally: Tally) -> None:
        """Shows the counts; called several times a second, displays thin it out themselves."""

    def close(self) -> None:
        """Ends the display."""


class SilentProgress:
    """Shows nothing: the default of the Python API."""

    def stage(self, text: str) -> None:
        """Does nothing."""

    def update(self, tally: Tally) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Lines:
    """When a line is due: at most every so many seconds, once when all is committed, and whatever is over then: of
    some images another run keeps the rows, or an erasure, so that not all are ever committed."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last, self._is_over = float("-inf"), False
        self._tally: Tally | None = None
        self._shown: object = None

    def is_due(self, tally: Tally) -> bool:
        """Whether to write one now; then it counts as written."""
        self._tally = tally
        now, was_over = time.monotonic(), self._is_over
        self._is_over = tally.committed >= tally.total > 0
        if was_over if self._is_over else now - self._last < self._interval_s:
            return False
        self._last, self._shown = now, _counts(tally)
        return True

    def left(self) -> Tally | None:
        """What no line shows yet, to be written where a stage or the run is over; then it counts as written."""
        if self._tally is None or self._shown == _counts(self._tally):
            return None
        self._last, self._shown = time.monotonic(), _counts(self._tally)
        return self._tally


def _counts(tally: Tally) -> object:
    return tally.total, tally.done, tally.committed, dict(tally.errors)


class LogProgress:
    """A line in the log at most every ten seconds, and the last of each stage."""

    def __init__(self, interval_s: float = LOG_INTERVAL_S) -> None:
        self._lines = Lines(interval_s)

    def stage(self, text: str) -> None:
        """Logs the stage, and before it the counts of the one before."""
        self.close()
        logger.info("%s", text)

    def update(self, tally: Tally) -> None:
        """Logs the counts if the last line is old enough."""
        if self._lines.is_due(tally):
            logger.info("%s", describe(tally))

    def close(self) -> None:
        """Logs the counts that no line shows yet."""
        if (tally := self._lines.left()) is not None:
            logger.info("%s", describe(tally))


class JsonProgress:
    """One JSON object a line, for machines; the last line of the command is the report."""

    def __init__(self, stream: TextIO, interval_s: float = LOG_INTERVAL_S) -> None:
        self._stream = stream
        self._lines = Lines(interval_s)

    def stage(self, text: str) -> None:
        """Writes ``{"event": "stage", ...}``, and before it the counts of the stage before."""
        self.close()
        self._write({"event": "stage", "stage": text})

    def update(self, tally: Tally) -> None:
        """Writes ``{"event": "progress", ...}`` if the last line is old enough."""
        if self._lines.is_due(tally):
            self._write_counts(tally)

    def close(self) -> None:
        """Writes the counts that no line shows yet."""
        if (tally := self._lines.left()) is not None:
            self._write_counts(tally)

    def _write_counts(self, tally: Tally) -> None:
        eta_s = tally.eta_s
        self._write(
            {
                "event": "progress",
                "done": tally.done,
                "total": tally.total,
                "committed": tally.committed,
                "images_per_s": round(tally.images_per_s, 2),
                "eta_s": None if eta_s is None else round(eta_s, 1),
                "errors": dict(tally.errors),
            }
        )

    def _write(self, event: dict[str, object]) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


class LiveProgress:
    """A live bar on a terminal, and under it the line that a log would have."""

    def __init__(self, console: Console) -> None:
        self._progress = _BarAndCounts(
            SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._progress.start()

    def stage(self, text: str) -> None:
        """Puts the stage before the bar."""
        self._progress.update(self._task, description=text)

    def update(self, tally: Tally) -> None:
        """Moves the bar."""
        self._progress.counts = describe(tally)
        self._progress.update(self._task, total=tally.total, completed=tally.done)

    def close(self) -> None:
        """Takes the bar off the screen."""
        self._progress.stop()


class _BarAndCounts(Progress):
    """A bar beside which the counts have no room in 80 columns: theirs is a line of their own, folded where need be."""

    counts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the counts once there are some."""
        yield from super().get_renderables()
        if self.counts:
            yield Text(self.counts)


def describe(tally: Tally) -> str:
    """One line: images done of total, rate, time to go, rows saved, errors by class."""
    eta_s = tally.eta_s
    parts = [f"{tally.done:,}/{tally.total:,} images"]
    if tally.images_per_s > 0:
        parts.append(f"{tally.images_per_s:.1f} images/s")
    if eta_s is not None and tally.done < tally.total:
        parts.append(f"{duration(eta_s)} to go")
    parts.append(f"{tally.committed:,} saved")
    if tally.errors:
        parts.append("errors: " + ", ".join(f"{name} {count:,}" for name, count in tally.errors.most_common()))
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Writes seconds as ``45 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
