"""Colour profiles of curves and primaries as arithmetic, for devices, where there is no little CMS."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmflow.imaging.profiles import CURVES_OF_COLOURS, PRIMARIES_OF_COLOURS, SRGB, Profile, colorants

# Of the curve of sRGB, from light to level (IEC 61966-2-1).
SRGB_START, SRGB_SLOPE, SRGB_OFFSET, SRGB_EXPONENT = 0.0031308, 12.92, 0.055, 1 / 2.4

# Of the values behind the exponent of a parametric curve, by its number (ICC.1:2022, 10.18).
_NUM_VALUES = (0, 2, 3, 4, 6)


class Shaper(NamedTuple):
    """What turns levels into light of sRGB, whose own curve makes levels of it again.

    Attributes:
        light: (3, 256) float32; of each level of red, green and blue, where 1 is white; curves may exceed it.
        mixed: (3, 3) float32; how much of each (columns) there is in sRGB's (rows).
    """

    light: NDArray[np.float32]
    mixed: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """For :meth:`from_bytes`: 3,108 bytes, equal for equal colours."""
        return self.light.tobytes() + self.mixed.tobytes()

    def apply(self, levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(..., 3) levels -> the same in sRGB."""
        light = np.stack([self.light[channel][levels[..., channel]] for channel in range(3)], -1)
        light = (light @ self.mixed.T).clip(0, 1)
        bent = np.where(light <= SRGB_START, light * SRGB_SLOPE, (1 + SRGB_OFFSET) * light**SRGB_EXPONENT - SRGB_OFFSET)
        found: NDArray[np.uint8] = np.rint(255 * bent).astype(np.uint8)
        return found

    @classmethod
    def from_bytes(cls, data: bytes) -> Shaper:
        """What :meth:`to_bytes` gave; its arrays cannot be written to."""
        values = np.frombuffer(data, np.float32)
        return cls(values[: 3 * 256].reshape(3, 256), values[3 * 256 :].reshape(3, 3))


def shaper_of(profile: Profile) -> Shaper | None:
    """None: it has a table, or is of grey or of inks, or has a curve that no standard knows."""
    if any(name not in profile.tags for name in (*PRIMARIES_OF_COLOURS, *CURVES_OF_COLOURS)):
        return None
    curves = [_light(profile.tags[name]) for name in CURVES_OF_COLOURS]
    columns = [_values(profile.tags[name], 3) for name in PRIMARIES_OF_COLOURS]
    if any(values is None for values in (*curves, *columns)):
        return None
    mixed = np.linalg.solve(colorants(SRGB), np.array(columns).T)
    return Shaper(np.array(curves).astype(np.float32), mixed.astype(np.float32))


def _light(curve: bytes) -> NDArray[np.float64] | None:
    """(256,): of each level."""
    levels = np.arange(256) / 255
    if curve[:4] == b"para" and len(curve) >= 12:
        return _parametric(int.from_bytes(curve[8:10], "big"), curve, levels)
    if curve[:4] != b"curv" or len(curve) < 12:
        return None
    count = int.from_bytes(curve[8:12], "big")
    if count == 0:
        return levels
    if len(curve) < 12 + 2 * count:
        return None
    samples = np.frombuffer(curve, ">u2", count, 12)
    if count == 1:
        return np.asarray(levels ** (float(samples[0]) / 256))
    return np.interp(levels * (count - 1), np.arange(count), samples / 65535)


def _parametric(number: int, curve: bytes, levels: NDArray[np.float64]) -> NDArray[np.float64] | None:
    if number >= len(_NUM_VALUES):
        return None
    values = _values(curve[4:], 1 + _NUM_VALUES[number])
    if values is None:
        return None
    gamma, a, b, c, d, e, f = values[0], 1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    match number:
        case 1 | 2:
            a, b = values[1:3]
            if a == 0:
                return None
            e = f = values[3] if number == 2 else 0.0
            d = -b / a
        case 3 | 4:
            a, b, c, d = values[1:5]
            e, f = values[5:7] if number == 4 else (0.0, 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        bent = np.maximum(a * levels + b, 0) ** gamma + e
    found = np.where(levels >= d, bent, c * levels + f)
    return found if np.isfinite(found).all() else None


def _values(tag: bytes, count: int) -> list[float] | None:
    """The numbers of 16.16 bits behind the first eight bytes."""
    if len(tag) < 8 + 4 * count:
        return None
    return [value / 65536 for value in struct.unpack_from(f">{count}i", tag, 8)]
