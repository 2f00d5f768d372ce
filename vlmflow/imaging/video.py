"""Frames of a video, by PyAV (FFmpeg's libraries): what moderation is shown of it. Sound is not listened to.

Short videos are looked at frame by frame, longer ones at their key frames, which encoders put at cuts and every few
seconds. Needs the package `av` (extra ``video``); without it a video is an image of an unsupported format.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from typing import Any

from PIL import Image

from vlmflow.errors import ImageError, RowErrorClass

# Up to so many frames every one is looked at.
_EVERY_FRAME_UP_TO = 600
# Key frames further apart than this leave something unseen.
_LONGEST_GAP_S = 12.0
# What PyAV raises of its own on bytes that do not fit.
_BAD_BYTES = (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AssertionError)
_FORMATS = ("mp4", "webm")
_FTYP_BRANDS = (b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"M4V ", b"qt  ", b"dash", b"3gp4", b"3gp5", b"mmp4")


@dataclass(frozen=True)
class VideoFacts:
    """What the container says. ``num_frames``: as counted there, else by duration and rate; at least 1."""

    format: str
    mode: str
    width: int
    height: int
    num_frames: int
    duration_s: float | None


def sniff_video(data: bytes) -> str | None:
    """``mp4`` (and its kin) or ``webm`` (and Matroska) by the first bytes; None: no video."""
    if len(data) >= 16 and data[4:8] == b"ftyp" and data[8:12] in _FTYP_BRANDS:
        return "mp4"
    return "webm" if data.startswith(b"\x1a\x45\xdf\xa3") else None


def is_supported() -> bool:
    """Whether the package that decodes videos is installed."""
    return find_spec("av") is not None


class Video:
    """A video whose header has been read."""

    def __init__(self, container: Any, facts: VideoFacts) -> None:
        self._container = container
        self.facts = facts
        self._stream = container.streams.video[0]
        self.every_frame = facts.num_frames <= _EVERY_FRAME_UP_TO

    def frames(self) -> Iterator[tuple[float, Image.Image]]:
        """Frames from the beginning: seconds, and RGB as displayed. Of a longer video its key frames.

        Raises:
            ImageError: nothing can be decoded, or not from here on.
        """
        self._stream.codec_context.skip_frame = "DEFAULT" if self.every_frame else "NONKEY"
        with _bad_video(self.facts.format):
            for frame in self._container.decode(self._stream):
                image = frame.to_image()
                turn = int(getattr(frame, "rotation", 0) or 0) % 360
                yield float(frame.time or 0.0), image.rotate(turn, expand=True) if turn else image

    def rewind(self) -> None:
        """Goes back to the beginning."""
        with _bad_video(self.facts.format):
            self._container.seek(0)


@contextmanager
def open_video(data: bytes) -> Iterator[Video]:
    """Opens a video and reads its header.

    Raises:
        ImageError: it holds no picture, or cannot be read; or the package to do so is not installed.
    """
    name = sniff_video(data) or _FORMATS[0]
    if not is_supported():
        message = "a video; its frames are decoded where vlmflow[video] is installed"
        raise ImageError(message, error_class=RowErrorClass.UNSUPPORTED_FORMAT)
    import av

    with _bad_video(name):
        container = av.open(BytesIO(data), metadata_errors="replace")
    try:
        with _bad_video(name):
            facts = _facts(container, name)
        yield Video(container, facts)
    finally:
        container.close()


def unseen_gap(times: list[float], facts: VideoFacts) -> str | None:
    """What was left unseen between the frames that were looked at; None: nothing to speak of."""
    ends = [*times, facts.duration_s] if facts.duration_s is not None else times
    gaps = [after - before for before, after in pairwise(ends)]
    longest = max(gaps, default=0.0)
    return f"{longest:.0f} s between two key frames were not looked at" if longest > _LONGEST_GAP_S else None


def _facts(container: Any, name: str) -> VideoFacts:
    if not container.streams.video:
        raise ImageError("the video holds no picture", error_class=RowErrorClass.CORRUPT)
    stream = container.streams.video[0]
    codec = stream.codec_context
    duration_s = None if container.duration is None else container.duration / 1_000_000
    rate = float(stream.average_rate or 0)
    counted = stream.frames or round((duration_s or 0) * rate)
    mode = str(codec.pix_fmt or "yuv")
    return VideoFacts(name, mode, codec.width or 0, codec.height or 0, max(1, counted), duration_s)


@contextmanager
def _bad_video(name: str) -> Iterator[None]:
    from av.error import FFmpegError

    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        message = f"not enough memory to decode this {name} file"
        raise ImageError(message, error_class=RowErrorClass.OUT_OF_MEMORY) from error
    except (FFmpegError, *_BAD_BYTES) as error:
        raise ImageError(
            f"the {name} file is damaged and cannot be decoded", error_class=RowErrorClass.CORRUPT
        ) from error
