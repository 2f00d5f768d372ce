"""Colour profiles (ICC.1:2022): those in files, read as browsers read them, and those made of what else files say.

Of a damaged profile, or one that says two things, viewers make different pictures. What Chromium's reader (skcms) takes
for the colours is kept, and nothing else, so that little CMS can choose nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmflow.errors import ImageError

# x and y of white, red, green and blue (CIE 1931).
Primaries = tuple[float, ...]
_D65, _C, _DCI = (0.3127, 0.329), (0.31, 0.316), (0.314, 0.351)
SRGB: Primaries = (*_D65, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_NTSC: Primaries = (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07)
# By their numbers in ITU-T H.273, which PNG (cICP) and AVIF (nclx) use.
_PRIMARIES: dict[int, Primaries] = {
    1: SRGB,
    4: (*_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: _NTSC,
    7: _NTSC,
    8: (*_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*_D65, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (*_DCI, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (*_D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    22: (*_D65, 0.63, 0.34, 0.295, 0.605, 0.155, 0.077),
}
_D50 = (0.9642, 1.0, 0.8249)

# Size, major version, class of device, space, reference, magic, white of the reference, number of tags.
_HEADER = struct.Struct(">I4xB3x4s4s4s12x4s28x3i48xI")
_MAGIC = b"acsp"
MAX_PROFILE_BYTES = 4 * 1024 * 1024  # those of screens have some hundred, those of presses up to two million
_REMEDY = "Save the image in sRGB, without a profile."
_TABLE, _RELATIVE_TABLE = b"A2B0", b"A2B1"
PRIMARIES_OF_COLOURS, CURVES_OF_COLOURS = (b"rXYZ", b"gXYZ", b"bXYZ"), (b"rTRC", b"gTRC", b"bTRC")
_OF_COLOURS = (*PRIMARIES_OF_COLOURS, *CURVES_OF_COLOURS)
_NAMES = {_TABLE, _RELATIVE_TABLE, b"kTRC", *_OF_COLOURS}
_MAX_SAMPLES = 16 * 255 + 1  # one at each of 256 levels
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Curve:
    """From a level within 0 to 1 to light: ``((level + offset) / (1 + offset)) ** gamma``, below ``start`` a line."""

    gamma: float
    offset: float = 0.0
    slope: float = 0.0
    start: float = 0.0


_TELEVISION, _SRGB_TRANSFER = (1, 6, 14, 15), 13
SRGB_CURVE = Curve(2.4, 0.055, 1 / 12.92, 0.04045)
_SCREEN = Curve(2.4)  # of what television's cameras write (BT.1886)
# HDR (PQ, HLG) is not among them: what exceeds a screen's white is shown by every viewer in a way of its own.
_CURVES = {
    **dict.fromkeys((1, 6, 11, 14, 15), _SCREEN),
    4: Curve(2.2),
    5: Curve(2.8),
    7: Curve(1 / 0.45, 0.1115, 1 / 4, 0.0913),
    8: Curve(1.0),
    13: SRGB_CURVE,
    17: Curve(2.6),
}


@dataclass(frozen=True)
class Profile:
    """What counts of a profile.

    Attributes:
        space: of the numbers to which it gives a meaning: ``GRAY``, ``CMYK``, or else ``RGB``.
        reference: ``XYZ`` or ``Lab``, in which it gives it.
        tags: a table (A2B0), or the curves (TRC) and for colours the primaries (XYZ).
    """

    space: bytes
    reference: bytes
    tags: dict[bytes, bytes]

    @property
    def has_table(self) -> bool:
        """Whether it names colours one by one, and not by a curve and a share of each primary."""
        return _TABLE in self.tags

    def file(self) -> bytes:
        """The profile as a file that says nothing else."""
        at, directory, content = _HEADER.size + 12 * len(self.tags) + 12, b"", b""
        places = dict[bytes, int]()
        for name, data in {b"wtpt": _xyz(_D50), **self.tags}.items():
            if data not in places:  # curves of the three colours are often one
                places[data] = at + len(content)
                content += data + bytes(-len(data) % 4)
            directory += name + struct.pack(">II", places[data], len(data))
        size, device = at + len(content), b"prtr" if self.space == b"CMYK" else b"mntr"
        header = _HEADER.pack(size, 2, device, self.space, self.reference, _MAGIC, *_fixed(_D50), len(self.tags) + 1)
        return header + directory + content


def read_profile(data: bytes) -> Profile | None:
    """None: it is damaged, and viewers show the numbers of the pixels as they are.

    Raises:
        ImageError: it is too large, or its parts lie over one another; viewers may show what it makes of the pixels.
    """
    if len(data) < _HEADER.size:
        return None
    size, version, _, space, reference, magic, x, y, z, count = _HEADER.unpack_from(data)
    white = (x / 65536, y / 65536, z / 65536)
    if magic != _MAGIC or version > 4 or size > len(data) or size < _HEADER.size + 12 * count:
        return None
    if reference not in (b"XYZ ", b"Lab ") or any(abs(a - b) > 0.01 for a, b in zip(white, _D50, strict=True)):
        return None
    check_profile_size(size)
    found, parts = dict[bytes, bytes](), dict[tuple[int, int], bytes]()
    for name, at, length in struct.iter_unpack(">4sII", data[_HEADER.size : _HEADER.size + 12 * count]):
        if length < 4 or at + length > size:
            return None
        if name in _NAMES and name not in found:  # of those that are there twice the first counts
            found[name] = parts.setdefault((at, length), data[at : at + length])
    if sum(length for _, length in parts) > size:
        raise ImageError("the parts of the colour profile lie over one another", remedy=_REMEDY)
    return _usable(space, reference, found)


def check_profile_size(num_bytes: int) -> None:
    """Refuses the image of a profile that would take too much time: what people see of it cannot be told without."""
    if num_bytes > MAX_PROFILE_BYTES:
        message = f"the colour profile has more than {MAX_PROFILE_BYTES:,} bytes"
        raise ImageError(message, remedy=_REMEDY)


def _usable(space: bytes, reference: bytes, found: dict[bytes, bytes]) -> Profile | None:
    space = space if space in (b"GRAY", b"CMYK") else b"RGB "  # also where it says nonsense
    table = found.get(_TABLE, found.get(_RELATIVE_TABLE))
    if table is not None:
        return Profile(space, reference, {_TABLE: table})
    names = (b"kTRC",) if space == b"GRAY" else _OF_COLOURS
    if not all(name in found for name in names) or (space == b"GRAY" and reference != b"XYZ "):
        return None
    return Profile(space, b"XYZ ", {name: _short(found[name]) for name in names})


def _short(curve: bytes) -> bytes:
    """A sampled curve of so few samples that little CMS takes it; of more than 32,767 it refuses the profile."""
    if curve[:4] != b"curv" or len(curve) < 12:
        return curve
    count = int.from_bytes(curve[8:12], "big")
    if count <= _MAX_SAMPLES or len(curve) < 12 + 2 * count:
        return curve
    samples = np.frombuffer(curve, ">u2", count, 12)
    shorter = np.interp(np.linspace(0, count - 1, _MAX_SAMPLES), np.arange(count), samples)
    told = np.rint(shorter).astype(">u2").tobytes()
    return b"curv" + struct.pack(">II", 0, _MAX_SAMPLES) + bytes(told)


def profile_of_code_points(primaries: int, transfer: int) -> Profile | None:
    """Of the numbers that ITU-T H.273 has for primaries and curves; None: they name none, or one that is not shown."""
    if primaries not in _PRIMARIES or transfer not in _CURVES:
        return None
    return profile_of(_CURVES[transfer], _PRIMARIES[primaries])


def profile_of_nclx(primaries: int, transfer: int) -> Profile | None:
    """As :func:`profile_of_code_points`, of an AVIF or HEIC: for television's curves browsers take that of sRGB."""
    return profile_of_code_points(primaries, _SRGB_TRANSFER if transfer in _TELEVISION else transfer)


def profile_of(curve: Curve, primaries: Primaries) -> Profile | None:
    """None: the primaries span no colours."""
    try:
        columns = [_xyz(column) for column in colorants(primaries).T]
        values = (curve.gamma, 1 / (1 + curve.offset), curve.offset / (1 + curve.offset), curve.slope, curve.start)
        tone = b"para" + struct.pack(">IHH", 0, 3, 0) + struct.pack(">5i", *_fixed(values))
    except (np.linalg.LinAlgError, ArithmeticError, struct.error, ValueError):
        return None
    return Profile(b"RGB ", b"XYZ ", dict(zip(_OF_COLOURS, [*columns, tone, tone, tone], strict=True)))


def colorants(primaries: Primaries) -> NDArray[np.float64]:
    """(3, 3): CIE XYZ of red, green and blue in the columns, seen as under D50 (Lindbloom's formulae)."""
    places = np.array(primaries, np.float64).reshape(4, 2)
    white, *colours = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in places)
    columns = np.stack(colours, axis=1)
    columns = columns * np.linalg.solve(columns, white)
    scale = (_BRADFORD @ np.array(_D50)) / (_BRADFORD @ white)
    adapted: NDArray[np.float64] = np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD @ columns
    return adapted


def _fixed(values: Sequence[float] | NDArray[np.float64]) -> list[int]:
    return [round(float(value) * 65536) for value in values]


def _xyz(values: Sequence[float] | NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *_fixed(values))
