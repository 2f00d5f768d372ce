"""Small pictures of what was found, read anew from where the images are; flagged ones blurred beyond recognition."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageFilter

from vlmflow.config import CatalogConfig, ImageLimits, Job
from vlmflow.errors import ImageError, StorageAccessError, StoreLostError, TransientError, VlmflowError
from vlmflow.imaging import PixelRequest, decode, hash_of
from vlmflow.search.results import Hit
from vlmflow.sources.again import RowReader
from vlmflow.sources.base import Fetched

SIDE = 192
_AT_ONCE = 32  # images in memory at once
_BLURRED_SIDE = 6  # what is left of a flagged image: so many pixels a side
_REQUEST = PixelRequest(SIDE, "bicubic", ("squash",))


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a ``data:`` uri, squashed to a square of ``SIDE`` pixels; or why there is none."""

    uri: str | None
    reason: str = ""
    is_blurred: bool = False


def make_thumbnails(
    hits: Sequence[Hit], catalog: CatalogConfig, *, job: Job | None = None, show_flagged: bool = False
) -> list[Thumbnail]:
    """Reads images and makes small ones, in the order of the hits. An image that cannot be had costs only itself.

    A picture is shown only if its bytes are those that the row was made of: of others no decision is known. A catalog
    in a store must not name files of the local disk, and urls of private hosts are refused, as in `enrich`.

    Args:
        job: its limits and of its source ``http``, ``storage`` and ``bytes_column`` count; None: as of a job file
            without them.
        show_flagged: flagged images as they are, instead of blurred.
    """
    limits = ImageLimits() if job is None else job.limits
    reader = RowReader(catalog, limits, None if job is None else job.source)
    out: list[Thumbnail] = []
    for start in range(0, len(hits), _AT_ONCE):
        some = hits[start : start + _AT_ONCE]
        for hit, fetched in zip(some, _fetch(reader, some), strict=True):
            out.append(_thumbnail(hit, fetched, limits, show_flagged))
    return out


def _fetch(reader: RowReader, hits: Sequence[Hit]) -> list[Fetched]:
    """What lies there now; nothing is asked for a hit without content: its address may have been refused."""
    known = [hit for hit in hits if hit.content_hash is not None]
    try:
        found = iter(reader.read([(hit.uri, hit.object_version) for hit in known]))
    except (StorageAccessError, TransientError) as error:
        found = itertools.repeat(Fetched(None, None, None, why_lost(error)))
    return [Fetched(None, None, None, "") if hit.content_hash is None else next(found) for hit in hits]


def why_lost(error: VlmflowError) -> str:
    """Why nothing could be read, for whoever looks at an image; of a disk, the error names the file of another."""
    cause = error.__cause__ if isinstance(error, StoreLostError) else error
    return str(cause) if isinstance(cause, VlmflowError) else "the disk that it lies on is out of reach"


def picture_of(
    content_hash: str | None, fetched: Fetched, limits: ImageLimits, request: PixelRequest = _REQUEST
) -> Image.Image | str:
    """A small picture of what was read, squashed to a square; or why there is none.

    Args:
        content_hash: of the bytes that the row was made of; of others no decision is known. None: of none.
    """
    if content_hash is None:
        return "it could not be read when it was enriched"
    if fetched.data is None:
        return fetched.message or "cannot be read"
    if hash_of(fetched.data) != content_hash:  # of a file that was written anew it may be no image at all
        return "the image has changed since it was enriched"
    try:
        image = decode(fetched.data, [request], limits, content_hash)
    except ImageError as error:
        return str(error)
    ((_, pixels),) = image.pixels[request.key]
    return Image.fromarray(pixels)


def _thumbnail(hit: Hit, fetched: Fetched, limits: ImageLimits, show_flagged: bool) -> Thumbnail:
    picture = picture_of(hit.content_hash, fetched, limits)
    if isinstance(picture, str):
        return Thumbnail(None, picture)
    blurred = hit.is_flagged and not show_flagged
    if blurred:
        picture = blur(picture)
    return Thumbnail(as_uri(picture), is_blurred=blurred)


def blur(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """What is left of a flagged image: a few patches of colour, in a square of ``side`` pixels.

    In the picture itself: what is blurred by a style sheet is one click away.
    """
    picture = picture.resize((_BLURRED_SIDE, _BLURRED_SIDE), Image.Resampling.BOX)
    return picture.resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(side // 12))


def as_uri(picture: Image.Image, quality: int = 80) -> str:
    """A picture as JPEG in a ``data:`` uri."""
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"
