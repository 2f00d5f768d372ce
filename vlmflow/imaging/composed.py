"""Frames of GIFs and animated PNGs put together as browsers do, each from the part that the file holds of it.

Pillow takes what a frame leaves clear for a colour: of the palette, or black. What is drawn on it in that colour cannot
be seen then, and everybody else sees it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from vlmflow.config import ImageLimits
from vlmflow.imaging import headers
from vlmflow.imaging.colours import shares_colours
from vlmflow.imaging.opening import OpenedImage, check_pixels
from vlmflow.imaging.png import MAGIC, PngFile, png_chunk, png_chunks

_CLEAR = (0, 0, 0, 0)
_KEEP, _TO_CLEAR, _TO_PREVIOUS = 0, 1, 2
_GIF_DISPOSALS = {2: _TO_CLEAR, 3: _TO_PREVIOUS, 4: _TO_PREVIOUS}
_CONTROL, _EXTENSION, _IMAGE = 0xF9, 0x21, 0x2C


@dataclass(frozen=True)
class Part:
    """What a file holds of one frame.

    Attributes:
        file: a file of this frame alone.
        at: where its left upper corner stands.
        disposal: what becomes of its place before the next frame is drawn.
        replaces: whether it takes the place of what is there also where it is transparent.
        is_apart: shown by those that know no animations, and no part of this one.
    """

    file: bytes
    at: tuple[int, int]
    duration_s: float = 0.0
    disposal: int = _KEEP
    replaces: bool = False
    is_apart: bool = False


def first_frame(opened: OpenedImage, limits: ImageLimits) -> Image.Image:
    """The opened image itself, or, of a GIF whose first frame leaves a margin, what is shown of it."""
    image = opened.image
    if not isinstance(image, GifImageFile):
        return image
    part = next(gif_parts(opened.data), None)
    if part is None or (part.at == (0, 0) and _open(part).size == image.size):
        return image
    return next(composed_frames(opened, limits))[1]


def is_composed(opened: OpenedImage) -> bool:
    """Whether the frames of a file are put together here."""
    return isinstance(opened.image, GifImageFile | PngFile)


def composed_frames(opened: OpenedImage, limits: ImageLimits) -> Iterator[tuple[float, Image.Image]]:
    """Seconds from the start, and the frame as RGBA, which is good until the next one is asked for.

    Raises:
        ImageError: a frame makes the image larger than the limits.
    """
    is_gif = isinstance(opened.image, GifImageFile)
    canvas, time_s = Image.new("RGBA", opened.image.size, _CLEAR), 0.0
    for part in gif_parts(opened.data) if is_gif else png_parts(opened.data):
        drawn = _open(part)  # its header
        check_pixels(drawn.size, limits)
        if part.is_apart:
            yield time_s, shares_colours(_as_rgba(drawn), opened.image)
            continue
        (left, top), (width, height) = part.at, drawn.size
        size = max(canvas.width, left + width), max(canvas.height, top + height)
        if size != canvas.size:  # a frame reaches over the edge
            check_pixels(size, limits)
            canvas = canvas.crop((0, 0, *size))
        before = canvas.copy() if part.disposal == _TO_PREVIOUS else None
        if part.replaces:
            canvas.paste(_as_rgba(drawn), part.at)
        else:
            canvas.alpha_composite(_as_rgba(drawn), part.at)
        yield time_s, shares_colours(canvas, opened.image)
        time_s += part.duration_s
        if part.disposal == _TO_CLEAR:
            canvas.paste(_CLEAR, (left, top, left + width, top + height))
        canvas = before or canvas


def gif_parts(data: bytes) -> Iterator[Part]:
    """The frames of a GIF, whole or not."""
    palette_end = 13 + headers.gif_color_table(data[10])
    control, at = b"", palette_end
    while at + 9 < len(data):
        if data[at] == _EXTENSION:
            end = headers.skip_gif_blocks(data, at + 2)
            if data[at + 1] == _CONTROL and data[at + 2] >= 4:
                control = data[at:end]
        elif data[at] == _IMAGE:
            end = headers.skip_gif_blocks(data, at + 11 + headers.gif_color_table(data[at + 9]))
            left, top = struct.unpack_from("<HH", data, at + 1)
            size, flags = data[at + 5 : at + 9], control[3] if control else 0
            duration_s = int.from_bytes(control[4:6], "little") / 100
            head = b"GIF89a" + size + data[10:palette_end] + control
            file = head + data[at : at + 1] + bytes(4) + data[at + 5 : end] + b";"
            yield Part(file, (left, top), duration_s, _GIF_DISPOSALS.get(flags >> 2 & 7, _KEEP))
            control = b""
        else:
            return
        at = end


def png_parts(data: bytes) -> Iterator[Part]:
    """The frames of an animated PNG, and the picture before them if it is none of them."""
    head, shared, control, pixels = b"", b"", b"", list[bytes]()
    for kind, content in png_chunks(data):
        if kind == b"IHDR":
            head = content
        elif kind in (b"PLTE", b"tRNS") and not pixels:
            shared += png_chunk(kind, content)
        elif kind == b"IDAT":
            pixels.append(content)
        elif kind == b"fdAT":
            pixels.append(content[4:])
        elif kind in (b"fcTL", b"IEND"):
            if pixels:
                yield _png_part(head, shared, control, pixels)
            control, pixels = content, []
    if pixels:
        yield _png_part(head, shared, control, pixels)


def _png_part(head: bytes, shared: bytes, control: bytes, pixels: list[bytes]) -> Part:
    size = control[4:12] if control else head[:8]
    body = png_chunk(b"IHDR", size + head[8:]) + shared + png_chunk(b"IDAT", b"".join(pixels)) + png_chunk(b"IEND", b"")
    file = MAGIC + body
    if not control:
        return Part(file, (0, 0), is_apart=True)
    left, top, count, of, disposal, blend = struct.unpack_from(">IIHHBB", control, 12)
    return Part(file, (left, top), count / (of or 100), disposal, blend == 0)


def _open(part: Part) -> Image.Image:
    plugin = PngFile if part.file.startswith(MAGIC) else GifImageFile
    return plugin(BytesIO(part.file), "")


def _as_rgba(image: Image.Image) -> Image.Image:
    image.load()
    if not image.mode.startswith("I"):
        return image.convert("RGBA")
    values, key = np.asarray(image), image.info.get("transparency")  # grey of 16 bits
    grey = np.rint(values / 257).astype(np.uint8)
    alpha = np.where(values == key, 0, 255).astype(np.uint8)
    return Image.merge("RGBA", [Image.fromarray(plane) for plane in (grey, grey, grey, alpha)])
