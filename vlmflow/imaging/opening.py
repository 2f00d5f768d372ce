"""An image file up to its pixels: format, caps, orientation, all from the header; nothing is decoded here."""

from __future__ import annotations

import hashlib
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageFile, TiffImagePlugin
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import headers
from vlmflow.imaging.embedded import READ_BY_HAND
from vlmflow.imaging.heic import HeicFile
from vlmflow.imaging.heif import NotReadError, is_heic_supported, to_decode
from vlmflow.imaging.png import PngFile

_TIFF_SETUP = threading.Lock()
# Tiles at the edges of an image reach over it; of small ones nobody counts the pixels.
_MOST_TILED, _FEW_TILED = 2, 1 << 20


class _TiffFile(TiffImageFile):
    """A TIFF, each page of which libtiff reads where Pillow by itself would make another picture of it."""

    def _setup(self) -> None:
        # Of planes that are not compressed Pillow takes 16 bits for 8, and none beyond colours.
        is_planar = self.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
        with _TIFF_SETUP:
            TiffImagePlugin.READ_LIBTIFF = is_planar
            try:
                super()._setup()
            finally:
                TiffImagePlugin.READ_LIBTIFF = False
        if is_planar and self.mode == "LA":  # Pillow takes the plane of transparency for nothing: all would be clear
            raise NotReadError("a TIFF of grey with its transparency in a plane apart")
        self.tile = [_in_native_order(tile) for tile in self.tile]


def _in_native_order(tile: ImageFile._Tile) -> ImageFile._Tile:
    """Pillow knows that libtiff turns the bytes of 16-bit integers to this machine's order, not that of others too."""
    if tile.codec_name != "libtiff" or not isinstance(tile.args, tuple):
        return tile
    rawmode, *others = tile.args
    return tile._replace(args=(re.sub("B([SF])$", r"N\1", rawmode), *others))


# Opened directly and not through Image.open: that one applies its own, process-wide pixel limit, and tries others.
_OPENERS: dict[str, type[ImageFile.ImageFile]] = {
    "avif": AvifImageFile,
    "bmp": BmpImageFile,
    "gif": GifImageFile,
    "heic": HeicFile,
    "jpeg": JpegImageFile,
    "png": PngFile,
    "tiff": _TiffFile,
    "webp": WebPImageFile,
}

# What Pillow's plugins raise on bytes that do not fit their format.
BAD_BYTES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    RuntimeError,  # NotImplementedError too
    AssertionError,
    BufferError,
    SystemError,
    Warning,  # of Pillow, where warnings were made errors
    struct.error,
    zlib.error,
)

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageFacts:
    """What the table records of an image file.

    Attributes:
        content_hash: sha256 of the bytes, hexadecimal.
        format: jpeg, png, webp, gif, bmp, tiff, avif or heic; mp4 or webm.
        mode: Pillow's mode of the file, before normalisation.
        width: in pixels, as displayed: after the EXIF orientation.
        height: in pixels, as displayed.
        num_frames: frames or pages; at most ``headers.MAX_COUNTED_FRAMES``.
        phash: perceptual hash of the decoded image, see :func:`perceptual_hash`; None: it was not decoded, or is plain.
    """

    content_hash: str
    format: str
    mode: str
    width: int
    height: int
    num_frames: int
    phash: str | None = None


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header has been read and found within the limits, its pixels not decoded."""

    data: bytes
    image: ImageFile.ImageFile
    facts: ImageFacts
    orientation: int  # what remains to be applied to the pixels


def inspect(data: bytes, limits: ImageLimits) -> ImageFacts:
    """Reads the facts from an image's header; no pixel is decoded.

    Raises:
        ImageError: the bytes are not an image that can be decoded, or exceed the limits.
    """
    return open_image(data, limits).facts


def hash_of(data: bytes) -> str:
    """The content hash that the table records: sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def open_image(data: bytes, limits: ImageLimits, content_hash: str | None = None) -> OpenedImage:
    """Reads the header and checks the limits.

    Raises:
        ImageError: the bytes are not an image that can be decoded, or exceed the limits.
    """
    image_format = _identify(data, limits)
    if image_format == "webp" and (canvas := headers.webp_canvas(data)) is not None:
        check_pixels(canvas, limits)
    with bad_bytes(data, image_format):
        _check_parts(data, image_format, limits)
        with warnings.catch_warnings():
            # Of metadata that Pillow cannot read; what counts of it is checked here.
            warnings.simplefilter("ignore")
            image = _OPENERS[image_format](BytesIO(data), "")
            check_pixels(image.size, limits)
            if image_format in READ_BY_HAND and (image_format != "avif" or "icc_profile" not in image.info):
                image.info["icc_profile"] = READ_BY_HAND[image_format](data)
            orientation = _orientation(image, data)
        num_frames = _count_frames(image, image_format, data)
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    content_hash = content_hash or hash_of(data)
    facts = ImageFacts(content_hash, image_format, image.mode, width, height, num_frames)
    return OpenedImage(data, image, facts, orientation)


def _identify(data: bytes, limits: ImageLimits) -> str:
    check_size(data, limits)
    image_format = headers.sniff(data)
    if image_format == "heic" and not is_heic_supported():
        message = "a HEIC image; it is decoded where vlmflow[heif] is installed"
        raise ImageError(message, error_class=RowErrorClass.UNSUPPORTED_FORMAT)
    if image_format is not None:
        return image_format
    unsupported = headers.sniff_unsupported(data)
    if unsupported is not None:
        decoded = [name for name in _OPENERS if name != "heic" or is_heic_supported()]
        message = f"{unsupported}; decoded are {', '.join(decoded)}"
        raise ImageError(message, error_class=RowErrorClass.UNSUPPORTED_FORMAT)
    raise ImageError("the content is not that of an image", error_class=RowErrorClass.NOT_AN_IMAGE)


def check_size(data: bytes, limits: ImageLimits) -> None:
    """Refuses files without bytes, or with too many."""
    if not data:
        raise ImageError("the file holds no bytes", error_class=RowErrorClass.EMPTY_FILE)
    if len(data) > limits.max_bytes:
        message = f"{len(data):,} bytes exceed limits.max_bytes of {limits.max_bytes:,}"
        raise ImageError(message, error_class=RowErrorClass.TOO_MANY_BYTES)


def _check_parts(data: bytes, image_format: str, limits: ImageLimits) -> None:
    """Refuses files made of so many parts, or of so large ones, that stepping through them would take all there is."""
    if image_format == "tiff" and headers.count_tiff_entries(data) > headers.MAX_TIFF_ENTRIES:
        message = f"the tiff file has more than {headers.MAX_TIFF_ENTRIES:,} entries in its directories"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT)
    if headers.count_parts(data, image_format) > headers.MAX_PARTS:
        message = f"the {image_format} file is made of more than {headers.MAX_PARTS:,} parts"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT)
    if image_format == "jpeg" and headers.count_jpeg_scans(data) > headers.MAX_JPEG_SCANS:
        message = f"the jpeg file has more than {headers.MAX_JPEG_SCANS} scans"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT)
    if image_format == "tiff":
        for tile in headers.tiff_tile_sizes(data):
            if min(tile) > 0:
                check_pixels(tile, limits)
    if image_format == "heic":
        found = to_decode(data)
        for size in found.sizes:
            check_pixels(size, limits)
        if found.most_pixels > max(_MOST_TILED * limits.max_pixels, _FEW_TILED):
            most = f"twice the limits.max_pixels of {limits.max_pixels:,}"
            message = f"tiles of {found.most_pixels:,} pixels together exceed {most}"
            raise ImageError(message, error_class=RowErrorClass.TOO_MANY_PIXELS)
        if found.most_unseen > _FEW_TILED:
            message = f"tiles hold {found.most_unseen:,} pixels more than twice those of the image that they make"
            raise ImageError(message, error_class=RowErrorClass.TOO_MANY_PIXELS)


def check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    """Refuses widths and heights that make too many pixels, or none."""
    width, height = size
    if width * height > limits.max_pixels:
        message = f"{width} x {height} pixels exceed limits.max_pixels of {limits.max_pixels:,}"
        raise ImageError(message, error_class=RowErrorClass.TOO_MANY_PIXELS)
    if width < 1 or height < 1:
        raise ImageError(f"the header says {width} x {height} pixels", error_class=RowErrorClass.CORRUPT)


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """The EXIF orientation, 1 to 8. One that cannot be read counts as 1, as in every viewer.

    Pillow takes it from other places too (XMP, texts of a PNG), and of other types, where no browser looks for it.
    """
    if isinstance(image, TiffImageFile):
        return 1  # its plugin turns the pixels itself, and has told the size after it
    exif = image.info.get("exif")
    if exif is None and isinstance(image, PngFile):
        exif = headers.png_orientation_exif(data)
    return headers.exif_orientation(exif) if isinstance(exif, bytes) else 1


def _count_frames(image: ImageFile.ImageFile, image_format: str, data: bytes) -> int:
    if image_format == "gif":
        return headers.count_gif_frames(data)
    if image_format == "tiff":
        return headers.count_tiff_pages(data)
    if image_format == "jpeg":
        return 1
    return max(1, min(getattr(image, "n_frames", 1), headers.MAX_COUNTED_FRAMES))  # told by the header


@contextmanager
def bad_bytes(data: bytes, image_format: str) -> Iterator[None]:
    """Turns what Pillow raises on bad bytes into an ImageError whose message is the same in every process."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        message = "more pixels than Pillow accepts for this format"
        raise ImageError(message, error_class=RowErrorClass.TOO_MANY_PIXELS) from error
    except MemoryError as error:
        message = f"not enough memory to decode this {image_format} file"
        raise ImageError(message, error_class=RowErrorClass.OUT_OF_MEMORY) from error
    except NotReadError as error:
        raise ImageError(f"{error} is not decoded", error_class=RowErrorClass.UNSUPPORTED_FORMAT) from error
    except BAD_BYTES as error:
        # Pillow's own text is left to the log of the cause: some of it holds addresses of objects.
        if "truncated" in str(error).lower() or headers.is_cut_short(data, image_format):
            message = f"the {image_format} file ends before its image does"
            raise ImageError(message, error_class=RowErrorClass.TRUNCATED) from error
        if "MAX_TEXT" in str(error):  # Pillow's limits on what text chunks and colour profiles unfold to
            message = f"the {image_format} file holds texts or a colour profile that unfold to more than is accepted"
        else:
            message = f"the {image_format} file is damaged and cannot be decoded"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT) from error
