"""The small pictures of the page, each once, within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from vlmflow.config import CatalogConfig, Job
from vlmflow.report.rows import Row
from vlmflow.search.thumbnails import as_uri, blur, make_thumbnails

_AT_ONCE = 32
_BLURRED_SIDE = 48  # pixels; a few patches of colour need no more
_GIVE_UP_AFTER = 3 * _AT_ONCE  # images in a row that cannot be had: the place is out of reach


@dataclass(frozen=True)
class Picture:
    """An image as ``data:`` uris.

    Attributes:
        blurred: what is shown until a click; None: the image is not flagged.
    """

    clear: str
    blurred: str | None


@dataclass
class Pictures:
    """Pictures by image id, and why others are absent.

    Attributes:
        num_left_out: images that were to have a picture, for which there was no room or no hope.
    """

    found: dict[str, Picture] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    num_left_out: int = 0


def make_pictures(
    rows: Iterable[Row], catalog: CatalogConfig, job: Job | None, *, max_count: int, max_bytes: int
) -> Pictures:
    """Reads the images of rows, the most wanted first, until there are enough; how, :func:`make_thumbnails` says."""
    pictures = Pictures()
    wanted = list(rows)
    size, in_vain, start = 0, 0, 0
    while start < min(len(wanted), max_count) and size < max_bytes and in_vain < _GIVE_UP_AFTER:
        some = wanted[start : min(start + _AT_ONCE, max_count)]
        start += len(some)
        for row, thumbnail in zip(
            some, make_thumbnails([row.hit for row in some], catalog, job=job, show_flagged=True), strict=True
        ):
            if thumbnail.uri is None:
                pictures.reasons[row.hit.image_id] = thumbnail.reason
                in_vain += 1
                continue
            in_vain = 0
            blurred = _blurred(thumbnail.uri) if row.hit.is_flagged else None
            size += len(thumbnail.uri) + len(blurred or "")
            if size <= max_bytes:
                pictures.found[row.hit.image_id] = Picture(thumbnail.uri, blurred)
    pictures.num_left_out = len(wanted) - len(pictures.found) - len(pictures.reasons)
    return pictures


def _blurred(uri: str) -> str:
    data = base64.b64decode(uri.partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        return as_uri(blur(picture.convert("RGB"), _BLURRED_SIDE), quality=60)
