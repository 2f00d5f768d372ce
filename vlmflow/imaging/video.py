"""Frames of a video, by PyAV (FFmpeg's libraries): what moderation is shown of it. Sound is not listened to.

Short videos are looked at frame by frame, longer ones at their key frames, which encoders put at cuts and every few
seconds. A file's other streams of pictures are looked at as well: a second camera, its cover. How many frames there are
and when they end is counted, for a header may say anything. Needs the package `av` (extra ``video``); without it a
video is an image of an unsupported format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from typing import Any

from PIL import Image

from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging.headers import IMAGE_BRANDS, iso_brands

# Up to so many frames every one is looked at.
_EVERY_FRAME_UP_TO = 600
# Key frames further apart than this leave something unseen. Encoders put one every 250 frames at the latest.
_LONGEST_GAP_S = 12.0
_FFMPEG_MAX_PIXELS = 2**31 - 1
_PROBED_PIXELS = 1 << 24
# What PyAV raises of its own on bytes that do not fit.
_BAD_BYTES = (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AssertionError)
_FORMATS = ("mp4", "webm")
_FTYP_BRANDS = {
    *(b"isom", b"iso2", b"iso3", b"iso4", b"iso5", b"iso6", b"iso7", b"iso8", b"iso9", b"mp41", b"mp42", b"mp71"),
    *(b"avc1", b"avc3", b"hvc1", b"hev1", b"av01", b"M4V ", b"M4VH", b"M4VP", b"qt  ", b"f4v ", b"MSNV", b"NDSC"),
    *(b"dash", b"msdh", b"cmfc", b"cmf2", b"cmaf", b"3gp4", b"3gp5", b"3gp6", b"3gp7", b"3gg6", b"3g2a", b"mmp4"),
}
# Of ISO base media files that are no videos, though what they are compatible with says they might be.
_OTHER_BRANDS = {b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ", b"crx ", b"jp2 ", b"jpx "}


@dataclass(frozen=True)
class VideoFacts:
    """What the table records. ``num_frames``: that are there; at least 1."""

    format: str
    mode: str
    width: int
    height: int
    num_frames: int


@dataclass(frozen=True)
class Track:
    """One stream of pictures: a video, or the single picture of a cover.

    Attributes:
        index: among all streams of the file.
        num_frames: that are there, whatever the header says.
        start_s: of the first.
        end_s: when the last one ends, or later, where the header says so.
    """

    index: int
    num_frames: int
    start_s: float
    end_s: float

    @property
    def every_frame(self) -> bool:
        """Whether all its frames are looked at, and not its key frames alone."""
        return self.num_frames <= _EVERY_FRAME_UP_TO


def sniff_video(data: bytes) -> str | None:
    """``mp4`` (and its kin) or ``webm`` (and Matroska) by the first bytes; None: no video."""
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "webm"
    brands = iso_brands(data)
    if not brands or brands[0] in _OTHER_BRANDS | IMAGE_BRANDS:
        return None
    # Of a major brand that nobody knows, those that it is compatible with decide, pictures first.
    is_video = brands[0] in _FTYP_BRANDS or (IMAGE_BRANDS.isdisjoint(brands) and not _FTYP_BRANDS.isdisjoint(brands))
    return "mp4" if is_video else None


def is_video_supported() -> bool:
    """Whether the package that decodes videos is installed."""
    return find_spec("av") is not None


class Video:
    """A video whose header has been read and whose frames have been counted."""

    def __init__(self, data: bytes, max_pixels: int, facts: VideoFacts, tracks: Sequence[Track]) -> None:
        self._data, self._max_pixels = data, max_pixels
        self.facts = facts
        self.tracks = tracks

    def frames(self) -> Iterator[tuple[Track, float, Image.Image]]:
        """Frames from the beginning: their track, seconds, and RGB or RGBA as displayed. Of long tracks key frames.

        Raises:
            ImageError: nothing can be decoded, or not from here on.
        """
        for track in self.tracks:
            # Opened for each: to go back in a file that is open, FFmpeg trusts what the file says of its key frames.
            with _opened(self._data, self._max_pixels, self.facts.format) as container:
                stream = container.streams[track.index]
                codec = _codec(stream, self.facts.format)
                codec.options = _limits(self._max_pixels)
                codec.skip_frame = "DEFAULT" if track.every_frame else "NONKEY"
                for frame in container.decode(stream):
                    turn = int(getattr(frame, "rotation", 0) or 0) % 360
                    image = _image(frame)
                    yield track, float(frame.time or 0.0), image.rotate(turn, expand=True) if turn else image


def open_video(data: bytes, max_pixels: int) -> Video:
    """Opens a video, reads its header and counts its frames.

    Args:
        max_pixels: of a frame; larger ones are not decoded.

    Raises:
        ImageError: it holds no picture, or cannot be read; or the package to do so is not installed.
    """
    name = sniff_video(data) or _FORMATS[0]
    if not is_video_supported():
        message = "a video; its frames are decoded where vlmflow[video] is installed"
        raise ImageError(message, error_class=RowErrorClass.UNSUPPORTED_FORMAT)
    with _opened(data, max_pixels, name) as container:
        tracks = _tracks(container)
        if not tracks:
            raise ImageError("the video holds no picture", error_class=RowErrorClass.CORRUPT)
        codec = _codec(container.streams[tracks[0].index], name)
        mode = str(codec.pix_fmt or "yuv")
        facts = VideoFacts(name, mode, codec.width or 0, codec.height or 0, max(1, tracks[0].num_frames))
        return Video(data, max_pixels, facts, tracks)


def unseen_gap(seen: Mapping[Track, Sequence[float]]) -> str | None:
    """What was left unseen between the frames that were looked at; None: nothing to speak of.

    Args:
        seen: of each track, the seconds of those frames.
    """
    longest = 0.0
    for track, times in seen.items():
        if track.num_frames and not times:
            return f"none of the {track.num_frames:,} frames of one of its streams can be decoded"
        if not track.every_frame:
            moments = sorted((track.start_s, *times, track.end_s))
            longest = max(longest, *(after - before for before, after in pairwise(moments)))
    return f"{longest:.0f} s between two key frames were not looked at" if longest > _LONGEST_GAP_S else None


def _tracks(container: Any) -> list[Track]:
    """The streams of pictures, covers last: a player shows those beside the video, or before it."""
    from av.error import FFmpegError
    from av.stream import Disposition

    streams = sorted(container.streams.video, key=lambda stream: bool(stream.disposition & Disposition.attached_pic))
    counts = {stream.index: 0 for stream in streams}
    spans: dict[int, tuple[int, int]] = {}  # in units of the stream
    with suppress(FFmpegError, *_BAD_BYTES):  # what stands behind is not decoded either, and that is said
        for packet in container.demux(streams) if streams else ():
            index, start = packet.stream.index, packet.dts if packet.pts is None else packet.pts
            counts[index] += packet.size > 0
            if packet.size and start is not None:
                end = start + max(packet.duration or 0, 0)
                first, last = spans.get(index, (start, end))
                spans[index] = min(first, start), max(last, end)
    said_s = 0.0 if container.duration is None else container.duration / 1_000_000
    tracks = []
    for stream in streams:
        start_s, end_s = (float(moment * stream.time_base) for moment in spans.get(stream.index, (0, 0)))
        tracks.append(Track(stream.index, counts[stream.index], start_s, max(end_s, said_s)))
    return tracks


def _codec(stream: Any, name: str) -> Any:
    if stream.codec_context is None:
        message = f"the {name} file holds pictures of a kind that cannot be decoded"
        raise ImageError(message, error_class=RowErrorClass.UNSUPPORTED_FORMAT)
    return stream.codec_context


def _limits(max_pixels: int) -> dict[str, str]:
    """A decoder's options: a frame is allocated as its own header says, whatever that of the file says."""
    return {"max_pixels": str(min(max_pixels, _FFMPEG_MAX_PIXELS))}


def _image(frame: Any) -> Image.Image:
    """A frame as RGB, or RGBA where its format has alpha."""
    if any(component.is_alpha for component in frame.format.components):
        return Image.fromarray(frame.to_ndarray(format="rgba"))
    image: Image.Image = frame.to_image()
    return image


@contextmanager
def _opened(data: bytes, max_pixels: int, name: str) -> Iterator[Any]:
    """A container that is closed afterwards; what goes wrong with it is told as an ImageError."""
    import av

    # FFmpeg decodes some frames to find out what they are, and tells no size of those that it refuses: what is not much
    # too large must pass, to be called that.
    options = _limits(max(2 * max_pixels, _PROBED_PIXELS))
    with _bad_video(name), av.open(BytesIO(data), options=options, metadata_errors="replace") as container:
        yield container


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
