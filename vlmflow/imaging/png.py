"""PNG files as Pillow reads them, and what it passes over: their colours, and exactly which one is transparent."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from vlmflow.imaging.profiles import (
    MAX_PROFILE_BYTES,
    SRGB,
    SRGB_CURVE,
    Curve,
    Profile,
    check_profile_size,
    profile_of,
    profile_of_code_points,
)

MAGIC = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH_AT, _COLOR_TYPE_AT = 24, 25
# Of what is transparent, by type: a colour in grey or in RGB, more behind which is passed over, or a palette's alphas.
_PALETTE = b"\3"
_TRNS_BYTES = {b"\0": (2, 2**31), b"\2": (6, 2**31), _PALETTE: (0, 256)}
_ACTL_BYTES = 8
_OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"eXIf")
_BAD_BYTES = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
_MAX_CHUNKS = 100_000  # files of more are refused
# Of gammas so near to that of screens browsers and libpng take sRGB's own curve.
_GAMMA_OF_SCREENS, _NEAR = 2.2, 0.05
_LARGEST_GAMMA = 10_000.0  # a number of a profile holds no more than 32,767
_SCALE = 100_000  # of the integers that stand for fractions


class PngFile(PngImageFile):
    """A PNG whose transparent colour is that of its pixels, of which Pillow keeps eight bits.

    Attributes:
        colour_profiles: what the file says of its colours; the first that makes sense counts.
    """

    colour_profiles: tuple[bytes | Profile, ...] = ()

    def _open(self) -> None:
        assert isinstance(self.fp, BytesIO)
        self._data = data = _without(self.fp.getvalue(), _unfit)
        self.fp = BytesIO(data)
        try:
            super()._open()
        except _BAD_BYTES:
            # Damaged are perhaps remarks alone, for which Pillow refuses the image and no browser does.
            self._data = _without(data, _remarks)
            self.fp = BytesIO(self._data)
            super()._open()
        chunks: dict[bytes, bytes] = {}
        for kind, content in png_chunks(data):
            if kind == b"IDAT":  # nobody heeds what comes later
                break
            chunks.setdefault(kind, content)
        self._key = chunks.get(b"tRNS", b"")
        self._num_colours = len(chunks.get(b"PLTE", b"")) // 3
        self.colour_profiles = tuple(_profiles(chunks))
        self._scale_transparency()

    def seek(self, frame: int) -> None:
        """As Pillow does, which forgets what was changed here when it begins anew."""
        super().seek(frame)
        self._scale_transparency()

    def load(self) -> Any:
        """Reads the pixels; of 16-bit colours, of which one is transparent, as RGBA.

        Raises:
            ValueError: pixels have colours that the palette lacks: of such viewers make black, or the last one it has.
        """
        is_new = bool(self.tile)
        is_deep = is_new and self.mode == "RGB" and self._bit_depth == 16 and len(self._key) >= 6
        loaded = super().load()
        if is_new and self.mode == "P":
            _, greatest = self.im.getextrema()
            if greatest >= self._num_colours:
                raise ValueError(f"colour {greatest} of a palette of {self._num_colours}")
        if is_deep and not self.is_animated:
            self._set_alpha()
        return loaded

    def load_end(self) -> None:
        """Goes on to what comes behind the pixels, which are whole then: what is damaged there are remarks."""
        with suppress(*_BAD_BYTES):
            super().load_end()

    @property
    def _bit_depth(self) -> int:
        return self._data[_BIT_DEPTH_AT]

    def _scale_transparency(self) -> None:
        """Pillow scales the pixels to 8 bits, but not the colour among them that is transparent."""
        if "transparency" not in self.info:
            return
        if self.mode == "L" and self._bit_depth < 8 and len(self._key) >= 2:
            (value,) = struct.unpack_from(">H", self._key)
            self.info["transparency"] = value * 255 // (2**self._bit_depth - 1)
        elif self.mode == "RGB" and self._bit_depth == 16 and len(self._key) >= 6:
            self.info["transparency"] = tuple(value >> 8 for value in struct.unpack_from(">3H", self._key))

    def _set_alpha(self) -> None:
        """Colours that differ in their lower eight bits alone are not all transparent."""
        lower = PngImageFile(BytesIO(_without(self._data, _remarks)))
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]  # the second byte of each value
        wanted = np.frombuffer(self._key[:6], np.uint8).reshape(3, 2)
        is_clear = np.ones((self.height, self.width), bool)
        for image, bytes_of_key in ((self, wanted[:, 0]), (lower, wanted[:, 1])):
            for number, value in enumerate(bytes_of_key):
                is_clear &= np.asarray(image.getchannel(number)) == value
        whole = Image.merge("RGBA", (*self.split(), Image.fromarray(np.where(is_clear, np.uint8(0), np.uint8(255)))))
        self._im, self._mode = whole.im, whole.mode
        self.info.pop("transparency", None)


def _profiles(chunks: dict[bytes, bytes]) -> Iterator[bytes | Profile]:
    """In the order of precedence of the PNG specification (third edition)."""
    if len(code_points := chunks.get(b"cICP", b"")) == 4:
        named = profile_of_code_points(code_points[0], code_points[1])
        if named is not None:
            yield named
    embedded = _embedded(chunks.get(b"iCCP", b""))
    if embedded is not None:
        yield embedded
    if b"sRGB" in chunks or len(chunks.get(b"gAMA", b"")) != 4:
        return
    (number,) = struct.unpack(">I", chunks[b"gAMA"])
    gamma = _SCALE / number if number else 0.0
    if 0 < gamma <= _LARGEST_GAMMA:
        curve = SRGB_CURVE if abs(_GAMMA_OF_SCREENS / gamma - 1) < _NEAR else Curve(gamma)
        places = chunks.get(b"cHRM", b"")
        primaries = tuple(value / _SCALE for value in struct.unpack(">8I", places)) if len(places) == 32 else SRGB
        described = profile_of(curve, primaries)
        if described is not None:
            yield described


def _embedded(content: bytes) -> bytes | None:
    """The profile behind its name; None: there is none, or not all of it, and browsers do without."""
    name, _, rest = content.partition(b"\0")
    if not 0 < len(name) < 80 or rest[:1] != b"\0":
        return None
    unfolding = zlib.decompressobj()
    try:
        profile = unfolding.decompress(rest[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return None
    check_profile_size(len(profile))
    return profile if unfolding.eof else None


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Types and contents of the chunks of a PNG, but for those that may be missing and are damaged."""
    for kind, start, end in _places(data):
        if not _is_damaged(data, kind, start, end):
            yield kind, data[start + 8 : end - 4] if end <= len(data) else data[start + 8 :]


def _is_damaged(data: bytes, kind: bytes, start: int, end: int) -> bool:
    """Of a chunk that may be missing, whether the sum behind is not that of its bytes; others Pillow checks."""
    return bool(kind[0] & 0x20) and zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big")


def _places(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Types of chunks, and where they begin and end, all of their bytes counted."""
    at = len(MAGIC)
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end


def _without(data: bytes, found: Callable[[bytes], Iterable[tuple[int, int]]]) -> bytes:
    """A PNG without some of its chunks, of which it is told where they begin and end."""
    kept, at = [], 0
    for start, end in found(data):
        kept.append(data[at:start])
        at = end
    return b"".join([*kept, data[at:]]) if kept else data


def _remarks(data: bytes) -> Iterator[tuple[int, int]]:
    """Chunks that do not make its pixels."""
    for kind, start, end in _places(data):
        if kind not in _OF_PIXELS or _is_damaged(data, kind, start, end):
            yield start, end


def _unfit(data: bytes) -> Iterator[tuple[int, int]]:
    """Chunks of what is transparent, or of an animation, that browsers pass over and Pillow does not."""
    color_type, is_known = data[_COLOR_TYPE_AT : _COLOR_TYPE_AT + 1], False
    is_early = color_type == _PALETTE
    for kind, start, end in _places(data):
        size = end - start - 12
        if kind == b"IDAT":
            is_known = True
        elif kind == b"PLTE":
            is_early = False
        elif kind == b"acTL" and size < _ACTL_BYTES:
            yield start, end
        elif kind == b"tRNS":
            least, most = _TRNS_BYTES.get(color_type, (0, size))
            if is_early or is_known or not least <= size <= most or _is_damaged(data, kind, start, end):
                yield start, end
            else:
                is_known = True


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk as it stands in a file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
