"""Curves and primaries of profiles as arithmetic: what little CMS makes of the same profile."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from tests.images import Array, encode
from tests.unit.imaging.test_colours import (
    ADOBE,
    LIMITS,
    P3,
    REQUEST,
    SWAPPED,
    icc,
    in_pieces,
    numbers,
    table_icc,
    to_light,
)
from vlmflow.imaging import hash_of
from vlmflow.imaging.colours import _converter_of, _samples
from vlmflow.imaging.jpeg import leave_encoded
from vlmflow.imaging.profiles import CURVES_OF_COLOURS, SRGB_CURVE, Curve, Profile, profile_of, read_profile
from vlmflow.imaging.shapers import Shaper, shaper_of


def para(number: int, *values: float) -> bytes:
    return b"para" + struct.pack(f">IHH{len(values)}i", 0, number, 0, *(round(value * 65536) for value in values))


def curv(*values: int) -> bytes:
    return b"curv" + struct.pack(f">II{len(values)}H", 0, len(values), *values)


def sampled(num_samples: int) -> bytes:
    return curv(*np.rint(65535 * to_light(np.linspace(0, 255, num_samples))).astype(int))


def of_curve(tone: bytes) -> Profile:
    """Of Display P3's primaries."""
    whole = profile_of(SRGB_CURVE, P3)
    assert whole is not None
    return Profile(whole.space, whole.reference, whole.tags | dict.fromkeys(CURVES_OF_COLOURS, tone))


def by_little_cms(profile: Profile) -> tuple[Array, Array]:
    """Levels of colours, and how they are shown."""
    converter = _converter_of(profile)
    assert converter is not None
    given = _samples()
    return np.asarray(given), np.asarray(converter.apply(given)).astype(int)


SRGB_VALUES = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
CURVES = {
    "none": curv(),
    "a gamma": curv(round(2.2 * 256)),
    "two samples": curv(0, 65535),
    "few samples": sampled(17),
    "many samples": sampled(1024),
    "0": para(0, 2.2),
    "1": para(1, 2.2, 1 / 1.1, 0.1 / 1.1),
    "1, black below": para(1, 2.2, 1.1, -0.1),
    "2": para(2, 2.2, 0.9, 0.05, 0.02),
    "3": para(3, *SRGB_VALUES),
    "4": para(4, 2.4, 0.94, 0.055, 0.077, 0.04, 0.01, 0.012),
    "beyond white": para(1, 1.8, 1.1, 0.0),
}


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_of_the_standard_is_what_little_cms_makes_of_it(name: str) -> None:
    profile = of_curve(CURVES[name])
    shaper = shaper_of(profile)
    assert shaper is not None
    levels, expected = by_little_cms(profile)
    assert np.abs(shaper.apply(levels) - expected).max() <= 1
    again = Shaper.from_bytes(shaper.to_bytes())
    assert np.array_equal(again.apply(levels), shaper.apply(levels))


@pytest.mark.parametrize("primaries", [P3, ADOBE])
def test_profiles_of_screens_and_cameras_are_offered_to_devices(primaries: tuple[float, ...]) -> None:
    profile = read_profile(icc(Curve(2.2), primaries))
    assert profile is not None
    converter = _converter_of(profile)
    assert converter is not None
    assert converter.shaper is not None


@pytest.mark.parametrize(
    "tone",
    [
        para(5, 2.2),
        para(3, *SRGB_VALUES[:4]),
        para(1, 2.2, 0.0, 0.5),
        para(0, -2.2),
        b"para\0\0\0\0",
        curv(0, 1, 2)[:-2],
        b"curv\0\0\0\0",
        b"data" + bytes(12),
    ],
    ids=["number", "short", "flat", "falling", "empty", "fewer samples", "no count", "other"],
)
def test_curves_that_no_standard_knows_are_left_to_processors(tone: bytes) -> None:
    assert shaper_of(of_curve(tone)) is None


def test_tables_are_left_to_processors() -> None:
    profile = read_profile(table_icc(b"RGB ", lambda r, g, b: (r + g + b) / 3, 3))
    assert profile is not None
    assert shaper_of(profile) is None


def test_a_device_decodes_jpegs_of_usual_profiles_alone() -> None:
    picture = Image.fromarray(numbers())
    odd = icc(primaries=SWAPPED)
    for profile, is_left, is_shaped in (
        (b"", True, False),
        (icc(), True, False),
        (icc(primaries=P3), True, True),
        (icc(Curve(2.19921875), ADOBE), True, True),
        (icc(Curve(1.0)), False, False),
        (odd, False, False),
    ):
        data = encode(picture, "JPEG", **({"icc_profile": profile} if profile else {}))
        left = leave_encoded(data, [REQUEST], LIMITS, hash_of(data))
        assert (left is not None) is is_left
        assert (left is not None and left.shaper is not None) is is_shaped
    assert leave_encoded(in_pieces((1, 1, odd), after_frame=True), [REQUEST], LIMITS, "0") is None
    left = leave_encoded(in_pieces((1, 1, icc(primaries=P3)), after_frame=True), [REQUEST], LIMITS, "0")
    assert left is not None
    assert left.shaper is not None
