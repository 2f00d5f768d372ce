"""HEICs made by hand to mislead a decoder: boxes, sizes and tiles that lie."""

from __future__ import annotations

import struct
from dataclasses import replace

from PIL import Image

from tests.heif import SIDE, Item, as_heic, box, full_box, grid, heif, overlay, same, tile
from tests.images import good_images, scene
from tests.trick import CORRUPT, DECODES, TOO_MANY_PIXELS, TRUNCATED, UNSUPPORTED, Expected, Trick, patched

_ONE = (SIDE, SIDE)


def heics() -> dict[str, Trick]:
    good, whole = good_images()["photo.heic"], tile(scene(0, *_ONE))
    broken: Expected = (CORRUPT, TRUNCATED)
    flat = tile(Image.new("RGB", (2_048, 2_048), "gray"))
    coded_size = good.index(b"ispe") + 8
    location, meta, configuration = (good.index(kind) for kind in (b"iloc", b"meta", b"hvcC"))
    file_type = good[: struct.unpack_from(">I", good)[0]]
    lying = full_box(b"meta", box(b"iprp", full_box(b"ipma", b"\xff" * 4)))
    entry = struct.pack(">HB", 1, 255) + b"\1" * 255
    often = full_box(b"meta", box(b"iprp", full_box(b"ipma", struct.pack(">I", 30_000) + entry * 30_000)))
    nested = b""
    for _ in range(5_000):
        nested = box(b"meta", bytes(4) + nested)
    return {
        "only-brand.heic": (file_type, broken),
        "brand-and-zeros.heic": (file_type + bytes(400), broken),
        "largest.heic": (patched(good, coded_size, b"\xff" * 8), (TOO_MANY_PIXELS,)),
        "beyond-limit.heic": (patched(good, coded_size, b"\0\0\x3f\xff" * 2), (TOO_MANY_PIXELS,)),
        "no-size.heic": (patched(good, coded_size, bytes(8)), (CORRUPT,)),
        "smaller-than-coded.heic": (heif([tile(flat_image(), size=(16, 16))]), (CORRUPT, DECODES)),
        "larger-than-coded.heic": (patched(good, coded_size, struct.pack(">II", 3_000, 3_000)), (CORRUPT, DECODES)),
        "meta-0.heic": (patched(good, meta - 4, bytes(4)), (DECODES, *broken)),
        "meta-1.heic": (patched(good, meta - 4, b"\0\0\0\1"), broken),
        "meta-largest.heic": (patched(good, meta - 4, b"\xff" * 4), broken),
        "items-outside.heic": (patched(good, location + 12, b"\xff" * 8), (*broken, UNSUPPORTED)),
        "no-configuration.heic": (patched(good, configuration, b"free"), broken),
        "nested.heic": (file_type + nested, broken),
        "nested-in-meta.heic": (file_type + box(b"meta", bytes(4) + nested), broken),
        "many-boxes.heic": (file_type + box(b"free", b"") * 200_000 + good[len(file_type) :], (DECODES, *broken)),
        "two-metas.heic": (file_type + good[len(file_type) :] * 2, (DECODES, *broken)),
        "other-primary.heic": (heif([whole], 7), broken),
        "tiles-65535.heic": (heif([whole, grid(256, 256, [1] * 65_535, _ONE)], 2), (UNSUPPORTED,)),
        "tiles-40000.heic": (heif([whole, grid(200, 200, [1] * 40_000, _ONE)], 2), (UNSUPPORTED,)),
        "large-tiles.heic": (heif([flat, grid(9, 9, [1] * 81, _ONE)], 2), (TOO_MANY_PIXELS,)),
        "tiles-of-tiles.heic": (
            heif([whole, grid(16, 16, [1] * 256, (1_024, 1_024)), grid(16, 16, [2] * 256, _ONE)], 3),
            (TOO_MANY_PIXELS,),
        ),
        "tiles-unseen.heic": (heif([flat, grid(6, 6, [1] * 36, _ONE)], 2), (TOO_MANY_PIXELS,)),
        "overlay-called-coded.heic": (heif([whole, overlay([1], _ONE)], 2, other_kinds={2: b"hvc1"}), (CORRUPT,)),
        "size-not-told.heic": (
            heif([replace(flat, properties=flat.properties[:1]), same(1, (2_048, 2_048))], 2),
            (CORRUPT,),
        ),
        "told-often.heic": (heif([whole], behind=often), (UNSUPPORTED,)),
        "tile-of-itself.heic": (heif([grid(1, 1, [1], _ONE)]), (UNSUPPORTED, CORRUPT)),
        "tiles-in-a-circle.heic": (heif([grid(1, 1, [2], _ONE), grid(1, 1, [1], _ONE)]), (UNSUPPORTED, CORRUPT)),
        "chain.heic": (heif([whole, *(same(part, _ONE) for part in range(1, 200))], 200), (UNSUPPORTED, CORRUPT)),
        "tiles-missing.heic": (heif([whole, grid(2, 1, [1, 9], (128, 64))], 2), broken),
        "tiles-too-few.heic": (heif([whole, grid(4, 4, [1], (256, 256))], 2), broken),
        "grid-60000.heic": (heif([whole, grid(2, 2, [1] * 4, (60_000, 60_000))], 2), (TOO_MANY_PIXELS,)),
        "grid-of-nothing.heic": (heif([whole, Item(b"grid", b"", whole.properties, [1])], 2), broken),
        "grid-of-avif.heic": (heif([tile(scene(0, *_ONE), kind=b"av01"), grid(1, 1, [1], _ONE)], 2), (UNSUPPORTED,)),
        "overlay.heic": (heif([whole, overlay([1] * 200, _ONE)], 2), (UNSUPPORTED,)),
        "short-header.heic": (file_type + box(b"mini", bytes(40)), (UNSUPPORTED, *broken)),
        "sequence.heic": (file_type + box(b"moov", bytes(40)), (UNSUPPORTED,)),
        "images-300.heic": (heif([whole] * 300), (DECODES,)),
        "images-5000.heic": (heif([whole] * 5_000), (UNSUPPORTED,)),
        "sizes-outside.heic": (heif([whole], behind=lying), (UNSUPPORTED,)),
        "with-film.heic": (good + box(b"mpvd", b"\0\0\0\x18ftypisom" + bytes(400)), (DECODES,)),
        "with-profile.heic": (as_heic(scene(), icc_profile=b"\xff" * 4_000), (DECODES,)),
    }


def flat_image() -> Image.Image:
    return Image.new("RGB", (128, 128), "gray")
