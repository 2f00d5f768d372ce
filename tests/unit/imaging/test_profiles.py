"""Large colour profiles, and those whose parts lie anywhere, cost little; what is not read is not shown without."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.images import encode, png
from tests.unit.imaging.test_colours import LIMITS, P3, REQUEST, SWAPPED, icc, iccp, near, numbers, shown
from vlmflow.errors import ImageError
from vlmflow.imaging import PixelRequest, colours, decode, profiles
from vlmflow.imaging.profiles import MAX_PROFILE_BYTES, Curve, Profile, read_profile

FRAMES = PixelRequest(16, "bicubic", ("squash", "black", "frames"))


def with_parts(whole: bytes, *, is_shared: bool = False, shift: int = 0, num_bytes: int = 0) -> bytes:
    """A profile with its parts made anew: its curves one region, or regions that lie over one another.

    Args:
        shift: bytes from the start of each curve to that of the next.
        num_bytes: of each curve, the rest of which means nothing.
    """
    profile = read_profile(whole)
    assert profile is not None
    tags = sorted(profile.tags.items())
    at, directory, content = 132 + 12 * len(tags), b"", b""
    first_curve = None
    for name, data in tags:
        data += bytes(max(num_bytes - len(data), 0) if name.endswith(b"TRC") else 0)
        start = at + len(content)
        if name.endswith(b"TRC") and is_shared:
            if first_curve is None:
                first_curve = start
                content += data + bytes(3 * shift)
            else:
                first_curve += shift
            start = first_curve
        else:
            content += data
        directory += name + struct.pack(">II", start, len(data))
    return struct.pack(">I", at + len(content)) + whole[4:128] + struct.pack(">I", len(tags)) + directory + content


def picture(profile: bytes, format: str) -> bytes:
    if format == "PNG":
        return png(numbers(), 2, chunks=iccp(profile))
    options = {"lossless": True} if format == "WEBP" else {}
    return encode(Image.fromarray(numbers()), format, icc_profile=profile, **options)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_an_image_whose_profile_is_too_large_is_unreadable(format: str) -> None:
    """Browsers heed it: shown without, the image would be another one."""
    whole = icc(primaries=SWAPPED)
    large = with_parts(whole, num_bytes=MAX_PROFILE_BYTES // 3 - 1000)
    assert near(shown(picture(large, format)), numbers()[..., [2, 0, 1]], 12)
    too_large = with_parts(whole, num_bytes=MAX_PROFILE_BYTES // 3 + 1000)
    with pytest.raises(ImageError, match="the colour profile has more than 4,194,304 bytes") as caught:
        decode(picture(too_large, format), [REQUEST], LIMITS)
    assert caught.value.remedy


def test_curves_may_be_one_region_and_not_lie_over_one_another() -> None:
    whole = icc(primaries=SWAPPED)
    shared = with_parts(whole, is_shared=True, num_bytes=100_000)
    assert near(shown(picture(shared, "PNG")), numbers()[..., [2, 0, 1]])
    profile = read_profile(shared)
    assert profile is not None
    assert len(profile.file()) < len(shared) + 100  # not three times as much
    with pytest.raises(ImageError, match="lie over one another"):
        decode(picture(with_parts(whole, is_shared=True, shift=4, num_bytes=100_000), "PNG"), [REQUEST], LIMITS)


def test_of_an_animation_the_profile_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0

    def count(data: bytes) -> profiles.Profile | None:
        nonlocal num_read
        num_read += 1
        return read_profile(data)

    monkeypatch.setattr(colours, "read_profile", count)
    images = [Image.new("RGBA", (16, 16), (10 * number, 20, 30, 200)) for number in range(12)]
    for format in ("WEBP", "PNG"):
        num_read = 0
        data = encode(images[0], format, save_all=True, append_images=images[1:], icc_profile=icc(primaries=P3))
        found = decode(data, [FRAMES], LIMITS)
        assert found.facts.num_frames == 12
        assert num_read == 1


def test_each_page_of_a_tiff_has_a_profile_of_its_own() -> None:
    images = [Image.fromarray(numbers()), Image.fromarray(numbers()[::-1].copy())]
    with BytesIO() as file:
        first, second = images
        second.encoderinfo = {"icc_profile": icc(primaries=SWAPPED)}
        first.save(file, "TIFF", save_all=True, append_images=[second])
        data = file.getvalue()
    views = {name[:7]: pixels.astype(int) for name, pixels in decode(data, [FRAMES], LIMITS).pixels[FRAMES.key]}
    assert near(views["squash"], numbers())
    assert near(views["frame-1"], numbers()[::-1, :, [2, 0, 1]])


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"num_bytes": MAX_PROFILE_BYTES // 3 + 1000}, "the colour profile has more than 4,194,304 bytes"),
        (
            {"is_shared": True, "shift": 4, "num_bytes": 100_000},
            "the parts of the colour profile lie over one another",
        ),
    ],
)
def test_a_later_page_whose_profile_is_not_read_is_said_not_to_be_looked_at_and_why(
    parts: dict[str, int], why: str
) -> None:
    pages = [Image.fromarray(np.roll(numbers(), 4 * number, axis=0)) for number in range(3)]
    with BytesIO() as file:
        pages[2].encoderinfo = {"icc_profile": with_parts(icc(primaries=SWAPPED), **parts)}
        pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
        found = decode(file.getvalue(), [FRAMES], LIMITS)
    assert found.unseen == f"frames after the first 2 of 3 were not looked at: {why}"
    assert len(found.pixels[FRAMES.key]) == 2  # the two that were


@pytest.mark.parametrize("num_samples", [4081, 4082, 30_000, 65_536, 1_000_000])
def test_a_picture_made_by_a_curve_of_many_samples_is_seen(num_samples: int) -> None:
    """Browsers heed them all, and little CMS no profile with more than 32,767."""
    dark = (numbers() // 32).astype(np.uint8)
    curve = np.rint(65_535 * np.linspace(0, 1, num_samples) ** 0.2).astype(">u2")
    whole = read_profile(icc())
    assert whole is not None
    tone = b"curv" + struct.pack(">II", 0, num_samples) + curve.tobytes()
    made = Profile(
        whole.space, whole.reference, {name: tone if b"TRC" in name else tag for name, tag in whole.tags.items()}
    )
    found = shown(encode(Image.fromarray(dark), "PNG", icc_profile=made.file()))
    assert near(found, shown(encode(Image.fromarray(dark), "PNG", icc_profile=icc(Curve(0.2)))), 3)
    assert found.max() > 100
