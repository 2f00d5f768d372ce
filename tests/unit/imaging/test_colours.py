"""Pixels are in the colours that a browser shows: by a file's profile, or what else it says of them."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.images import Array, encode, png, png_chunk
from vlmflow.config import ImageLimits
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.colours import in_srgb, is_scalable, of_small
from vlmflow.imaging.profiles import SRGB, SRGB_CURVE, Curve, Profile, profile_of, read_profile

LIMITS = ImageLimits()
SIDE = 16
REQUEST = PixelRequest(SIDE, "bicubic", ("squash", "black"))
P3 = (*SRGB[:2], 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
ADOBE = (*SRGB[:2], 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
SWAPPED = (*SRGB[:2], *SRGB[4:], *SRGB[2:4])  # what is called red is shown as green, and so on


def icc(curve: Curve = SRGB_CURVE, primaries: tuple[float, ...] = SRGB) -> bytes:
    profile = profile_of(curve, primaries)
    assert profile is not None
    return profile.file()


def grey_icc(gamma: float) -> bytes:
    tone = b"para" + struct.pack(">IHHi", 0, 0, 0, round(gamma * 65536))
    return Profile(b"GRAY", b"XYZ ", {b"kTRC": tone}).file()


def curves_icc(*levels: Array) -> bytes:
    """Of the levels, within 0 to 255, that those of each colour are to look like."""
    profile = profile_of(SRGB_CURVE, SRGB)
    assert profile is not None
    tones = [b"curv" + struct.pack(">II256H", 0, 256, *np.rint(65535 * to_light(one)).astype(int)) for one in levels]
    return Profile(b"RGB ", b"XYZ ", profile.tags | dict(zip((b"rTRC", b"gTRC", b"bTRC"), tones, strict=True))).file()


def table_icc(space: bytes, reds: Callable[..., float], num_inks: int) -> bytes:
    """Of a profile with a table: shades of grey, by the lightness L* (0 to 1) that a function gives numbers."""
    levels = [
        (round(255 * reds(*numbers)), 128, 128) for numbers in itertools.product((0.0, 0.5, 1.0), repeat=num_inks)
    ]
    matrix = struct.pack(">9i", *(65536 * (number % 4 == 0) for number in range(9)))
    table = b"mft1" + bytes([0, 0, 0, 0, num_inks, 3, 3, 0]) + matrix + bytes(range(256)) * num_inks
    return Profile(space, b"Lab ", {b"A2B0": table + bytes(itertools.chain(*levels)) + bytes(range(256)) * 3}).file()


def shown(data: bytes, ground: str = "squash") -> Array:
    pixels: Array = dict(decode(data, [REQUEST], LIMITS).pixels[REQUEST.key])[ground].astype(int)
    return pixels


def numbers() -> Array:
    """Smooth, so that lossy formats keep it, and of a square as large as what models are shown."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    return np.stack([40 + 180 * x, 30 + 150 * y, 60 + 90 * (x + y) / 2], -1).round().astype(np.uint8)


def to_light(levels: Array) -> Array:
    values = levels / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_levels(light: Array) -> Array:
    clipped = np.clip(light, 0, 1)
    return np.rint(255 * np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055))


def from_p3(levels: Array) -> Array:
    matrix = np.array([[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]])
    return to_levels(to_light(levels) @ matrix.T)


def near(found: Array, expected: Array, tolerance: int = 2) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_colours_of_wide_gamuts_are_shown_as_on_a_screen(format: str, options: dict[str, object]) -> None:
    data = encode(Image.fromarray(numbers()), format, icc_profile=icc(primaries=P3), **options)
    assert near(shown(data), from_p3(numbers()), 8)  # to what lossy formats lose; numbers taken for sRGB are 76 off
    data = encode(Image.fromarray(numbers()), format, icc_profile=icc(primaries=SWAPPED), **options)
    assert near(shown(data), numbers()[..., [2, 0, 1]], 8)


@pytest.mark.parametrize(
    ("curve", "primaries", "most"), [(SRGB_CURVE, P3, 0.4), (Curve(2.19921875), ADOBE, 0.7), (Curve(1.0), SRGB, 0.05)]
)
def test_photographs_have_nearly_the_colours_that_they_have_at_their_full_size(
    curve: Curve, primaries: tuple[float, ...], most: float
) -> None:
    """Profiles of screens and cameras are heeded once an image is small, which takes little time; others are not."""
    request = PixelRequest(224, "bicubic", ("squash",))
    for photograph in load_sample_images().images:
        image = Image.fromarray(photograph)
        given = encode(image, "PNG", icc_profile=icc(curve, primaries))
        with Image.open(BytesIO(given)) as opened:
            assert (of_small(opened) is not None) == (primaries != SRGB)
            full = in_srgb(opened.convert("RGB"), opened).resize((224, 224), Image.Resampling.BICUBIC)
        found = dict(decode(given, [request], LIMITS).pixels[request.key])["squash"].astype(int)
        assert np.abs(found - np.asarray(full).astype(int)).mean() < most
        plain = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(found - plain).mean() > 3 * most


def test_colours_of_images_that_are_smaller_than_their_views_are_converted_once() -> None:
    """Those of all the views would take longer."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 300, 3), np.uint8)
    data = encode(Image.fromarray(noise), "PNG", icc_profile=icc(Curve(2.19921875), ADOBE))
    with Image.open(BytesIO(data)) as opened:
        full = in_srgb(opened.convert("RGB"), opened)
    for size, is_at_full_size in ((60, False), (120, True)):
        request = PixelRequest(size, "bicubic", ("squash", "tiles"))
        found = dict(decode(data, [request], LIMITS).pixels[request.key])["squash"]
        expected = full.resize((size, size), Image.Resampling.BICUBIC)
        assert np.array_equal(found, np.asarray(expected)) is is_at_full_size


LEVELS = np.arange(256)
ISLAND = np.where((LEVELS >= 120) & (LEVELS < 136), 255, 0)  # all else is black
# Up and down by 9 levels, every 8 levels.
WAVY = np.where((LEVELS > 60) & (LEVELS < 200), LEVELS + np.where(LEVELS // 8 % 2, 9, -9), LEVELS)


def striped(side: int, first: int, second: int, around: int) -> Array:
    """A disc of columns that are 128 by 128 on average, as what is around it."""
    y, x = np.mgrid[0:side, 0:side]
    in_disc = (x - side // 2) ** 2 + (y - side // 2) ** 2 < (side // 3) ** 2
    grey = np.where(in_disc, np.where(x % 2, first, second), around).astype(np.uint8)
    return np.stack([grey] * 3, -1)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_jpeg_is_not_made_small_before_an_odd_profile_is_heeded(mode: str) -> None:
    """Of stripes that are black by it the average is white, and a picture of them would be seen by people alone."""
    image = Image.fromarray(striped(8 * SIDE, 116, 140, 128)).convert(mode)
    data = encode(image, "JPEG", quality=100, subsampling=0, icc_profile=curves_icc(ISLAND, ISLAND, ISLAND))
    assert shown(data)[SIDE // 2, SIDE // 2].max() < 30
    assert shown(data)[0, 0].min() > 225


def test_grey_jpegs_of_usual_profiles_are_still_made_small_first() -> None:
    for profile, is_small_first in ((grey_icc(2.2), True), (grey_icc(5.0), False)):
        data = encode(Image.fromarray(numbers()[..., 0]), "JPEG", icc_profile=profile)
        with Image.open(BytesIO(data)) as opened:
            assert is_scalable(opened) is is_small_first


def test_curves_that_go_up_and_down_are_heeded_before_an_image_is_made_small() -> None:
    data = encode(Image.fromarray(striped(64, 116, 132, 124)), "PNG", icc_profile=curves_icc(WAVY, WAVY, WAVY))
    assert (shown(data)[0, 0] - shown(data)[SIDE // 2, SIDE // 2]).min() > 10
    steep = LEVELS + 8 * ((LEVELS > 99) & (LEVELS < 150))
    for levels in ((WAVY, LEVELS, LEVELS), (LEVELS, LEVELS, WAVY), (np.maximum.accumulate(steep),) * 3):
        with Image.open(BytesIO(encode(Image.fromarray(numbers()), "PNG", icc_profile=curves_icc(*levels)))) as opened:
            assert of_small(opened) is None
            assert not is_scalable(opened)


def test_a_picture_that_is_black_but_for_its_profile_is_seen() -> None:
    dark = (numbers() // 32).astype(np.uint8)  # 8 levels, none above 7
    plain, with_profile = (
        shown(encode(Image.fromarray(dark), "PNG", **options)) for options in ({}, {"icc_profile": icc(Curve(0.2))})
    )
    assert plain.max() <= 7
    assert with_profile.max() - with_profile.min() > 40


def test_of_srgb_and_its_like_no_number_is_touched() -> None:
    from PIL import ImageCms

    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), icc()):
        assert np.array_equal(shown(encode(Image.fromarray(numbers()), "PNG", icc_profile=profile)), numbers())


def damaged() -> list[bytes]:
    whole = icc(primaries=SWAPPED)
    other_white = whole[:68] + bytes(12) + whole[80:]
    too_new = whole[:8] + b"\5" + whole[9:]
    return [b"", b"no profile" * 20, whole[:131], whole[:-8], whole.replace(b"acsp", b"pasc"), other_white, too_new]


@pytest.mark.parametrize("number", range(7))
def test_a_damaged_profile_is_none(number: int) -> None:
    data = encode(Image.fromarray(numbers()), "PNG", icc_profile=damaged()[number])
    assert np.array_equal(shown(data), numbers())


def test_a_profile_of_other_numbers_is_none() -> None:
    picture = Image.fromarray(numbers())
    for profile in (grey_icc(5.0), table_icc(b"CMYK", lambda *_: 0.0, 4)):
        assert np.array_equal(shown(encode(picture, "PNG", icc_profile=profile)), numbers())
    inks = encode(picture.convert("CMYK"), "TIFF", icc_profile=icc(primaries=SWAPPED))
    assert near(shown(inks), numbers())


def test_the_class_and_space_of_a_profile_may_be_nonsense() -> None:
    whole = icc(primaries=SWAPPED)
    for odd in (whole.replace(b"mntr", b"link"), whole.replace(b"RGB ", b"RGb ")):
        assert near(shown(encode(Image.fromarray(numbers()), "PNG", icc_profile=odd)), numbers()[..., [2, 0, 1]])


def test_numbers_that_no_screen_has_are_counted_right() -> None:
    profile = read_profile(icc(primaries=SWAPPED))
    assert profile is not None
    large = {
        name: data[:8] + struct.pack(">3i", 0, 40 << 16, 0) for name, data in profile.tags.items() if b"XYZ" in name
    }
    data = encode(Image.fromarray(numbers()), "PNG", icc_profile=Profile(b"RGB ", b"XYZ ", profile.tags | large).file())
    assert shown(data)[..., 1].min() == 255  # all of it is brighter than white, and green: the fast way overflows


def test_transparency_stays_and_palettes_have_profiles_too() -> None:
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:8] = 0
    rgba = Image.fromarray(np.dstack([numbers(), alpha]))
    data = encode(rgba, "PNG", icc_profile=icc(primaries=SWAPPED))
    assert near(shown(data)[:8], np.full((8, SIDE, 3), 255))
    assert near(shown(data, "black")[:8], np.zeros((8, SIDE, 3)))
    assert near(shown(data, "black")[8:], numbers()[8:, :, [2, 0, 1]])
    palette = Image.fromarray(numbers()).quantize(16)
    data = encode(palette, "PNG", icc_profile=icc(primaries=SWAPPED))
    assert near(shown(data), np.asarray(palette.convert("RGB"))[..., [2, 0, 1]])


@pytest.mark.parametrize("profile", [grey_icc(1.0), icc(Curve(1.0))])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_has_profiles_of_grey_and_of_colours(mode: str, profile: bytes) -> None:
    grey = numbers()[..., 0]
    expected = np.repeat(to_levels(grey[..., None] / 255), 3, -1)
    image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey)
    data = encode(image.convert("LA") if mode == "LA" else image, "PNG", icc_profile=profile)
    assert near(shown(data), expected)


def test_tables_are_looked_up() -> None:
    data = encode(Image.fromarray(numbers()), "PNG", icc_profile=table_icc(b"RGB ", lambda *_: 0.5, 3))
    assert near(shown(data), np.full((SIDE, SIDE, 3), 119))  # L* of 50


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks_are_shown_by_their_profile(format: str) -> None:
    inks = Image.new("CMYK", (SIDE, SIDE), (0, 0, 0, 255))
    assert shown(encode(inks, format)).max() <= 3
    profile = table_icc(b"CMYK", lambda c, m, y, k: k, 4)  # a print on black, on which ink is white
    assert shown(encode(inks, format, icc_profile=profile)).min() >= 250


def in_pieces(*pieces: tuple[int, int, bytes], after_frame: bool = False) -> bytes:
    data = encode(Image.fromarray(numbers()), "JPEG", quality=100, subsampling=0)
    at = data.index(b"\xff\xda") if after_frame else 2
    segments = [bytes([number, count]) + content for number, count, content in pieces]
    written = [b"\xff\xe2" + struct.pack(">H", 14 + len(one)) + b"ICC_PROFILE\0" + one for one in segments]
    return data[:at] + b"".join(written) + data[at:]


def test_the_profile_of_a_jpeg_is_put_together_wherever_its_pieces_stand() -> None:
    whole, other, swapped = icc(primaries=SWAPPED), icc(primaries=P3), numbers()[..., [2, 0, 1]]
    half = len(whole) // 2
    for data in (
        in_pieces((1, 2, whole[:half]), (2, 2, whole[half:])),
        in_pieces((2, 2, whole[half:]), (1, 2, whole[:half])),
        in_pieces((1, 1, whole), after_frame=True),
        in_pieces((1, 1, whole), (1, 1, other)),
        in_pieces((1, 1, whole), (2, 2, b"more")),
    ):
        assert near(shown(data), swapped, 4)
    for data in (
        in_pieces((1, 2, whole)),
        in_pieces((0, 1, whole)),
        in_pieces((1, 2, whole[:half]), (2, 3, whole[half:])),
    ):
        assert near(shown(data), numbers(), 4)


def test_the_profile_of_a_bmp_is_heeded() -> None:
    rows, profile = np.ascontiguousarray(numbers()[::-1, :, ::-1]).tobytes(), icc(primaries=SWAPPED)
    header = struct.pack("<IiiHHIIiiII", 124, SIDE, SIDE, 1, 24, 0, len(rows), 0, 0, 0, 0) + bytes(16) + b"DEBM"
    header += bytes(48) + struct.pack("<4I", 4, 124 + len(rows), len(profile), 0)
    data = b"BM" + struct.pack("<IHHI", 138 + len(rows) + len(profile), 0, 0, 138) + header + rows + profile
    assert near(shown(data), numbers()[..., [2, 0, 1]])


def test_the_code_points_of_an_avif_are_heeded_where_it_has_no_profile() -> None:
    def avif(code_points: bytes, **options: bytes) -> bytes:
        data = encode(Image.fromarray(numbers()), "AVIF", quality=100, subsampling="4:4:4", **options)
        assert bool(options) or data.count(b"nclx\0\1\0\x0d") == 1
        return data.replace(b"nclx\0\1\0\x0d", b"nclx" + code_points)

    for code_points in (b"\0\1\0\x0d", b"\0\1\0\1", b"\0\2\0\2"):  # sRGB, television, unspecified
        assert near(shown(avif(code_points)), numbers(), 8)
    assert near(shown(avif(b"\0\x0c\0\x0d")), from_p3(numbers()), 8)
    assert near(shown(avif(b"\0\x0c\0\1")), from_p3(numbers()), 8)
    with_profile = avif(b"\0\x0c\0\x0d", icc_profile=icc(primaries=SWAPPED))
    assert near(shown(with_profile), numbers()[..., [2, 0, 1]], 8)


def gama(value: float) -> bytes:
    return png_chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def chrm(primaries: tuple[float, ...]) -> bytes:
    return png_chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in primaries)))


def cicp(primaries: int, transfer: int) -> bytes:
    return png_chunk(b"cICP", bytes([primaries, transfer, 0, 1]))


def iccp(profile: bytes) -> bytes:
    return png_chunk(b"iCCP", b"name\0\0" + zlib.compress(profile))


SRGB_CHUNK = png_chunk(b"sRGB", b"\0")


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        (gama(1.0), "light"),
        (gama(0.45455), "same"),
        (gama(0.45455) + chrm(SRGB), "same"),
        (gama(0.45455) + chrm(SWAPPED), "swapped"),
        (gama(0.0), "same"),
        (chrm(SWAPPED), "same"),
        (gama(1.0) + chrm((0.0,) * 8), "same"),
        (gama(1.0) + png_chunk(b"cHRM", bytes(33)), "light"),
        (cicp(1, 13), "same"),
        (cicp(1, 8), "light"),
        (cicp(12, 13), "p3"),
        (cicp(2, 2) + gama(1.0), "light"),
        # What goes before what.
        (gama(1.0) + gama(0.45455), "light"),
        (SRGB_CHUNK + gama(1.0), "same"),
        (iccp(icc(primaries=SWAPPED)) + gama(1.0), "swapped"),
        (iccp(b"no profile" * 20) + gama(1.0), "light"),
        (iccp(grey_icc(5.0)) + gama(1.0), "same"),
        (iccp(icc(primaries=SWAPPED)) + cicp(12, 13), "p3"),
    ],
)
def test_what_a_png_says_of_its_colours_counts(chunks: bytes, expected: str) -> None:
    given = numbers()
    pixels = {
        "same": given,
        "light": to_levels(given / 255),
        "swapped": given[..., [2, 0, 1]],
        "p3": from_p3(given),
    }
    assert near(shown(png(given, 2, chunks=chunks)), pixels[expected])


def test_what_a_png_says_behind_its_pixels_does_not_count() -> None:
    data = png(numbers(), 2)
    assert np.array_equal(shown(data[:-12] + gama(0.02) + data[-12:]), numbers())


def test_of_16_bit_colours_those_alone_are_transparent_that_are_equal_in_all_bits() -> None:
    pixels = np.full((SIDE, SIDE, 3), 0x1212, np.uint16)
    pixels[4:12, 4:12] += 5
    for interlaced in (False, True):
        data = png(pixels, 2, 16, interlaced=interlaced, chunks=png_chunk(b"tRNS", b"\x12" * 6))
        on_white = shown(data)
        assert on_white[:3].min() == 255
        assert set(on_white[6:10, 6:10].ravel()) == {0x12}
        assert shown(data, "black")[:3].max() == 0
        assert decode(data, [], LIMITS).facts.mode == "RGB"
