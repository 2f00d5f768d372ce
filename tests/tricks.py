"""Files made by hand to mislead a decoder: lying headers, bombs, loops, polyglots, broken metadata, wrong names."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from tests.images import bad_images, encode, good_images, png_chunk, scene
from tests.strangers import strangers
from tests.trick import (
    CORRUPT,
    DECODES,
    PNG_MAGIC,
    TOO_MANY_PIXELS,
    TRUNCATED,
    Expected,
    Trick,
    patched,
)
from tests.tricks_of_heic import heics
from tests.tricks_of_tiff import directory, tiffs

IEND = png_chunk(b"IEND", b"")


def tricks() -> dict[str, Trick]:
    """Files by name, each with what it may end in: classes of errors, or ``None`` for an image."""
    found: dict[str, Trick] = {name: (data, (error_class,)) for name, (data, error_class) in bad_images().items()}
    for part in (_png, _jpeg, _gif, _webp, _bmp, tiffs, _avif, heics, _exif, strangers):
        for name, trick in part().items():
            assert name not in found, name
            found[name] = trick
    return found


def _png_header(width: int, height: int, depth: int = 8, color: int = 0, interlace: int = 0) -> bytes:
    return PNG_MAGIC + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))


def _png_file(header: bytes, *chunks: bytes, rows: bytes = b"\0" * 9 * 8) -> bytes:
    return header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows, 9)) + IEND


def _png() -> dict[str, Trick]:
    good, small = good_images()["photo.png"], _png_header(8, 8)
    idat = good.index(b"IDAT")
    megabyte = zlib.compress(bytes(1 << 20), 9)
    bomb, many = zlib.compress(bytes(64 << 20), 9), 200_000
    control = struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0)
    frame = struct.pack(">IIIIIHHBB", 1, 8, 8, 0, 0, 1, 10, 0, 0)
    data = zlib.compress(b"\0" * 72)
    return {
        "zeros-30000.png": (_png_file(_png_header(30_000, 30_000), rows=bytes(30_001 * 100)), (TOO_MANY_PIXELS,)),
        "widest.png": (_png_file(_png_header(2**31 - 1, 1)), (TOO_MANY_PIXELS,)),
        "tallest.png": (_png_file(_png_header(1, 2**31 - 1)), (TOO_MANY_PIXELS,)),
        "negative-size.png": (_png_file(_png_header(2**32 - 1, 2**32 - 1)), (TOO_MANY_PIXELS,)),
        "two-headers.png": (_png_file(small + _png_header(60_000, 60_000)[8:]), (TOO_MANY_PIXELS, CORRUPT)),
        "header-cut.png": (PNG_MAGIC + png_chunk(b"IHDR", b"\0\0\0\1"), (CORRUPT, TRUNCATED)),
        "header-length.png": (patched(good, 8, b"\xff" * 4), (CORRUPT, TRUNCATED)),
        "header-length-0.png": (patched(good, 8, bytes(4)), (CORRUPT, TRUNCATED)),
        "no-header.png": (PNG_MAGIC + good[33:], (CORRUPT, TRUNCATED)),
        "no-data.png": (small + IEND, (CORRUPT, TRUNCATED)),
        "no-end.png": (good[:-12], (DECODES, TRUNCATED)),
        "data-length.png": (patched(good, idat - 4, b"\x7f\xff\xff\xff"), (DECODES, CORRUPT, TRUNCATED)),
        "data-length-1.png": (patched(good, idat - 4, b"\0\0\0\1"), (CORRUPT,)),
        "header-crc.png": (patched(good, 29, b"\0\0\0\0"), (CORRUPT,)),
        "depth-3.png": (_png_file(_png_header(8, 8, depth=3)), (CORRUPT,)),
        "color-7.png": (_png_file(_png_header(8, 8, color=7)), (CORRUPT,)),
        "interlace-9.png": (_png_file(_png_header(8, 8, interlace=9)), (DECODES, CORRUPT, TRUNCATED)),
        "no-palette.png": (_png_file(_png_header(8, 8, color=3)), (DECODES, CORRUPT)),
        "too-much-data.png": (_png_file(small, rows=bytes(64 << 20)), (DECODES,)),
        "too-little-data.png": (_png_file(_png_header(4_000, 4_000)), (CORRUPT, TRUNCATED)),
        "ztxt-bomb.png": (_png_file(small, png_chunk(b"zTXt", b"a\0\0" + bomb)), (DECODES, CORRUPT)),
        "itxt-bomb.png": (_png_file(small, png_chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)), (DECODES, CORRUPT)),
        "icc-bomb.png": (_png_file(small, png_chunk(b"iCCP", b"a\0\0" + bomb)), (DECODES, CORRUPT)),
        "many-ztxt.png": (_png_file(small, png_chunk(b"zTXt", b"a\0\0" + megabyte) * 200), (DECODES, CORRUPT)),
        "many-chunks.png": (_png_file(small, png_chunk(b"prVt", b"") * many), (DECODES, CORRUPT)),
        "many-data-chunks.png": (small + png_chunk(b"IDAT", b"") * many + IEND, (CORRUPT, TRUNCATED)),
        "many-chunks-after.png": (_png_file(small)[:-12] + png_chunk(b"prVt", b"") * many + IEND, (DECODES, CORRUPT)),
        "frames-2e31.png": (_png_file(small, png_chunk(b"acTL", struct.pack(">II", 2**31, 0))), (DECODES,)),
        "endless-loop.png": (
            _png_file(small, png_chunk(b"acTL", struct.pack(">II", 5_000, 0)), png_chunk(b"fcTL", control))[:-12]
            + (png_chunk(b"fcTL", frame) + png_chunk(b"fdAT", b"\0\0\0\2" + data)) * 4_999
            + IEND,
            (DECODES,),
        ),
        "frame-outside.png": (
            _png_file(
                small,
                png_chunk(b"acTL", struct.pack(">II", 2, 0)),
                png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 60_000, 60_000, 9, 9, 1, 10, 0, 0)),
            ),
            (DECODES, CORRUPT),
        ),
        "profile-exif.png": (
            _png_file(small, png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\nzz"))),
            (DECODES,),
        ),
    }


def jpeg_segment(marker: int, content: bytes) -> bytes:
    """One segment of a JPEG file, its length of two bytes included."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _jpeg_with(segments: bytes) -> bytes:
    return b"\xff\xd8" + segments + encode(scene(), "JPEG")[2:]


def _jpeg() -> dict[str, Trick]:
    good, progressive = good_images()["photo.jpg"], good_images()["progressive.jpg"]
    sof, sos, table = good.index(b"\xff\xc0"), good.index(b"\xff\xda"), good.index(b"\xff\xdb")
    last_scan = progressive.rindex(b"\xff\xda")
    scans = progressive[last_scan:-2]
    icc = [jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 255]) + bytes(60_000)) for n in range(1, 255)]
    damaged: Expected = (CORRUPT, TRUNCATED)
    return {
        "largest.jpg": (patched(good, sof + 5, b"\xff" * 4), (TOO_MANY_PIXELS,)),
        "no-size.jpg": (patched(good, sof + 5, bytes(4)), (CORRUPT,)),
        "no-height.jpg": (patched(good, sof + 5, bytes(2)), (CORRUPT,)),
        "taller.jpg": (patched(good, sof + 5, b"\x08\0"), (TRUNCATED, CORRUPT, DECODES)),
        "12-bit.jpg": (patched(good, sof + 4, b"\x0c"), (CORRUPT,)),
        "no-components.jpg": (patched(good, sof + 9, b"\0"), (CORRUPT,)),
        "two-components.jpg": (patched(good, sof + 9, b"\2"), (CORRUPT,)),
        "255-components.jpg": (patched(good, sof + 9, b"\xff"), (CORRUPT,)),
        "sampling-0.jpg": (patched(good, sof + 11, b"\0"), (CORRUPT,)),
        "sampling-15.jpg": (patched(good, sof + 11, b"\xff"), (CORRUPT,)),
        "lossless.jpg": (patched(good, sof + 1, b"\xc3"), (CORRUPT,)),
        "arithmetic.jpg": (patched(good, sof + 1, b"\xc9"), (CORRUPT, DECODES)),
        "hierarchical.jpg": (patched(good, sof + 1, b"\xc5"), (CORRUPT,)),
        "two-frames.jpg": (good[:sos] + jpeg_segment(0xC0, good[sof + 4 : sof + 19]) + good[sos:], (CORRUPT,)),
        "frame-in-scan.jpg": (
            good[:-2] + jpeg_segment(0xC0, b"\x08\xff\xff\xff\xff\3") + good[-2:],
            (DECODES, CORRUPT),
        ),
        "no-tables.jpg": (good[:table] + good[sof:], (CORRUPT,)),
        "no-frame.jpg": (good[:sof] + good[sos:], (CORRUPT,)),
        "no-scan.jpg": (good[:sos] + b"\xff\xd9", (CORRUPT, DECODES)),
        "segment-0.jpg": (patched(good, 4, b"\0\0"), (DECODES, *damaged)),
        "segment-1.jpg": (patched(good, 4, b"\0\1"), (DECODES, *damaged)),
        "segment-long.jpg": (patched(good, 4, b"\xff\xff"), damaged),
        "table-long.jpg": (patched(good, table + 2, b"\xff\xff"), damaged),
        "fill-bytes.jpg": (b"\xff\xd8" + b"\xff" * 500_000 + good[2:], (DECODES, CORRUPT)),
        "junk-before-frame.jpg": (b"\xff\xd8\xff\0" + bytes(500_000) + good[2:], (DECODES, CORRUPT)),
        "many-segments.jpg": (_jpeg_with(jpeg_segment(0xE5, b"") * 250_000), (DECODES, CORRUPT)),
        "many-scans.jpg": (progressive[:-2] + scans * 5_000 + b"\xff\xd9", (CORRUPT,)),
        "many-restarts.jpg": (good[:-2] + b"\xff\xd0" * 100_000 + b"\xff\xd9", (DECODES, CORRUPT)),
        "icc-14-megabytes.jpg": (_jpeg_with(b"".join(icc)), (DECODES,)),
        "icc-pieces-missing.jpg": (_jpeg_with(icc[3] + icc[3]), (DECODES,)),
        "icc-no-number.jpg": (_jpeg_with(jpeg_segment(0xE2, b"ICC_PROFILE\0")), (DECODES, CORRUPT)),
        "short-segments.jpg": (
            _jpeg_with(b"".join(jpeg_segment(m, s) for m, s in ((0xE0, b"JFIF"), (0xEE, b"Adobe"), (0xED, b"8BIM")))),
            (DECODES, CORRUPT),
        ),
        "photoshop.jpg": (_jpeg_with(jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\xff")), (DECODES, CORRUPT)),
        "second-image-behind.jpg": (good + good_images()["grey.jpg"], (DECODES,)),
        "index-of-pictures.jpg": (_jpeg_with(jpeg_segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")), (DECODES,)),
        "xmp.jpg": (_jpeg_with(jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<a>" * 20_000)), (DECODES,)),
    }


def _gif_file(width: int, height: int, body: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + body + b";"


def _gif_frame(left: int, top: int, width: int, height: int, code_bits: int = 2) -> bytes:
    return struct.pack("<BHHHHBB", 0x2C, left, top, width, height, 0, code_bits) + b"\2L\1\0"


def _gif() -> dict[str, Trick]:
    loop = b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0"
    one, pixels = _gif_frame(0, 0, 1, 1), _gif_frame(0, 0, 9, 9)
    good = good_images()["animated.gif"]
    return {
        "large-screen.gif": (_gif_file(65_535, 65_535, one), (TOO_MANY_PIXELS,)),
        "large-frame.gif": (_gif_file(1, 1, _gif_frame(0, 0, 65_535, 65_535)), (TOO_MANY_PIXELS,)),
        "frame-outside.gif": (_gif_file(1, 1, _gif_frame(65_535, 65_535, 65_535, 65_535)), (TOO_MANY_PIXELS,)),
        "later-frame-large.gif": (_gif_file(1, 1, one + _gif_frame(0, 0, 65_535, 65_535)), (DECODES,)),
        "no-screen.gif": (_gif_file(0, 0, b""), (CORRUPT,)),
        "no-frame.gif": (_gif_file(9, 9, loop), (CORRUPT, DECODES)),
        "frame-of-nothing.gif": (_gif_file(9, 9, _gif_frame(0, 0, 0, 0)), (CORRUPT, DECODES)),
        "code-0.gif": (_gif_file(9, 9, _gif_frame(0, 0, 9, 9, 0)), (DECODES, CORRUPT, TRUNCATED)),
        "code-13.gif": (_gif_file(9, 9, _gif_frame(0, 0, 9, 9, 13)), (CORRUPT,)),
        "code-255.gif": (_gif_file(9, 9, _gif_frame(0, 0, 9, 9, 255)), (CORRUPT,)),
        "few-pixels.gif": (_gif_file(9, 9, pixels), (DECODES, CORRUPT, TRUNCATED)),
        "endless-loop.gif": (_gif_file(1, 1, loop + one * 20_000), (DECODES,)),
        "no-end.gif": (_gif_file(1, 1, loop + one * 20_000)[:-1], (DECODES,)),
        "many-extensions.gif": (_gif_file(1, 1, b"!\xfe\1a\0" * 200_000 + one), (DECODES, CORRUPT)),
        "long-comment.gif": (_gif_file(1, 1, b"!\xfe" + (b"\xff" + b"a" * 255) * 20_000 + b"\0" + one), (DECODES,)),
        "only-extensions.gif": (_gif_file(9, 9, b"!\xf9\4\0\0\0\0\0" * 100_000), (CORRUPT, DECODES)),
        "block-long.gif": (patched(good, good.index(b",") + 11, b"\xff"), (CORRUPT, DECODES, TRUNCATED)),
        "no-colors.gif": (b"GIF87a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + one + b";", (DECODES,)),
    }


def _riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff_chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) & 1)


def _vp8x(flags: int, width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return _riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + size)


def _webp() -> dict[str, Trick]:
    lossy, lossless = good_images()["lossy.webp"], good_images()["lossless.webp"]
    image = encode(scene(0, 8, 8), "WEBP", lossless=True)[12:]
    frame = bytes(6) + (7).to_bytes(3, "little") * 2 + (40).to_bytes(3, "little") + b"\0" + image
    outside = b"\xff" * 6 + frame[6:]
    start = _vp8x(2, 8, 8) + _riff_chunk(b"ANIM", bytes(6))
    alpha = _riff_chunk(b"ALPH", b"\1" + bytes(9))
    broken: Expected = (CORRUPT, TRUNCATED)
    return {
        "riff-0.webp": (patched(lossy, 4, bytes(4)), broken),
        "riff-largest.webp": (patched(lossy, 4, b"\xff" * 4), broken),
        "riff-odd.webp": (patched(lossy, 4, struct.pack("<I", len(lossy) - 9)), (DECODES, *broken)),
        "chunk-largest.webp": (patched(lossy, 16, b"\xff" * 4), broken),
        "chunk-0.webp": (patched(lossy, 16, bytes(4)), broken),
        "largest-lossy.webp": (patched(lossy, 26, b"\xff\x3f" * 2), (TOO_MANY_PIXELS,)),
        "largest-lossless.webp": (patched(lossless, 21, b"\xff" * 4), (TOO_MANY_PIXELS,)),
        "largest-canvas.webp": (_riff(_vp8x(0, 2**24, 2**24), image), (TOO_MANY_PIXELS,)),
        "canvas-differs.webp": (_riff(_vp8x(0, 4_000, 4_000), image), broken),
        "image-exceeds-canvas.webp": (_riff(_vp8x(2, 8, 8), patched(lossy[12:], 14, b"\xff\x3f" * 2)), broken),
        "no-image.webp": (_riff(_vp8x(0, 8, 8)), broken),
        "no-frames.webp": (_riff(start), broken),
        "unknown-first.webp": (_riff(_riff_chunk(b"JUNK", bytes(20)), image), (*broken, DECODES)),
        "frame-outside.webp": (_riff(start, _riff_chunk(b"ANMF", outside)), broken),
        "frames-5000.webp": (_riff(start, _riff_chunk(b"ANMF", frame) * 5_000), (DECODES,)),
        "frame-in-frame.webp": (
            _riff(start, _riff_chunk(b"ANMF", frame[:16] + _riff_chunk(b"ANMF", frame))),
            (DECODES, *broken),
        ),
        "two-alphas.webp": (_riff(_vp8x(16, 96, 64), alpha * 500, lossy[12:]), (DECODES, *broken)),
        "many-chunks.webp": (_riff(_vp8x(0, 8, 8), image, _riff_chunk(b"JUNK", b"") * 200_000), (DECODES, *broken)),
        "exif-long.webp": (_riff(_vp8x(8, 8, 8), image, b"EXIF\xff\xff\xff\x7f"), (DECODES, *broken)),
    }


def _bmp_file(
    width: int, height: int, *, bits: int = 8, compression: int = 0, colors: int = 2, body: bytes = b""
) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, colors, 0)
    start = 14 + 40 + 4 * min(colors, 256)
    palette = bytes(4 * min(colors, 256))
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + palette + body


def _bmp() -> dict[str, Trick]:
    good = good_images()["photo.bmp"]
    return {
        "largest.bmp": (_bmp_file(2**31 - 1, 2**31 - 1), (TOO_MANY_PIXELS,)),
        "upside-down-largest.bmp": (_bmp_file(2**31 - 1, -(2**31)), (TOO_MANY_PIXELS,)),
        "negative-width.bmp": (_bmp_file(-8, 8, body=bytes(64)), (CORRUPT, TOO_MANY_PIXELS)),
        "no-size.bmp": (_bmp_file(0, 0), (CORRUPT,)),
        "no-body.bmp": (_bmp_file(4_000, 4_000), (TRUNCATED, CORRUPT)),
        "bits-3.bmp": (_bmp_file(8, 8, bits=3, body=bytes(64)), (CORRUPT,)),
        "bits-0.bmp": (_bmp_file(8, 8, bits=0, body=bytes(64)), (CORRUPT,)),
        "compression-99.bmp": (_bmp_file(8, 8, compression=99, body=bytes(64)), (CORRUPT,)),
        "jpeg-inside.bmp": (_bmp_file(8, 8, bits=0, compression=4, body=good_images()["photo.jpg"]), (CORRUPT,)),
        "colors-2e32.bmp": (_bmp_file(8, 8, colors=2**32 - 1, body=bytes(64)), (DECODES, CORRUPT, TRUNCATED)),
        "pixels-outside.bmp": (patched(good, 10, b"\xff" * 4), (TRUNCATED, CORRUPT)),
        "pixels-in-header.bmp": (patched(good, 10, bytes(4)), (DECODES, CORRUPT)),
        "file-size.bmp": (patched(good, 2, b"\xff" * 4), (DECODES,)),
        "header-size.bmp": (patched(good, 14, struct.pack("<I", 124)), (CORRUPT, DECODES, TRUNCATED)),
        "runs-beyond-row.bmp": (_bmp_file(8, 8, compression=1, body=b"\xff\1" * 200), (DECODES, CORRUPT, TRUNCATED)),
        "runs-of-nothing.bmp": (_bmp_file(800, 800, compression=1, body=b"\0\2\0\0" * 60_000), (CORRUPT, TRUNCATED)),
        "runs-of-rows.bmp": (_bmp_file(8_000, 2_000, compression=1, body=b"\0\2\0\xff" * 9), (DECODES,)),
        "runs-end-early.bmp": (_bmp_file(800, 800, compression=1, body=b"\0\1"), (CORRUPT, TRUNCATED, DECODES)),
    }


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _avif() -> dict[str, Trick]:
    good = good_images()["photo.avif"]
    flat = encode(Image.new("RGB", (2_048, 2_048), "gray"), "AVIF", speed=10)
    ftyp = good[: struct.unpack_from(">I", good, 0)[0]]
    ispe, iloc, meta = (good.index(kind) for kind in (b"ispe", b"iloc", b"meta"))
    flat_ispe = flat.index(b"ispe") + 8
    nested = b""
    for _ in range(5_000):
        nested = _box(b"meta", bytes(4) + nested)
    broken: Expected = (CORRUPT, TRUNCATED)
    return {
        "only-brand.avif": (ftyp, broken),
        "brand-and-zeros.avif": (ftyp + bytes(400), broken),
        "largest.avif": (patched(good, ispe + 8, b"\0\1\0\0" * 2), (TOO_MANY_PIXELS, CORRUPT)),
        "beyond-limit.avif": (patched(good, ispe + 8, b"\0\0\x3f\xff" * 2), (TOO_MANY_PIXELS, CORRUPT)),
        "no-size.avif": (patched(good, ispe + 8, bytes(8)), (CORRUPT,)),
        "smaller-than-coded.avif": (patched(flat, flat_ispe, struct.pack(">II", 16, 16)), (DECODES, CORRUPT)),
        "larger-than-coded.avif": (patched(good, ispe + 8, struct.pack(">II", 3_000, 3_000)), (DECODES, CORRUPT)),
        "meta-0.avif": (patched(good, meta - 4, bytes(4)), (DECODES, *broken)),
        "meta-1.avif": (patched(good, meta - 4, b"\0\0\0\1"), broken),
        "meta-largest.avif": (patched(good, meta - 4, b"\xff" * 4), broken),
        "items-outside.avif": (patched(good, iloc + 16, b"\xff" * 8), broken),
        "nested.avif": (ftyp + nested, broken),
        "nested-in-meta.avif": (ftyp + _box(b"meta", bytes(4) + nested), broken),
        "many-boxes.avif": (ftyp + _box(b"free", b"") * 200_000 + good[len(ftyp) :], (DECODES, *broken)),
        "two-metas.avif": (ftyp + good[len(ftyp) :] * 2, (DECODES, *broken)),
    }


def _exif_block(
    orientation: tuple[int, int, int] = (3, 1, 1), *more: tuple[int, int, int, int], rest: bytes = b""
) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + directory((0x0112, *orientation), *more) + rest


def _exif() -> dict[str, Trick]:
    """JPEGs, PNGs and WebPs whose EXIF data are broken: all of them have pixels that decode."""
    next_itself = b"Exif\0\0II*\0\x08\0\0\0" + directory((0x0112, 3, 1, 6), next_offset=8)
    exif_in_exif = b"".join(directory((34665, 4, 1, 8 + 18 * (n + 1))) for n in range(3_000))
    overlapping = [(40_000 + n, 7, 50_000, 8) for n in range(4_000)]
    blocks = {
        "orientation-0": _exif_block((3, 1, 0)),
        "orientation-9": _exif_block((3, 1, 9)),
        "orientation-65535": _exif_block((3, 1, 65_535)),
        "orientation-2e32": _exif_block((4, 1, 2**32 - 1)),
        "orientation-negative": _exif_block((9, 1, 2**32 - 1)),
        "orientation-text": _exif_block((2, 4, 0x36363636)),
        "orientation-rational": _exif_block((5, 1, 26), rest=bytes(8)),
        "orientation-many": _exif_block((3, 2**31, 8)),
        "orientation-float": _exif_block((11, 1, 0x7F800000)),
        "orientation-type-99": _exif_block((99, 1, 6)),
        "orientation-outside": _exif_block((3, 4, 2**32 - 1)),
        "next-is-itself": next_itself,
        "directory-outside": b"Exif\0\0II*\0\xff\xff\xff\xff",
        "directory-in-header": b"Exif\0\0II*\0\0\0\0\0",
        "entries-65535": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\3\0\1\0\0\0\6\0\0\0" * 99,
        "exif-in-exif": b"Exif\0\0II*\0\x08\0\0\0" + exif_in_exif,
        "directory-in-itself": _exif_block((3, 1, 1), (34665, 4, 1, 8), (34853, 4, 1, 8)),
        "overlapping": _exif_block((3, 1, 1), *overlapping),
        "cut": _exif_block()[:20],
        "only-mark": b"Exif\0\0",
        "rubbish": b"Exif\0\0" + bytes(range(256)) * 8,
        "no-order": b"Exif\0\0XX*\0\x08\0\0\0" + bytes(40),
    }
    webp = encode(scene(0, 8, 8), "WEBP", lossless=True)[12:]
    found = {}
    for name, block in blocks.items():
        found[f"exif-{name}.jpg"] = _jpeg_with(jpeg_segment(0xE1, block[:65_000]))
        found[f"exif-{name}.png"] = _png_file(_png_header(8, 8), png_chunk(b"eXIf", block[6:]))
        found[f"exif-{name}.webp"] = _riff(_vp8x(8, 8, 8), webp, _riff_chunk(b"EXIF", block))
    pieces = jpeg_segment(0xE1, _exif_block(rest=bytes(60_000))) * 160
    found["exif-10-megabytes.jpg"] = _jpeg_with(pieces)
    return {name: (data, (DECODES,)) for name, data in found.items()}
