"""One decode, and the pixels that the models asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import imagehash
import PIL
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging.frames import (
    MAX_FRAMES_SEEN,
    MAX_PIXELS_SEEN,
    Frame,
    Thumbnail,
    choose_frames,
    frames_in,
    thumbnail,
)
from vlmflow.imaging.opening import (
    BAD_BYTES,
    TRANSPOSE,
    ImageFacts,
    OpenedImage,
    bad_bytes,
    check_pixels,
    check_size,
    hash_of,
    open_image,
)
from vlmflow.imaging.pixels import Pixels, render, shows_ground, to_rgb
from vlmflow.imaging.video import Video, open_video, sniff_video, unseen_gap

# Part of the ledger: images recorded as unreadable are due again when it changes. Raise the number when we learn to
# decode something new; Pillow's major version stands for what Pillow learned.
DECODER_VERSION = f"1-pillow{PIL.__version__.split('.')[0]}"

# A JPEG is decoded at reduced scale when both sides stay at least this many times the largest target. Measured by
# tests/unit/imaging/test_jpeg_draft.py: see there for the differences that remain.
DRAFT_RATIO = 2


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
class DecodedImage:
    """An image and its pixels: for each request's key the views, each (size, size, 3) uint8 RGB.

    Attributes:
        unseen: why some of its frames were not looked at; None: all were, or none were asked for.
    """

    facts: ImageFacts
    pixels: dict[str, list[tuple[str, Pixels]]]
    unseen: str | None = None


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
    opened = open_image(data, limits, content_hash)
    image: Image.Image = opened.image
    with bad_bytes(data, opened.facts.format):
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
    return str(imagehash.phash(image.resize((64, 64), Image.Resampling.BILINEAR, reducing_gap=2.0)))


def _shown(image: Image.Image, orientation: int, ground: Literal["white", "black"]) -> Image.Image:
    rgb = to_rgb(image, ground)
    return rgb.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else rgb


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
    opened: OpenedImage,
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
    except (*BAD_BYTES, Image.DecompressionBombError, MemoryError):
        unseen = f"frames after the first {len(thumbnails):,} of {opened.facts.num_frames:,} cannot be decoded"
    for index, number in enumerate(choose_frames(thumbnails)):
        try:
            image.seek(number)
            shown = _shown(image, orientation, "white")
        except (*BAD_BYTES, MemoryError):
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
    check_size(data, limits)
    with open_video(data) as video:
        said = video.facts
        check_pixels((said.width, said.height), limits)
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
            check_pixels(image.size, limits)
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


def merge_requests(requests: Sequence[PixelRequest]) -> list[PixelRequest]:
    """Joins requests that share a key into one with the views of all, in order of their first mention."""
    merged: dict[str, PixelRequest] = {}
    for request in requests:
        known = merged.get(request.key)
        views = dict.fromkeys((*known.views, *request.views) if known else request.views)
        merged[request.key] = PixelRequest(request.size, request.interpolation, tuple(views))
    return list(merged.values())
