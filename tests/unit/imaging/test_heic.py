"""HEICs: as phones and cameras write them, in the colours and the way up that people see them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.heif import SIDE, Item, as_heic, box, full_box, grid, heif, ispe, phone_photo, same, tile
from tests.images import Array, scene
from tests.unit.imaging.test_colours import P3, SWAPPED, from_p3, icc, near, numbers
from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import PixelRequest, decode
from vlmflow.imaging.decode import decoder_version
from vlmflow.imaging.heic import HeicFile
from vlmflow.imaging.opening import inspect, open_image
from vlmflow.imaging.pixels import VIEWS, to_rgb

LIMITS = ImageLimits()
REQUEST = PixelRequest(16, "bicubic", VIEWS)


def whole(data: bytes) -> Array:
    return np.asarray(to_rgb(open_image(data, LIMITS).image)).astype(int)


def views(data: bytes) -> dict[str, Array]:
    return {name: pixels.astype(int) for name, pixels in decode(data, [REQUEST], LIMITS).pixels[REQUEST.key]}


def error_of(data: bytes, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as raised:
        decode(data, [REQUEST], limits)
    return raised.value


def test_a_photo_of_a_phone_is_put_together_of_its_tiles_and_turned_once() -> None:
    picture = scene(3, 200, 160)
    data = phone_photo(picture)
    facts = decode(data, [REQUEST], LIMITS).facts
    assert (facts.format, facts.width, facts.height, facts.num_frames) == ("heic", 200, 160, 1)
    assert data.count(b"hvc1") >= 12
    assert np.abs(whole(data) - np.asarray(picture).astype(int)).mean() < 5


def test_transparency_is_shown_on_both_grounds() -> None:
    picture = Image.new("RGBA", (64, 64), (200, 40, 40, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 64, 32))
    for image in (picture, picture.convert("RGBa")):
        data = as_heic(image, quality=-1)
        assert inspect(data, LIMITS).mode == "RGBA"
        found = views(data)
        assert near(found["squash"][2:6], np.full((4, 16, 3), 255), 6)
        assert near(found["black"][2:6], np.zeros((4, 16, 3)), 6)
        assert near(found["squash"][11:14], np.broadcast_to((200, 40, 40), (3, 16, 3)), 12)


def test_cameras_store_more_than_8_bits() -> None:
    deep = Image.frombytes("I;16", (64, 64), np.tile(np.linspace(0, 65535, 64).astype("<u2"), 64).tobytes())
    data = as_heic(deep, quality=-1)
    assert inspect(data, LIMITS).mode == "I;16"
    assert near(whole(data)[0, :, 0], np.linspace(0, 255, 64), 2)


def test_colours_are_those_of_the_profile_or_of_the_code_points() -> None:
    picture = Image.fromarray(numbers()).resize((64, 64), Image.Resampling.BICUBIC)

    def coloured(primaries: int, transfer: int) -> bytes:
        names = {"color_primaries": primaries, "transfer_characteristics": transfer}
        return as_heic(picture, quality=-1, chroma=444, matrix_coefficients=6, **names)

    plain = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    for primaries, transfer in ((1, 13), (1, 1), (2, 2)):
        assert near(views(coloured(primaries, transfer))["squash"], plain, 8)
    for transfer in (13, 1):
        assert near(views(coloured(12, transfer))["squash"], from_p3(plain), 8)
    with_profile = as_heic(picture, quality=-1, chroma=444, icc_profile=icc(primaries=SWAPPED))
    assert near(views(with_profile)["squash"], plain[..., [2, 0, 1]], 8)
    p3 = as_heic(picture, quality=-1, chroma=444, icc_profile=icc(primaries=P3))
    assert near(views(p3)["squash"], from_p3(plain), 8)


def test_other_images_of_a_file_are_shown_like_frames() -> None:
    same_scene, other = scene(1, 128, 128), Image.new("RGB", (64, 96), (255, 0, 0))
    data = as_heic(same_scene, same_scene, other, same_scene)
    found = views(data)
    assert inspect(data, LIMITS).num_frames == 4
    frames = {name: pixels for name, pixels in found.items() if name.startswith("frame")}
    assert list(frames) == ["frame-1@0.000"]
    assert near(frames["frame-1@0.000"], np.broadcast_to((255, 0, 0), (16, 16, 3)), 8)


def test_the_main_image_comes_first_wherever_it_stands() -> None:
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    data = as_heic(red, blue, primary_index=1)
    assert views(data)["squash"][8, 8].argmax() == 2
    assert inspect(data, LIMITS).num_frames == 2


def test_no_other_image_takes_the_place_of_a_main_one_that_cannot_be_decoded() -> None:
    red, blue = (tile(Image.new("RGB", (SIDE, SIDE), colour)) for colour in ("red", "blue"))
    unknown = replace(blue, properties=(*blue.properties, full_box(b"rref", b"\1abcd")))
    for file in (heif([red, unknown], 2), heif([red, blue, grid(2, 1, [2], (2 * SIDE, SIDE))], 3)):
        assert error_of(file).error_class == RowErrorClass.CORRUPT


GAIN_MAP = full_box(b"auxC", b"urn:com:apple:photo:2020:aux:hdrgainmap\0")
NO_DECODER = ("av01", "avc1", "j2k1", "jpeg", "unci", "vvc1", "what")


@pytest.mark.parametrize(
    "unopened",
    [
        *(pytest.param(Item(kind.encode(), b"1234", (ispe(SIDE, SIDE),)), id=kind) for kind in NO_DECODER),
        pytest.param(Item(b"jpeg", b"1234"), id="of no size"),
        pytest.param(Item(b"hvc1", b"1234", (ispe(SIDE, SIDE),)), id="without configuration"),
        pytest.param(same(9, (SIDE, SIDE)), id="of an image that is not there"),
    ],
)
def test_images_that_the_decoder_does_not_open_are_said_not_to_have_been_looked_at(unopened: Item) -> None:
    red, blue = (tile(Image.new("RGB", (SIDE, SIDE), colour)) for colour in ("red", "blue"))
    found = decode(heif([red, unopened, blue]), [REQUEST], LIMITS)
    assert found.facts.num_frames == 3
    assert found.unseen == "frames after the first 2 of 3 cannot be decoded"
    assert [name for name, _ in found.pixels[REQUEST.key] if name.startswith("frame")] == ["frame-1@0.000"]


def test_what_is_no_picture_of_its_own_is_no_frame() -> None:
    photo, other = tile(scene(0, SIDE, SIDE)), Item(b"jpeg", b"1234", (ispe(SIDE, SIDE), GAIN_MAP))
    aside = [replace(other, belongs=(kind, 1)) for kind in (b"thmb", b"auxl")]
    texts = [Item(b"Exif", b"1234"), Item(b"mime", b"1234")]
    found = decode(heif([photo, *aside, *texts]), [REQUEST], LIMITS)
    assert (found.facts.num_frames, found.unseen) == (1, None)


def test_a_photo_with_a_gain_map_is_shown_without() -> None:
    """As a screen without HDR shows it; of another coding than the photo's the map made the photo unreadable."""
    photo, gains = tile(scene(0, SIDE, SIDE)), tile(Image.new("L", (SIDE, SIDE), 90))
    gains = replace(gains, properties=(*gains.properties, GAIN_MAP), belongs=(b"auxl", 1))
    bright = Item(b"tmap", b"1234", (ispe(SIDE, SIDE),), (1, 2))
    found = decode(heif([photo, gains, bright]), [REQUEST], LIMITS)
    assert (found.facts.num_frames, found.unseen) == (1, None)
    assert np.array_equal(views(heif([photo, gains, bright]))["squash"], views(heif([photo]))["squash"])


def test_images_are_decoded_again_and_not_kept() -> None:
    file = HeicFile(BytesIO(as_heic(*(scene(seed, 64, 64) for seed in range(3)))))
    shown = []
    for number in (0, 2, 1, 2, 0):
        file.seek(number)
        shown.append(file.convert("RGB").tobytes())
        assert file.tell() == number
    assert shown[0] == shown[4] != shown[1] == shown[3] != shown[2]
    assert sum(image is not None for image in file._images) < file.n_frames
    with pytest.raises(EOFError):
        file.seek(3)


def test_a_sequence_beside_the_image_is_said_not_to_have_been_looked_at() -> None:
    photo = tile(scene(0, SIDE, SIDE))
    with_track = decode(heif([photo], behind=box(b"moov", b"")), [REQUEST], LIMITS)
    assert with_track.unseen == "a sequence of further images was not looked at"
    assert decode(heif([photo]), [REQUEST], LIMITS).unseen is None
    error = error_of(heif([photo], brand=b"hevc")[:24] + box(b"moov", b""))
    assert error.error_class == RowErrorClass.UNSUPPORTED_FORMAT
    assert "a HEIC sequence without a still image is not decoded" in str(error)


def test_images_of_images_look_like_them() -> None:
    photo = scene(2, SIDE, SIDE)
    of_tiles = heif([tile(photo), grid(2, 1, [1, 1], (2 * SIDE, SIDE))], 2)
    assert np.array_equal(whole(of_tiles)[:, :SIDE], whole(heif([tile(photo)])))
    assert np.array_equal(whole(of_tiles)[:, SIDE:], whole(heif([tile(photo)])))
    assert np.array_equal(whole(heif([tile(photo), same(1, (SIDE, SIDE))], 2)), whole(heif([tile(photo)])))


def test_a_photo_without_its_last_tiles_is_truncated_and_not_shown_with_holes() -> None:
    data = phone_photo(scene(3, 200, 160))
    for kept in (0.5, 0.9, 0.999):
        error = error_of(data[: int(kept * len(data))])
        assert error.error_class == RowErrorClass.TRUNCATED
        assert str(error).startswith("the heic file ends before its image does")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photo_with_a_damaged_tile_is_not_shown_with_a_hole(mode: str) -> None:
    photo = tile(scene(0, SIDE, SIDE).convert(mode))
    for content in (b"", b"\xff" * 20, photo.content[: len(photo.content) // 2]):
        damaged = replace(photo, content=content)
        of_tiles = [photo, photo, photo, damaged, grid(2, 2, [1, 2, 3, 4], (2 * SIDE, 2 * SIDE))]
        turned = replace(of_tiles[-1], properties=(*of_tiles[-1].properties, box(b"irot", b"\1")))
        for file in (heif(of_tiles, 5), heif([*of_tiles[:-1], turned], 5)):
            assert error_of(file).error_class == RowErrorClass.CORRUPT


def test_a_black_tile_is_no_damaged_one() -> None:
    photo, black = tile(scene(0, SIDE, SIDE)), tile(Image.new("RGB", (SIDE, SIDE)))
    found = whole(heif([photo, black, grid(2, 1, [1, 2], (2 * SIDE, SIDE))], 3))
    assert found[:, SIDE:].max() <= 2
    assert np.array_equal(found[:, :SIDE], whole(heif([photo])))


def test_tiles_that_may_be_left_out_are_not_passed_over() -> None:
    """As the decoder does it with tiles of a kind that it does not know, behind a first one that it knows."""
    photo = tile(scene(0, SIDE, SIDE))
    configuration = bytearray(photo.properties[0])
    configuration[configuration.index(b"hvcC") + 5] = 0x1F  # its profile
    other = replace(photo, properties=(bytes(configuration), photo.properties[1]))
    error = error_of(heif([photo, other, grid(2, 1, [1, 2], (2 * SIDE, SIDE))], 3))
    assert error.error_class == RowErrorClass.UNSUPPORTED_FORMAT
    assert "a HEIC image of tiles that are coded in different ways is not decoded" in str(error)


def test_tiles_are_counted_as_often_as_they_are_shown() -> None:
    photo, limits = tile(scene(0, SIDE, SIDE)), ImageLimits(max_pixels=1_000_000)
    few, many = (heif([photo, grid(side, side, [1] * side**2, (SIDE, SIDE))], 2) for side in (5, 6))
    assert decode(few, [REQUEST], limits).facts.width == SIDE
    error = error_of(many, limits)
    assert error.error_class == RowErrorClass.TOO_MANY_PIXELS
    assert "tiles of 2,359,296 pixels together exceed twice the limits.max_pixels of 1,000,000" in str(error)


def test_tiles_that_are_hardly_shown_are_not_decoded() -> None:
    large = tile(scene(0, 512, 512))
    few, many = (heif([large, grid(side, side, [1] * side**2, (SIDE, SIDE))], 2) for side in (2, 3))
    assert decode(few, [REQUEST], LIMITS).facts.width == SIDE
    error = error_of(many)
    assert error.error_class == RowErrorClass.TOO_MANY_PIXELS
    assert "tiles hold 2,351,104 pixels more than twice those of the image that they make" in str(error)


def test_images_of_other_kinds_are_named() -> None:
    for kind, named in ((b"av01", "av01"), (b"j2k1", "j2k1"), (b"\0\n\xff!", "000aff21")):
        error = error_of(heif([tile(scene(0, SIDE, SIDE), kind=kind)]))
        assert error.error_class == RowErrorClass.UNSUPPORTED_FORMAT
        assert f"a HEIF image of the kind {named} is not decoded" in str(error)


def test_several_are_decoded_at_once() -> None:
    files = [as_heic(scene(seed, 128, 96)) for seed in range(8)]
    alone = [whole(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone * 3, pool.map(whole, files * 3), strict=True):
            assert np.array_equal(expected, found)


def test_with_the_package_it_is_among_what_is_decoded() -> None:
    assert "decoded are avif, bmp, gif, heic, jpeg" in str(error_of(b"8BPS\0\x01" + bytes(60)))


def test_without_the_package_a_heic_is_said_to_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmflow.imaging.heif.find_spec", lambda name: None)
    error = error_of(as_heic(scene()))
    assert error.error_class == RowErrorClass.UNSUPPORTED_FORMAT
    assert "a HEIC image; it is decoded where vlmflow[heif] is installed" in str(error)
    assert "+heif" not in decoder_version()
    assert "heic" not in str(error_of(b"8BPS\0\x01" + bytes(60)))


def test_unreadable_images_are_due_again_once_an_extra_is_installed() -> None:
    told = "import sys; sys.modules[{!r}] = None; from vlmflow.imaging import DECODER_VERSION; print(DECODER_VERSION)"
    versions = {
        missing: subprocess.run(
            [sys.executable, "-c", told.format(missing)], check=True, capture_output=True, text=True
        ).stdout.strip()
        for missing in ("pillow_heif", "av", "nothing")
    }
    assert versions["nothing"].endswith("+heif+video")
    assert versions["pillow_heif"] == versions["nothing"].replace("+heif", "")
    assert versions["av"] == versions["nothing"].replace("+video", "")
