"""Files of other kinds under an image's name, files that are two kinds at once, and next to nothing."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np

from tests.images import gif, good_images
from tests.trick import CORRUPT, DECODES, NOT_AN_IMAGE, PNG_MAGIC, TOO_MANY_PIXELS, TRUNCATED, UNSUPPORTED, Trick
from vlmflow.errors import RowErrorClass


def strangers() -> dict[str, Trick]:
    """Files of other kinds under an image's name, files that are two kinds at once, and next to nothing."""
    jpeg, png = good_images()["photo.jpg"], good_images()["photo.png"]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("hello.txt", "hello")
    pdf = b"%PDF-1.4\n1 0 obj\n<< /Length 9 >>\nstream\n"
    html = b"<!DOCTYPE html><html><head><title>503</title></head><body>Service Unavailable</body></html>"
    noise = np.random.default_rng(1).bytes(4_096)
    refused: dict[str, tuple[bytes, RowErrorClass]] = {
        "error-page.jpg": (html, NOT_AN_IMAGE),
        "answer.png": (b'{"error": {"code": 403, "message": "expired"}}', NOT_AN_IMAGE),
        "listing.gif": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', NOT_AN_IMAGE),
        "compressed.jpg": (gzip.compress(jpeg, mtime=0), NOT_AN_IMAGE),
        "archive.png": (archive.getvalue(), NOT_AN_IMAGE),
        "document.jpg": (pdf + b"endstream\nendobj\n%%EOF\n", NOT_AN_IMAGE),
        "pdf-then-jpeg.jpg": (pdf + jpeg + b"\nendstream\nendobj\n%%EOF\n", NOT_AN_IMAGE),
        "html-then-gif.gif": (html + gif(2), NOT_AN_IMAGE),
        "program.jpg": (b"\x7fELF\2\1\1\0" + bytes(200), NOT_AN_IMAGE),
        "sound.webp": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), NOT_AN_IMAGE),
        "film.avif": (b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(60), CORRUPT),
        "film.webp": (b"\x1a\x45\xdf\xa3" + bytes(80), CORRUPT),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", NOT_AN_IMAGE),
        "letters.png": ("﷽ \u202e\u0000🏳️‍🌈\ufffe ñandú".encode() * 20, NOT_AN_IMAGE),
        "utf-16.jpg": ("This is text, and no image.".encode("utf-16"), NOT_AN_IMAGE),
        "noise.jpg": (noise, NOT_AN_IMAGE),
        "ones.png": (b"\xff" * 4_096, NOT_AN_IMAGE),
        "newlines.jpg": (b"\r\n" * 40, NOT_AN_IMAGE),
        "header-missing.jpg": (jpeg[2:], NOT_AN_IMAGE),
        "line-ends-changed.png": (png.replace(b"\r\n", b"\n"), NOT_AN_IMAGE),
        "bom-before.jpg": (b"\xef\xbb\xbf" + jpeg, NOT_AN_IMAGE),
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg">' + b"<g>" * 20_000, UNSUPPORTED),
        "entities.svg": (b'<!DOCTYPE svg [<!ENTITY a "aaaa">]><svg>&a;</svg>', UNSUPPORTED),
        "jpeg-2000.jpg": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), UNSUPPORTED),
        "icon.png": (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(40), UNSUPPORTED),
        "brand-only.heic": (b"\0\0\0\x14ftypheix\0\0\0\0mif1" + bytes(40), CORRUPT),
        "map.pgm": (b"P5\n4 4\n255\n" + bytes(16), UNSUPPORTED),
        "texture.jpg": (b"DDS " + bytes(124), UNSUPPORTED),
    }
    refused |= {f"one-byte-{byte:02x}.jpg": (bytes([byte]), NOT_AN_IMAGE) for byte in (0x00, 0x0A, 0x42, 0x89, 0xFF)}
    magics = {
        "magic-only.webp": b"RIFF\4\0\0\0WEBP",
        "magic-only.gif": b"GIF89a",
        "magic-only.tif": b"II*\0",
        "magic-only.bmp": b"BM" + bytes(12) + b"\x28\0\0\0",
        "magic-only.avif": b"\0\0\0\x10ftypavif\0\0\0\0",
        "magic-and-ones.png": PNG_MAGIC + b"\xff" * 400,
        "magic-and-ones.gif": b"GIF89a" + b"\xff" * 400,
        "magic-and-noise.jpg": b"\xff\xd8\xff\xe0" + noise,
        "magic-and-noise.tif": b"MM\0*" + noise,
        "magic-and-noise.webp": b"RIFF\xff\xff\0\0WEBPVP8 " + noise,
    }
    decoded = {
        "png-named.jpg": png,
        "jpeg-named.png": jpeg,
        "webp-named.gif": good_images()["lossy.webp"],
        "avif-named.jpg": good_images()["photo.avif"],
        "heic-named.jpg": good_images()["photo.heic"],
        "png-then-archive.png": png + archive.getvalue(),
        "jpeg-then-page.jpg": jpeg + html,
        "gif-then-script.gif": gif(2) + b"*/=1;alert(1)//",
        "zeros-behind.png": png + bytes(100_000),
    }
    found: dict[str, Trick] = {name: (data, (error_class,)) for name, (data, error_class) in refused.items()}
    found |= {name: (data, (CORRUPT, TRUNCATED, TOO_MANY_PIXELS)) for name, data in magics.items()}
    return found | {name: (data, (DECODES,)) for name, data in decoded.items()}
