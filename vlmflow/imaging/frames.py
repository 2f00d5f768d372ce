"""Which frames of an animation are shown to moderation: some at equal distances, and those that differ most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

# Each frame is looked at small; beyond these limits the rest stays unseen, and that is said.
MAX_FRAMES_SEEN = 1_000
MAX_PIXELS_SEEN = 1 << 29  # of all frames together: some seconds
MAX_FRAME_VIEWS = 8  # besides the first frame, which stands for the image
_NUM_EVEN = 3
_THUMBNAIL = 24
# Root mean square of the difference of two thumbnails, of 255, below which frames count as equal.
_SAME = 1.5

Thumbnail = NDArray[np.float32]


class Looked:
    """What was looked at of a file: its frames one by one, small, each on every ground on which it looks otherwise."""

    def __init__(self) -> None:
        self.times: list[float] = []  # of the frames, in seconds
        self._thumbnails: list[Thumbnail] = []
        self._shown: list[tuple[int, str]] = []  # of each thumbnail the number of its frame, and the ground

    def add(self, time_s: float, grounds: Sequence[tuple[str, Image.Image]]) -> None:
        """Takes note of the next frame, as RGB on grounds."""
        for ground, image in grounds:
            self._thumbnails.append(thumbnail(image))
            self._shown.append((len(self.times), ground))
        self.times.append(time_s)

    def choose(self) -> dict[int, list[tuple[str, str]]]:
        """By the numbers of the frames to show, in order: the names of their views, and the ground of each.

        The time stands behind an `@`. Of what has a second ground more is shown, so that neither takes from the other.
        """
        num_first = sum(number == 0 for number, _ in self._shown)
        num_views = MAX_FRAME_VIEWS * len({ground for _, ground in self._shown})
        chosen: dict[int, list[tuple[str, str]]] = {}
        for index, at in enumerate(choose_frames(self._thumbnails, num_views, num_first)):
            number, ground = self._shown[at]
            chosen.setdefault(number, []).append((f"frame-{index + 1}@{self.times[number]:.3f}", ground))
        return chosen


def split_views(views: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Views' names, and of frames their times in seconds, float32; null for stills."""
    coded = pc.dictionary_encode(views)
    parts = [view.partition("@") for view in coded.dictionary.to_pylist()]
    names = pa.array([name for name, _, _ in parts], pa.string())
    times = pa.array([float(time) if time else None for _, _, time in parts], pa.float32())
    return names.take(coded.indices), times.take(coded.indices)


def join_times(names: pa.ChunkedArray, times: pa.ChunkedArray) -> pa.ChunkedArray:
    """The inverse of :func:`split_views`, for what was stored."""
    if times.null_count == len(times):
        return names
    pairs = zip(names.to_pylist(), times.to_pylist(), strict=True)
    return pa.chunked_array([[name if time is None else f"{name}@{time:.3f}" for name, time in pairs]], pa.string())


def choose_frames(thumbnails: Sequence[Thumbnail], num_views: int = MAX_FRAME_VIEWS, num_first: int = 1) -> list[int]:
    """Chooses frames: the middle ones at equal distances and the last, then whichever is least like all chosen.

    So a single frame unlike the others is among the first to be chosen, however many there are.

    Args:
        thumbnails: of all frames, the first included.
        num_first: of them, those of the first frame, which count as chosen.

    Returns:
        Numbers of the frames, in order, without the first; none that looks like one of the others.
    """
    count = len(thumbnails)
    if count <= num_first:
        return []
    stack = np.stack(thumbnails).reshape(count, -1)
    nearest = np.minimum.reduce([_distances(stack, number) for number in range(num_first)])
    chosen: list[int] = []
    for number in (round(step * (count - 1) / _NUM_EVEN) for step in range(1, _NUM_EVEN + 1)):
        if len(chosen) < num_views and nearest[number] >= _SAME:
            chosen.append(number)
            nearest = np.minimum(nearest, _distances(stack, number))
    while len(chosen) < num_views:
        number = int(nearest.argmax())
        if nearest[number] < _SAME:
            break
        chosen.append(number)
        nearest = np.minimum(nearest, _distances(stack, number))
    return sorted(chosen)


def thumbnail(image: Image.Image) -> Thumbnail:
    """(24, 24, 3) float32 of an RGB image."""
    small = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def durations(image: Image.Image) -> float:
    """Seconds for which the present frame is shown; 0 where the file does not say."""
    value = image.info.get("duration", 0)
    return float(value) / 1000 if isinstance(value, int | float) else 0.0


def _distances(stack: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    """(F, P) thumbnails -> (F,) root mean square difference from one of them."""
    out = np.empty(len(stack), np.float32)
    for start in range(0, len(stack), 256):  # the differences of all at once would be a copy of everything
        part = stack[start : start + 256] - stack[number]
        out[start : start + 256] = np.sqrt(np.square(part).mean(axis=1))
    return out


def frames_in(image: Image.Image, num_frames: int) -> Iterator[tuple[int, float]]:
    """Steps through the frames behind the first: number, and seconds from the start. The image is at that frame."""
    time_s = durations(image)
    for number in range(1, num_frames):
        image.seek(number)
        yield number, time_s
        time_s += durations(image)
