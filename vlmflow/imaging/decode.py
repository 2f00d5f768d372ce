"""Header checks, one decode, and the pixels that the models asked for."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Literal

import imagehash
import PIL
from PIL import ExifTags, Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging import headers
from vlmflow.imaging.frames import (
    MAX_FRAMES_SEEN,
    MAX_PIXELS_SEEN,
    Frame,
    Thumbnail,
    choose_frames,
    frames_in,
    thumbnail,
)
from vlmflow.imaging.pixels import Pixels, render, shows_ground, to_rgb
from vlmflow.imaging.video import Video, open_video, sniff_video, unseen_gap

# Part of the ledger: images recorded as unreadable are due again when it changes. Raise the number when we learn to
# decode something new; Pillow's major version stands for what Pillow learned.
DECODER_VERSION = f"1-pillow{PIL.__version__.split('.')[0]}"

# A JPEG is decoded at reduced scale when both sides stay at least this many times the largest target. Measured by
# tests/unit/imaging/test_jpeg_draft.py: see there for the differences that remain.
DRAFT_RATIO = 2

# Opened directly and not through Image.open: that one applies its own, process-wide pixel limit, and tries others.
_OPENERS: dict[str, type[ImageFile.ImageFile]] = {
    "avif": AvifImageFile,
    "bmp": BmpImageFile,
    "gif": GifImageFile,
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "tiff": TiffImageFile,
    "webp": WebPImageFile,
}

# What Pillow's plugins raise on bytes that do not fit their format.
_BAD_BYTES = (
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

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PixelRequest:
    """What a model wants to be shown of an image.

    Attributes:
        size: side of the square, in pixels.
        interpolation: of the resize, always antialiased.
        views: names of :data:`vlmflow.imaging.pixels.VIEWS`, ``squash`` first.
    """

    size: int
    interpolation: Literal["bicubic", "bilinear"]
    views: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the columns ``pixels_<key>`` and ``views_<key>``; equal for requests that can share them."""
        return f"{self.size}_{self.interpolation}"


@dataclass(frozen=True)
class ImageFacts:
    """What the table records of an image file.

    Attributes:
        content_hash: sha256 of the bytes, hexadecimal.
        format: jpeg, png, webp, gif, bmp, tiff or avif; mp4 or webm.
        mode: Pillow's mode of the file, before normalisation.
        width: in pixels, as displayed: after the EXIF orientation.
        height: in pixels, as displayed.
        num_frames: frames or pages; at most ``headers.MAX_COUNTED_FRAMES``.
        phash: perceptual hash of the decoded image, see :func:`perceptual_hash`; None: it was not decoded.
    """

    content_hash: str
    format: str
    mode: str
    width: int
    height: int
    num_frames: int
    phash: str | None = None


@dataclass(frozen=True)
class DecodedImage:
    """An image and its pixels: for each request's key the views, each (size, size, 3) uint8 RGB.

    Attributes:
        unseen: why some of its frames were not looked at; None: all were, or none were asked for.
    """

    facts: ImageFacts
    pixels: dict[str, list[tuple[str, Pixels]]]
    unseen: str | None = None


@dataclass(frozen=True)
class _Opened:
    """An image whose header has been read and found within the limits, its pixels not decoded."""

    image: ImageFile.ImageFile
    facts: ImageFacts
    orientation: int  # what remains to be applied to the pixels


def inspect(data: bytes, limits: ImageLimits) -> ImageFacts:
    """Reads the facts from an image's header; no pixel is decoded.

    Raises:
        ImageError: the bytes are not an image that can be decoded, or exceed the limits.
    """
    return _open(data, limits).facts


def decode(
    data: bytes, requests: Sequence[PixelRequest], limits: ImageLimits, content_hash: str | None = None
) -> DecodedImage:
    """Decodes an image once and renders what is asked for.

    Of an animation or a TIFF of several pages that is the first frame, and, where ``frames`` are among the views, those
    that differ most, squashed.

    Args:
        data: the bytes of the file; its name is of no interest.
        requests: those with equal keys are merged.
        limits: checked on the header, before anything is decoded.
        content_hash: sha256 of the data, hexadecimal, where it is known already.

    Raises:
        ImageError: the bytes are not an image that can be decoded, or exceed the limits. Nothing else, for any bytes.
    """
    merged = merge_requests(requests)
    if data and sniff_video(data) is not None:
        return _decode_video(data, merged, limits, content_hash)
    opened = _open(data, limits, content_hash)
    image: Image.Image = opened.image
    with _bad_bytes(data, opened.facts.format):
        if isinstance(image, JpegImageFile) and merged:
            # Pillow takes the strongest of 1/2, 1/4 and 1/8 that keeps both sides at or above this size.
            side = DRAFT_RATIO * max(request.size for request in merged)
            image.draft(None, (side, side))
        image.load()
        grounds = [("", _shown(image, opened.orientation, "white"))]
        if any("black" in request.views for request in merged) and shows_ground(image):
            grounds.append(("black", _shown(image, opened.orientation, "black")))
    pixels = {request.key: _views(request, grounds) for request in merged}
    unseen = None
    if opened.facts.num_frames > 1 and any("frames" in request.views for request in merged):
        unseen = _add_frames(opened, merged, pixels, grounds[0][1], limits)
    return DecodedImage(replace(opened.facts, phash=perceptual_hash(grounds[0][1])), pixels, unseen)


def perceptual_hash(image: Image.Image) -> str:
    """64 bits as 16 hexadecimal digits, of which images that look alike differ in few: pHash, by the package imagehash.

    Taken of the image squashed to 64 x 64 first, which makes it quick on large ones and moves a bit or two.
    """
    small = image.resize((64, 64), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return str(imagehash.phash(small))


def _shown(image: Image.Image, orientation: int, ground: Literal["white", "black"]) -> Image.Image:
    rgb = to_rgb(image, ground)
    return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb


def _views(request: PixelRequest, grounds: Sequence[tuple[str, Image.Image]]) -> list[tuple[str, Pixels]]:
    """The views of an image as it looks on white, and squashed on other grounds."""
    rendered = render(grounds[0][1], request.size, request.interpolation, request.views)
    if "black" in request.views:
        for name, image in grounds[1:]:
            rendered += [(name, pixels) for _, pixels in _squashed(image, request)]
    return rendered


def _squashed(image: Image.Image, request: PixelRequest) -> list[tuple[str, Pixels]]:
    return render(image, request.size, request.interpolation, ("squash",))


def _add_frames(
    opened: _Opened,
    requests: Sequence[PixelRequest],
    pixels: dict[str, list[tuple[str, Pixels]]],
    first: Image.Image,
    limits: ImageLimits,
) -> str | None:
    """Renders the frames behind the first that are worth showing; says what was not looked at."""
    image, orientation = opened.image, opened.orientation
    thumbnails, times = [thumbnail(first)], [0.0]
    num_pixels, unseen = 0, None
    wanted = min(opened.facts.num_frames, MAX_FRAMES_SEEN)
    if wanted < opened.facts.num_frames:
        unseen = f"frames after the first {wanted:,} of {opened.facts.num_frames:,} were not looked at"
    try:
        for number, time_s in frames_in(image, wanted):
            num_pixels += image.width * image.height
            if image.width * image.height > limits.max_pixels or num_pixels > MAX_PIXELS_SEEN:
                unseen = f"frames after the first {number:,} of {opened.facts.num_frames:,} hold too many pixels"
                break
            thumbnails.append(thumbnail(to_rgb(image)))
            times.append(time_s)
    except (*_BAD_BYTES, Image.DecompressionBombError, MemoryError):
        unseen = f"frames after the first {len(thumbnails):,} of {opened.facts.num_frames:,} cannot be decoded"
    for index, number in enumerate(choose_frames(thumbnails)):
        try:
            image.seek(number)
            shown = _shown(image, orientation, "white")
        except (*_BAD_BYTES, MemoryError):
            unseen = f"frame {number + 1:,} of {opened.facts.num_frames:,} cannot be decoded"
            continue
        name = Frame(number, times[number]).view(index)
        for request in requests:
            if "frames" in request.views:
                pixels[request.key] += [(name, shown_pixels) for _, shown_pixels in _squashed(shown, request)]
    return unseen


def _decode_video(
    data: bytes, requests: Sequence[PixelRequest], limits: ImageLimits, content_hash: str | None
) -> DecodedImage:
    """The first frame of a video as its image, and, where ``frames`` are among the views, those that differ most."""
    _check_size(data, limits)
    with open_video(data) as video:
        said = video.facts
        _check_pixels((said.width, said.height), limits)
        first, thumbnails, times, unseen = _look_through(video, limits)
        width, height = first.size
        pixels = {request.key: _views(request, [("", first)]) for request in requests}
        wanted = [request for request in requests if "frames" in request.views]
        chosen = choose_frames(thumbnails) if wanted else []
        if chosen:
            video.rewind()
            for number, (_, image) in enumerate(video.frames()):
                if number in chosen:
                    name = Frame(number, times[number]).view(chosen.index(number))
                    for request in wanted:
                        pixels[request.key] += [(name, shown) for _, shown in _squashed(image, request)]
                if number >= chosen[-1]:
                    break
    facts = ImageFacts(
        content_hash or hash_of(data), said.format, said.mode, width, height, said.num_frames, perceptual_hash(first)
    )
    return DecodedImage(facts, pixels, unseen if wanted else None)


def _look_through(video: Video, limits: ImageLimits) -> tuple[Image.Image, list[Thumbnail], list[float], str | None]:
    """The first frame, thumbnails and times of all that are looked at, and why some are not."""
    first: Image.Image | None = None
    thumbnails: list[Thumbnail] = []
    times: list[float] = []
    num_pixels = 0
    try:
        for time_s, image in video.frames():
            first = first or image
            num_pixels += image.width * image.height
            if thumbnails and (num_pixels > MAX_PIXELS_SEEN or len(thumbnails) >= MAX_FRAMES_SEEN):
                return first, thumbnails, times, f"frames after {times[-1]:.1f} s were not looked at"
            _check_pixels(image.size, limits)
            thumbnails.append(thumbnail(image))
            times.append(time_s)
    except ImageError:
        if first is None or not thumbnails:
            raise
        return first, thumbnails, times, f"frames after {times[-1]:.1f} s cannot be decoded"
    if first is None:
        message = "the video holds no frame that can be decoded"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT)
    return first, thumbnails, times, None if video.every_frame else unseen_gap(times, video.facts)


def hash_of(data: bytes) -> str:
    """The content hash that the table records: sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def merge_requests(requests: Sequence[PixelRequest]) -> list[PixelRequest]:
    """Joins requests that share a key into one with the views of all, in order of their first mention."""
    merged: dict[str, PixelRequest] = {}
    for request in requests:
        known = merged.get(request.key)
        views = dict.fromkeys((*known.views, *request.views) if known else request.views)
        merged[request.key] = PixelRequest(request.size, request.interpolation, tuple(views))
    return list(merged.values())


def _open(data: bytes, limits: ImageLimits, content_hash: str | None = None) -> _Opened:
    """Reads the header and checks the limits."""
    image_format = _identify(data, limits)
    if image_format == "webp" and (canvas := headers.webp_canvas(data)) is not None:
        _check_pixels(canvas, limits)
    with _bad_bytes(data, image_format):
        _check_parts(data, image_format, limits)
        with warnings.catch_warnings():
            # Of metadata that Pillow cannot read; what counts of it is checked here.
            warnings.simplefilter("ignore")
            image = _OPENERS[image_format](BytesIO(data), "")
            _check_pixels(image.size, limits)
            orientation = _orientation(image, data)
        num_frames = _count_frames(image, image_format, data)
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    content_hash = content_hash or hash_of(data)
    return _Opened(image, ImageFacts(content_hash, image_format, image.mode, width, height, num_frames), orientation)


def _identify(data: bytes, limits: ImageLimits) -> str:
    _check_size(data, limits)
    image_format = headers.sniff(data)
    if image_format is not None:
        return image_format
    unsupported = headers.sniff_unsupported(data)
    if unsupported is not None:
        message = f"{unsupported}; decoded are {', '.join(_OPENERS)}"
        raise ImageError(message, error_class=RowErrorClass.UNSUPPORTED_FORMAT)
    raise ImageError("the content is not that of an image", error_class=RowErrorClass.NOT_AN_IMAGE)


def _check_size(data: bytes, limits: ImageLimits) -> None:
    if not data:
        raise ImageError("the file holds no bytes", error_class=RowErrorClass.EMPTY_FILE)
    if len(data) > limits.max_bytes:
        message = f"{len(data):,} bytes exceed limits.max_bytes of {limits.max_bytes:,}"
        raise ImageError(message, error_class=RowErrorClass.TOO_MANY_BYTES)


def _check_parts(data: bytes, image_format: str, limits: ImageLimits) -> None:
    """Refuses files made of so many parts, or of so large ones, that stepping through them would take all there is."""
    if headers.count_parts(data, image_format) > headers.MAX_PARTS:
        message = f"the {image_format} file is made of more than {headers.MAX_PARTS:,} parts"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT)
    if image_format == "jpeg" and headers.count_jpeg_scans(data) > headers.MAX_JPEG_SCANS:
        message = f"the jpeg file has more than {headers.MAX_JPEG_SCANS} scans"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT)
    if image_format == "tiff" and (tile := headers.tiff_tile_size(data)) is not None and min(tile) > 0:
        _check_pixels(tile, limits)


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        message = f"{width} x {height} pixels exceed limits.max_pixels of {limits.max_pixels:,}"
        raise ImageError(message, error_class=RowErrorClass.TOO_MANY_PIXELS)
    if width < 1 or height < 1:
        raise ImageError(f"the header says {width} x {height} pixels", error_class=RowErrorClass.CORRUPT)


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """The EXIF orientation, 1 to 8. One that cannot be read counts as 1, as in every viewer."""
    if isinstance(image, TiffImageFile):
        return 1  # its plugin turns the pixels itself, and has told the size after it
    try:
        if isinstance(image, PngImageFile):
            late_exif = headers.png_orientation_exif(data)
            if late_exif is not None:
                image.info.setdefault("exif", late_exif)
            exif = Image.Image.getexif(image)  # the plugin's own decodes the pixels to look behind them
        else:
            exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except _BAD_BYTES:
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _count_frames(image: ImageFile.ImageFile, image_format: str, data: bytes) -> int:
    if image_format == "gif":
        return headers.count_gif_frames(data)
    if image_format == "tiff":
        return headers.count_tiff_pages(data)
    if image_format == "jpeg":
        return 1
    return max(1, min(getattr(image, "n_frames", 1), headers.MAX_COUNTED_FRAMES))  # told by the header


@contextmanager
def _bad_bytes(data: bytes, image_format: str) -> Iterator[None]:
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
    except _BAD_BYTES as error:
        # Pillow's own text is left to the log of the cause: some of it holds addresses of objects.
        if "truncated" in str(error).lower() or headers.is_cut_short(data, image_format):
            message = f"the {image_format} file ends before its image does"
            raise ImageError(message, error_class=RowErrorClass.TRUNCATED) from error
        if "MAX_TEXT" in str(error):  # Pillow's limits on what text chunks and colour profiles unfold to
            message = f"the {image_format} file holds texts or a colour profile that unfold to more than is accepted"
        else:
            message = f"the {image_format} file is damaged and cannot be decoded"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT) from error
