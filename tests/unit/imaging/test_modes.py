"""Every format and mode comes out as the RGB pixels that its file shows."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.images import Array, encode, good_images, png, png_chunk, scene, with_orientation
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError
from vlmflow.imaging import PixelRequest, decode, inspect

LIMITS = ImageLimits()
SIDE = 8


def squash(data: bytes, size: int = SIDE) -> Array:
    """Of a square image of that size, the very pixels."""
    request = PixelRequest(size, "bicubic", ("squash",))
    ((view, pixels),) = decode(data, [request], LIMITS).pixels[request.key]
    assert view == "squash"
    assert pixels.dtype == np.uint8
    assert pixels.shape == (size, size, 3)
    return pixels


def rgb() -> Array:
    return np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def grey() -> Array:
    return np.random.default_rng(2).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def as_rgb(values: Array) -> Array:
    return np.repeat(values[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_keep_every_pixel(format: str, options: dict[str, object]) -> None:
    assert np.array_equal(squash(encode(Image.fromarray(rgb()), format, **options)), rgb())


def test_an_interlaced_png_is_the_same_picture() -> None:
    assert np.array_equal(squash(png(rgb(), 2, interlaced=True)), rgb())


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_becomes_three_equal_channels(format: str) -> None:
    assert np.array_equal(squash(encode(Image.fromarray(grey()), format)), as_rgb(grey()))


def test_a_palette_is_looked_up() -> None:
    picture = Image.fromarray(rgb()).quantize(64)
    assert np.array_equal(squash(encode(picture, "PNG")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(
    "damaged", [b"text\0\5no method", b"text\0\0no stream", b"text\0\0" + zlib.compress(bytes(5_000_000))]
)
def test_texts_behind_the_pixels_of_a_png_do_not_cost_the_image(damaged: bytes) -> None:
    deep = np.full((SIDE, SIDE, 3), 0x1212, np.uint16)
    for whole, expected in (
        (png(rgb(), 2), rgb()),
        (png(deep, 2, 16, chunks=png_chunk(b"tRNS", bytes(6))), deep // 257),  # read twice
    ):
        assert np.array_equal(squash(whole[:-12] + png_chunk(b"zTXt", damaged) + whole[-12:]), expected)


@pytest.mark.parametrize(
    ("kind", "is_whole"),
    [
        (b"tRNS", False),
        *((kind, is_whole) for kind in (b"tEXt", b"gAMA", b"iCCP", b"pHYs") for is_whole in (False, True)),
    ],
)
def test_damage_to_what_a_png_says_beside_its_pixels_does_not_cost_the_image(kind: bytes, is_whole: bool) -> None:
    damaged = png_chunk(kind, b"") if is_whole else png_chunk(kind, bytes(6))[:-4] + b"sums"
    linear = png_chunk(b"gAMA", (100_000).to_bytes(4, "big"))
    assert np.array_equal(squash(png(rgb(), 2, chunks=damaged)), rgb())
    if kind != b"gAMA":
        other = squash(png(rgb(), 2, chunks=damaged + linear))
        assert np.array_equal(other, squash(png(rgb(), 2, chunks=linear)))
        assert not np.array_equal(other, rgb())


@pytest.mark.parametrize("greatest", [3, 4])
def test_a_colour_that_a_png_has_no_palette_for_is_refused(greatest: int) -> None:
    """Decoders take it for black, Chromium for the last one: models would see plain black where people see more."""
    indices = np.zeros((SIDE, SIDE), np.uint8)
    indices[2:6, 2:6] = greatest
    data = png(indices, 3, chunks=png_chunk(b"PLTE", bytes(9) + b"\xff" * 3))
    if greatest == 3:
        assert squash(data)[3, 3].tolist() == [255] * 3
        return
    with pytest.raises(ImageError, match="the png file is damaged"):
        squash(data)


def test_bilevel_is_black_and_white() -> None:
    bits = grey() > 127
    assert np.array_equal(squash(encode(Image.fromarray(bits), "PNG")), as_rgb(np.where(bits, 255, 0)))


def test_alpha_is_shown_on_white() -> None:
    alpha = grey()
    rgba = np.concatenate([rgb(), alpha[..., None]], axis=-1)
    weight = alpha[..., None].astype(np.float64) / 255
    expected = rgb() * weight + 255 * (1 - weight)
    assert np.abs(squash(encode(Image.fromarray(rgba), "PNG")) - expected).max() <= 1
    assert np.abs(squash(encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)) - expected).max() <= 1


def test_grey_with_alpha_is_shown_on_white() -> None:
    alpha = np.where(grey() > 127, 255, 0).astype(np.uint8)
    data = png(np.stack([grey(), alpha], axis=-1), 4)
    assert np.array_equal(squash(data), as_rgb(np.where(alpha == 255, grey(), 255)))


def test_a_transparent_palette_entry_is_shown_on_white() -> None:
    indices = (grey() % 4).astype(np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    colors = np.array([[255, 255, 255], [40, 50, 60], [70, 80, 90], [100, 110, 120]])
    assert np.array_equal(squash(encode(picture, "PNG", transparency=0)), colors[indices])
    assert np.array_equal(squash(encode(picture, "GIF", transparency=0)), colors[indices])


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_a_transparent_grey_value_is_shown_on_white(bit_depth: int) -> None:
    scale = 257 if bit_depth == 16 else 1
    values = np.where(grey() > 200, 7, 50).astype(np.uint16)
    transparency = png_chunk(b"tRNS", (7 * scale).to_bytes(2, "big"))
    data = png(values * scale, 0, bit_depth, chunks=transparency)
    assert np.array_equal(squash(data), as_rgb(np.where(values == 7, 255, 50)))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8(format: str) -> None:
    wide = np.random.default_rng(3).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    expected = np.rint(wide / 257).astype(np.uint8)
    assert np.array_equal(squash(encode(Image.fromarray(wide), format)), as_rgb(expected))


def test_big_endian_16_bit_grey_is_scaled_to_8() -> None:
    wide = np.random.default_rng(3).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    data = encode(Image.frombytes("I;16B", (SIDE, SIDE), wide.astype(">u2").tobytes()), "TIFF")
    assert inspect(data, LIMITS).mode == "I;16B"
    assert np.array_equal(squash(data), as_rgb(np.rint(wide / 257).astype(np.uint8)))


def test_16_bit_colour_is_scaled_to_8() -> None:
    assert np.array_equal(squash(png(rgb().astype(np.uint16) * 257, 2, 16)), rgb())


def test_floating_point_grey_within_0_and_1_is_scaled() -> None:
    values = np.random.default_rng(4).random((SIDE, SIDE), dtype=np.float32)
    assert np.array_equal(squash(encode(Image.fromarray(values), "TIFF")), as_rgb(np.rint(values * 255)))


def test_floating_point_grey_beyond_1_is_stretched_from_least_to_greatest() -> None:
    values = np.linspace(-300, 5000, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    pixels = squash(encode(Image.fromarray(values), "TIFF"))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.array_equal(pixels, as_rgb(np.rint((values.astype(float) + 300) / 5300 * 255)))


def test_floating_point_grey_without_a_finite_value_is_black() -> None:
    values = np.full((SIDE, SIDE), np.nan, dtype=np.float32)
    assert squash(encode(Image.fromarray(values), "TIFF")).max() == 0


def test_integer_grey_of_one_value_beyond_16_bits_does_not_divide_by_zero() -> None:
    values = np.full((SIDE, SIDE), 100_000, dtype=np.int32)
    assert squash(encode(Image.fromarray(values), "TIFF")).max() == 0


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_shows_the_colours_of_its_inks(format: str) -> None:
    inks = np.zeros((SIDE, SIDE, 4), dtype=np.uint8)
    inks[..., 0] = 255  # cyan alone
    pixels = squash(encode(Image.fromarray(inks, "CMYK"), format))
    assert np.abs(pixels.astype(int) - np.array([0, 255, 255])).max() <= 3


def test_lab_shows_the_colours_that_it_names() -> None:
    neutral = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)  # half the lightness, no colour: a and b are offset by 128
    neutral[..., 1:] = 0
    pixels = squash(encode(Image.frombytes("LAB", (SIDE, SIDE), neutral.tobytes()), "TIFF"))
    assert np.ptp(pixels) <= 3
    assert abs(int(pixels.mean()) - 119) <= 3  # L* of 50 is 119 in sRGB


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_of_a_camera_is_applied(orientation: int, format: str) -> None:
    # The 2 x 2 quarters of the picture as displayed, large enough to survive lossy formats.
    quarters = np.array([[[250, 5, 5], [5, 250, 5]], [[5, 5, 250], [250, 250, 250]]], dtype=np.uint8)
    shown = Image.fromarray(np.kron(quarters, np.ones((24, 32, 1), dtype=np.uint8)))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = shown.transpose(undo[orientation]) if orientation in undo else shown
    options = {"lossless": True} if format == "WEBP" else {}
    data = with_orientation(stored, orientation, format, **options)
    facts = inspect(data, LIMITS)
    assert (facts.width, facts.height) == (64, 48)
    corners = squash(data, 32)[4::24, 4::24]
    assert np.abs(corners.astype(int) - quarters).max() <= 24


def test_a_png_that_tells_its_orientation_after_the_pixels_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (20, 10)), "PNG")
    data = data[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    facts = inspect(data, LIMITS)
    assert (facts.width, facts.height) == (10, 20)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def exif_of(kind: int, value: bytes) -> bytes:
    return b"II*\0\x08\0\0\0\x01\0\x12\1" + struct.pack("<HI", kind, 1) + value.ljust(4, b"\0") + bytes(4)


def test_an_orientation_counts_where_browsers_look_for_it_and_nowhere_else() -> None:
    picture = Image.new("RGB", (20, 10))
    jpeg, png_file, short = encode(picture, "JPEG"), encode(picture, "PNG"), exif_of(3, b"\6\0")
    as_text = f"\nexif\n{len(short) + 6}\n{(b'Exif' + bytes(2) + short).hex()}\n".encode()

    def with_app1(content: bytes) -> bytes:
        return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]

    turned = [
        with_app1(b"Exif\0\0" + short),
        png_file[:33] + png_chunk(b"eXIf", short) + png_file[33:],
    ]
    left = [
        with_app1(b"http://ns.adobe.com/xap/1.0/\0" + XMP),
        with_app1(b"Exif\0\0" + exif_of(4, b"\6")),  # a number of four bytes
        with_app1(b"Exif\0\0" + exif_of(3, b"\11")),
        png_file[:33] + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + png_file[33:],
        png_file[:33] + png_chunk(b"tEXt", b"Raw profile type exif\0" + as_text) + png_file[33:],
        encode(picture, "WEBP", xmp=XMP),
    ]
    sizes = [
        [(facts.width, facts.height) for facts in (inspect(data, LIMITS) for data in some)] for some in (turned, left)
    ]
    assert sizes == [[(10, 20)] * 2, [(20, 10)] * 6]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_data_that_make_no_sense_do_not_cost_the_image() -> None:
    data = encode(scene(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    assert inspect(data, LIMITS).width == scene().width
    assert squash(data).shape == (SIDE, SIDE, 3)


# Files that show something else on purpose are left out.
@pytest.mark.parametrize(
    "name", sorted(good_images().keys() - {"alpha.png", "grey-alpha.png", "palette-transparent.png", "rotated.jpg"})
)
def test_every_good_file_shows_the_same_scene(name: str) -> None:
    pixels = squash(good_images()[name], 32).astype(float)
    expected = np.asarray(scene().resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    if np.array_equal(pixels[..., 0], pixels[..., 1]):  # grey
        pixels, expected = pixels.mean(-1), np.asarray(scene().convert("L").resize((32, 32))).astype(float)
    assert np.abs(pixels - expected).mean() < 12


def test_facts_are_those_of_the_file() -> None:
    files = good_images()
    expected = {
        "photo.jpg": ("jpeg", "RGB", 96, 64, 1),
        "cmyk.jpg": ("jpeg", "CMYK", 96, 64, 1),
        "grey.jpg": ("jpeg", "L", 96, 64, 1),
        "rotated.jpg": ("jpeg", "RGB", 64, 96, 1),
        "palette.png": ("png", "P", 96, 64, 1),
        "grey16.png": ("png", "I;16", 96, 64, 1),
        "bilevel.png": ("png", "1", 96, 64, 1),
        "lossy.webp": ("webp", "RGB", 96, 64, 1),
        "animated.webp": ("webp", "RGB", 96, 64, 3),
        "animated.gif": ("gif", "P", 96, 64, 30),
        "photo.bmp": ("bmp", "RGB", 96, 64, 1),
        "pages.tif": ("tiff", "RGB", 96, 64, 3),
        "photo.avif": ("avif", "RGB", 96, 64, 1),
        "photo.heic": ("heic", "RGB", 96, 64, 1),
        "phone.heic": ("heic", "RGB", 96, 64, 1),
    }
    for name, facts in expected.items():
        found = inspect(files[name], LIMITS)
        assert (found.format, found.mode, found.width, found.height, found.num_frames) == facts, name
        assert found.content_hash == hashlib.sha256(files[name]).hexdigest()


def test_inspect_and_decode_agree() -> None:
    for name, data in good_images().items():
        facts = decode(data, [], LIMITS).facts
        assert facts.phash is not None
        assert replace(facts, phash=None) == inspect(data, LIMITS), name


def test_a_chunk_of_transparency_that_browsers_pass_over_hides_nothing_and_does_not_stop_the_image() -> None:
    pixels, key = np.full((8, 8, 3), (10, 20, 30), np.uint8), b"\0\x0a\0\x14\0\x1e"
    clear, other = png_chunk(b"tRNS", key), png_chunk(b"tRNS", bytes(6))
    shown = {
        "clear": png(pixels, 2, chunks=clear),
        "clear, then another": png(pixels, 2, chunks=clear + other),
        "clear behind a short one": png(pixels, 2, chunks=png_chunk(b"tRNS", key[:5]) + clear),
    }
    hidden = {
        "short": png(pixels, 2, chunks=png_chunk(b"tRNS", key[:5])),
        "second": png(pixels, 2, chunks=other + clear),
        "behind the pixels": png(pixels, 2)[:-12] + clear + png(pixels, 2)[-12:],
        "short animation": png(pixels, 2, chunks=png_chunk(b"acTL", bytes(4))),
    }
    for files, expected in ((shown, 255), (hidden, 10)):
        for name, data in files.items():
            assert squash(data, 4)[0, 0, 0] == expected, name
