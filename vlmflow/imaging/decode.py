"""One decode, and the pixels that the models asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import imagehash
import numpy as np
import PIL
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from vlmflow.config import ImageLimits
from vlmflow.errors import ImageError, RowErrorClass
from vlmflow.imaging.colours import is_scalable, of_small
from vlmflow.imaging.composed import composed_frames, first_frame, is_composed
from vlmflow.imaging.frames import MAX_FRAMES_SEEN, MAX_PIXELS_SEEN, Looked, frames_in
from vlmflow.imaging.headers import count_png_frames
from vlmflow.imaging.heif import has_track, is_heic_supported
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
from vlmflow.imaging.pixels import boxes, names_of, render, shows_ground, to_rgb
from vlmflow.imaging.resizing import Interpolation, Pixels, Resizer
from vlmflow.imaging.video import Track, Video, is_video_supported, open_video, sniff_video, unseen_gap
from vlmflow.schema import LEAST_PHASH_BITS


def decoder_version() -> str:
    """Part of the ledger: images recorded as unreadable are due again when it changes.

    Raise the number when we learn to decode something new; Pillow's major version stands for what Pillow learned.
    Behind a plus stand extras, which change nothing in what was readable without them.
    """
    extras = {"heif": is_heic_supported(), "video": is_video_supported()}
    pillow = PIL.__version__.partition(".")[0]
    return "+".join([f"4-pillow{pillow}", *(name for name, is_there in extras.items() if is_there)])


DECODER_VERSION = decoder_version()

# A JPEG is decoded at reduced scale when both sides stay at least this many times the largest target. Measured by
# tests/unit/imaging/test_jpeg_draft.py: see there for the differences that remain.
DRAFT_RATIO = 2
# Levels of grey, of 255, from the darkest to the brightest place of an image squashed to 64 x 64. Of less, the noise of
# a camera or an encoder, the bits of a perceptual hash are chance.
_LEAST_CONTRAST = 8
_HASHED_SIDE = 64
# Of a clip that begins plain, so many frames are decoded for the sake of its hash where none is to be shown.
_FRAMES_HASHED = 8
# Of the first frames, which are kept until those to show are chosen and so not drawn a second time: 64 MB on a ground.
_MAX_PIXELS_KEPT = 1 << 24


@dataclass(frozen=True)
class PixelRequest:
    """What a model wants to be shown of an image.

    Attributes:
        size: side of the square, in pixels.
        interpolation: of the resize, always antialiased.
        views: names of :data:`vlmflow.imaging.pixels.VIEWS`, ``squash`` first.
    """

    size: int
    interpolation: Interpolation
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
    for request in merged:
        names_of(request.views)  # an unknown one is a mistake of ours, and no damage to the file
    with bad_bytes(data, opened.facts.format):
        # By an odd profile neighbours that are averaged may look like nothing that can be seen in the image.
        if isinstance(image, JpegImageFile) and merged and is_scalable(image):
            # Pillow takes the strongest of 1/2, 1/4 and 1/8 that keeps both sides at or above this size.
            side = DRAFT_RATIO * max(request.size for request in merged)
            image.draft(None, (side, side))
        image.load()
        image = first_frame(opened, limits)
        later = of_small(image) if opened.facts.num_frames == 1 and _is_rendered_smaller(image.size, merged) else None
        grounds = _grounds(image, opened.orientation, merged, is_to_convert=later is None)
    phash = perceptual_hash(grounds[0][1], later)  # before another frame is decoded in this one's place
    pixels = _views(merged, grounds)
    if later is not None:
        for key, views in pixels.items():
            pixels[key] = [(name, np.asarray(later(Image.fromarray(view)))) for name, view in views]
    unseen = None
    if any("frames" in request.views for request in merged):
        if opened.facts.num_frames > 1:
            unseen, phash = _add_frames(opened, merged, pixels, grounds, limits, phash)
        if opened.facts.format == "png" and (num_there := count_png_frames(data)) > opened.facts.num_frames:
            # Viewers differ in what they make of an animation that is at odds with itself.
            unseen = f"{num_there:,} frames are there, of which {opened.facts.num_frames:,} were looked at"
        if opened.facts.format == "heic" and has_track(data):
            unseen = unseen or "a sequence of further images was not looked at"
    elif phash is None and opened.facts.num_frames > 1:
        phash = _hash_of_frames(opened, limits)
    return DecodedImage(replace(opened.facts, phash=phash), pixels, unseen)


def _is_rendered_smaller(size: tuple[int, int], requests: Sequence[PixelRequest]) -> bool:
    """Whether an image has more pixels than all that is made of it: its views, and what its hash is taken of."""
    num_pixels = _HASHED_SIDE**2
    for request in requests:
        num_views = sum(len(boxes(view, size, request.size)) for view in names_of(request.views))
        num_pixels += num_views * request.size**2
    return num_pixels < size[0] * size[1]


def perceptual_hash(image: Image.Image, later: Callable[[Image.Image], Image.Image] | None = None) -> str | None:
    """64 bits as 16 hexadecimal digits, of which images that look alike differ in few: pHash, by the package imagehash.

    Taken of the image squashed to 64 x 64 first, which makes it quick on large ones and moves a bit or two. None: the
    image is plain; all plain ones would have one hash, whatever their colour.

    Args:
        later: still to be done to the image.
    """
    small = image.resize((_HASHED_SIDE, _HASHED_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    grey = (small if later is None else later(small)).convert("L")
    if np.ptp(np.asarray(grey).astype(np.int16)) < _LEAST_CONTRAST:
        return None
    found = imagehash.phash(grey)
    return str(found) if np.count_nonzero(found.hash) >= LEAST_PHASH_BITS else None


def _hash_of_frames(opened: OpenedImage, limits: ImageLimits) -> str | None:
    """Of the few frames behind a plain first one, the hash of the first that is not plain."""
    num_pixels = 0
    try:
        for _, _, image in _frames_behind(opened, min(opened.facts.num_frames, _FRAMES_HASHED), limits):
            num_pixels += image.width * image.height
            if image.width * image.height > limits.max_pixels or num_pixels > MAX_PIXELS_SEEN:
                break
            found = perceptual_hash(_shown(image, opened.orientation, "white"))
            if found is not None:
                return found
    except (*BAD_BYTES, Image.DecompressionBombError, MemoryError, ImageError):
        pass  # that some cannot be decoded is said where frames are shown
    return None


def _frames_behind(
    opened: OpenedImage, num_frames: int, limits: ImageLimits
) -> Iterator[tuple[int, float, Image.Image]]:
    """Of the first frames all but the very first: number, seconds from the start, and the frame for the moment."""
    if not is_composed(opened):
        yield from ((number, time_s, opened.image) for number, time_s in frames_in(opened.image, num_frames))
        return
    for number, (time_s, image) in enumerate(islice(composed_frames(opened, limits), num_frames)):
        if number:
            yield number, time_s, image


def _grounds(
    image: Image.Image, orientation: int, requests: Sequence[PixelRequest], *, is_to_convert: bool = True
) -> list[tuple[str, Image.Image]]:
    """An image as RGB on white and, where a model wants to be shown that and it looks otherwise, on black."""
    if not is_to_convert:
        return [("white", _turned(image, orientation))]
    grounds: list[Literal["white", "black"]] = ["white"]
    if any("black" in request.views for request in requests) and shows_ground(image):
        grounds.append("black")
    return [(ground, _shown(image, orientation, ground)) for ground in grounds]


def _shown(image: Image.Image, orientation: int, ground: Literal["white", "black"]) -> Image.Image:
    return _turned(to_rgb(image, ground), orientation)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def _views(
    requests: Sequence[PixelRequest], grounds: Sequence[tuple[str, Image.Image]]
) -> dict[str, list[tuple[str, Pixels]]]:
    """For each request's key the views of an image as it looks on white, and squashed on other grounds."""
    (_, white), *others = [(name, Resizer(image)) for name, image in grounds]
    rendered = {}
    for request in requests:
        rendered[request.key] = render(white, request.size, request.interpolation, request.views)
        if "black" in request.views:
            for name, image in others:
                rendered[request.key].append((name, _squashed(image, request)))
    return rendered


def _add_views(
    pixels: dict[str, list[tuple[str, Pixels]]],
    requests: Sequence[PixelRequest],
    grounds: Sequence[tuple[str, Image.Image]],
    views: Sequence[tuple[str, str]],
) -> None:
    """Renders a frame for the views that were chosen of it, each a name and a ground."""
    shown = {name: Resizer(image) for name, image in grounds}
    for name, ground in views:
        for request in requests:
            if "frames" in request.views and (ground == "white" or ground in request.views):
                pixels[request.key].append((name, _squashed(shown[ground], request)))


def _squashed(image: Resizer, request: PixelRequest) -> Pixels:
    return image(request.size, request.interpolation, None)


def _add_frames(
    opened: OpenedImage,
    requests: Sequence[PixelRequest],
    pixels: dict[str, list[tuple[str, Pixels]]],
    grounds: Sequence[tuple[str, Image.Image]],
    limits: ImageLimits,
    phash: str | None,
) -> tuple[str | None, str | None]:
    """Renders the frames behind the first that are worth showing.

    Args:
        phash: of the first frame.

    Returns:
        What was not looked at, and the hash of the first of all frames that is not plain.
    """
    orientation, total = opened.orientation, opened.facts.num_frames
    looked = Looked()
    looked.add(0.0, grounds)
    num_pixels, unseen = 0, None
    kept = dict[int, list[tuple[str, Image.Image]]]()
    wanted = min(total, MAX_FRAMES_SEEN)
    if wanted < total:
        unseen = f"frames after the first {wanted:,} of {total:,} were not looked at"
    undecoded = (*BAD_BYTES, Image.DecompressionBombError, MemoryError)
    try:
        for number, time_s, image in _frames_behind(opened, wanted, limits):
            num_pixels += image.width * image.height
            if image.width * image.height > limits.max_pixels or num_pixels > MAX_PIXELS_SEEN:
                unseen = f"frames after the first {number:,} of {total:,} hold too many pixels"
                break
            shown = _grounds(image, orientation, requests)
            looked.add(time_s, shown)
            phash = phash or perceptual_hash(shown[0][1])
            if num_pixels <= _MAX_PIXELS_KEPT:
                kept[number] = [(ground, one.copy() if one is image else one) for ground, one in shown]
        else:
            if len(looked.times) < wanted:
                unseen = f"frames after the first {len(looked.times):,} of {total:,} are not there"
    except ImageError as error:  # as of a first frame, which costs the image
        is_large = error.error_class is RowErrorClass.TOO_MANY_PIXELS
        why = "hold too many pixels" if is_large else f"were not looked at: {error}"
        unseen = f"frames after the first {len(looked.times):,} of {total:,} {why}"
    except undecoded:
        unseen = f"frames after the first {len(looked.times):,} of {total:,} cannot be decoded"
    chosen = looked.choose()
    for number in [number for number in chosen if number in kept]:  # all of them before those that are not
        _add_views(pixels, requests, kept[number], chosen.pop(number))
    if not chosen:
        return unseen, phash
    try:
        for number, _, image in _frames_behind(opened, max(chosen, default=0) + 1, limits):
            if number in chosen:
                _add_views(pixels, requests, _grounds(image, orientation, requests), chosen.pop(number))
    except undecoded:
        unseen = f"frame {min(chosen, default=0) + 1:,} of {total:,} cannot be decoded"
    return unseen, phash


def _decode_video(
    data: bytes, requests: Sequence[PixelRequest], limits: ImageLimits, content_hash: str | None
) -> DecodedImage:
    """The first frame of a video as its image, and, where ``frames`` are among the views, those that differ most."""
    check_size(data, limits)
    video = open_video(data, limits.max_pixels)
    said = video.facts
    check_pixels((said.width, said.height), limits)
    first, looked, phash, unseen = _look_through(video, limits, requests)
    pixels = _views(requests, first)
    wants_frames = any("frames" in request.views for request in requests)
    chosen = looked.choose() if wants_frames else {}
    for number, (_, _, image) in enumerate(video.frames() if chosen else ()):
        if number in chosen:
            _add_views(pixels, requests, _grounds(image, 1, requests), chosen.pop(number))
        if not chosen:
            break
    width, height = first[0][1].size
    facts = ImageFacts(
        content_hash or hash_of(data),
        said.format,
        said.mode,
        width,
        height,
        said.num_frames,
        phash,
    )
    return DecodedImage(facts, pixels, unseen if wants_frames else None)


def _look_through(
    video: Video, limits: ImageLimits, requests: Sequence[PixelRequest]
) -> tuple[list[tuple[str, Image.Image]], Looked, str | None, str | None]:
    """The first frame on its grounds, what was looked at, the hash of the first not plain, and why some was not."""
    first: list[tuple[str, Image.Image]] = []
    looked = Looked()
    times: dict[Track, list[float]] = {track: [] for track in video.tracks}
    num_pixels, phash = 0, None
    try:
        for track, time_s, image in video.frames():
            num_pixels += image.width * image.height
            if first and (num_pixels > MAX_PIXELS_SEEN or len(looked.times) >= MAX_FRAMES_SEEN):
                return first, looked, phash, f"frames after {looked.times[-1]:.1f} s were not looked at"
            check_pixels(image.size, limits)
            grounds = _grounds(image, 1, requests)
            first = first or grounds
            phash = phash or perceptual_hash(grounds[0][1])
            looked.add(time_s, grounds)
            times[track].append(time_s)
    except ImageError:
        if not first:
            raise
        return first, looked, phash, f"frames after {looked.times[-1]:.1f} s cannot be decoded"
    if not first:
        message = "the video holds no frame that can be decoded"
        raise ImageError(message, error_class=RowErrorClass.CORRUPT)
    return first, looked, phash, unseen_gap(times)


def merge_requests(requests: Sequence[PixelRequest]) -> list[PixelRequest]:
    """Joins requests that share a key into one with the views of all, in order of their first mention."""
    merged: dict[str, PixelRequest] = {}
    for request in requests:
        known = merged.get(request.key)
        views = dict.fromkeys((*known.views, *request.views) if known else request.views)
        merged[request.key] = PixelRequest(request.size, request.interpolation, tuple(views))
    return list(merged.values())
