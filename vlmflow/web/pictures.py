"""Pictures that the app shows: small ones of the catalog's images, blurred where they are flagged, and maps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from anyio import CapacityLimiter, move_on_after
from anyio.to_thread import run_sync
from PIL import Image

from vlmflow.config import CatalogConfig, ImageLimits, Job
from vlmflow.errors import StorageAccessError, TransientError
from vlmflow.imaging import PixelRequest
from vlmflow.search.thumbnails import blur, picture_of, why_lost
from vlmflow.sources.again import Place, RowReader, place_of
from vlmflow.sources.base import Fetched
from vlmflow.views_search import printable, sentence
from vlmflow.web.cache import Cache

SIZES = {"small": 256, "large": 768}  # longest side in pixels
COLUMNS = ("image_id", "uri", "object_version", "content_hash", "width", "height", "decision", "errors")
_DECODED_AT_ONCE = 2  # each may be a hundred million pixels
# Whoever reads holds a thread for as long as the host takes. These threads are none of those that pages and verdicts
# run in, and no host has all of them: one that does not answer keeps waiting those alone who want its own images.
_READ_AT_ONCE = 16
_READ_OF_A_HOST = 4
_READ_OF_PARQUET = 2  # a row group is read for each image
_PATIENCE_S = 10.0  # so long a request waits for its turn to read
_CACHED_BYTES = 64 * 1024 * 1024
_MAX_SHARE = 8.0  # a longer strip is shown as if it were so long


class Picture(NamedTuple):
    """Bytes to send, and what they are."""

    data: bytes
    media_type: str


class Pictures:
    """Reads images from where they are and makes small ones; what was made is kept for a while.

    A picture is shown only if its bytes are those that the row was made of. A catalog in a store must not name files
    of the local disk, and urls of private hosts are refused, as in `enrich`.

    Args:
        job: its limits and of its source ``http``, ``storage`` and ``bytes_column`` count; None: as of a job file
            without them.
    """

    def __init__(self, catalog: CatalogConfig, job: Job | None = None) -> None:
        self._limits = ImageLimits() if job is None else job.limits
        self._reader = RowReader(catalog, self._limits, None if job is None else job.source)
        self._made: Cache[Picture] = Cache(_CACHED_BYTES, lambda picture: len(picture.data))
        self._readers = CapacityLimiter(_READ_AT_ONCE)
        self._hosts: Cache[CapacityLimiter] = Cache(1_000)
        self._decoding = CapacityLimiter(_DECODED_AT_ONCE)
        self._drawing = CapacityLimiter(1)

    async def small(self, row: Mapping[str, Any], size: str, *, blurred: bool) -> Picture:
        """A picture of a row with :data:`COLUMNS`; where there is none, one that says why."""
        if row["content_hash"] is None:  # whatever lies there now, no decision was made of it
            return placeholder(why_unread(row))
        key, side = (row["image_id"], row["content_hash"], size, blurred), SIZES[size]
        made = self._made.get(key)
        if made is not None:
            return made
        place = place_of(row["uri"], row["object_version"])
        host = self._hosts.get_or_make(_host_of(place), lambda: CapacityLimiter(_share_of(place)))
        # A turn lasts until the picture is made: what was read lies in memory until then.
        with move_on_after(_PATIENCE_S) as waiting:
            async with host, self._readers:
                waiting.deadline = math.inf
                fetched = await run_sync(self._read, row, limiter=CapacityLimiter(1))  # the turn is what limits it
                found = await run_sync(self._draw, row, fetched, side, blurred, limiter=self._decoding)
                # What there is none of is not kept: the next time it may be there.
                return placeholder(found) if isinstance(found, str) else self._made.put(key, found)
        return placeholder("others wait for images of this host: reload the page later")

    def _read(self, row: Mapping[str, Any]) -> Fetched:
        try:
            (fetched,) = self._reader.read([(row["uri"], row["object_version"])])
        except (StorageAccessError, TransientError) as error:
            return Fetched(None, None, None, why_lost(error))
        return fetched

    def _draw(self, row: Mapping[str, Any], fetched: Fetched, side: int, blurred: bool) -> Picture | str:
        request = PixelRequest(side, "bicubic", ("squash",))
        found = picture_of(row["content_hash"], fetched, self._limits, request)
        if isinstance(found, str):
            return found
        if blurred:
            found = blur(found, side)
        sink = io.BytesIO()
        found.resize(_fitted(row, side), Image.Resampling.BILINEAR).save(sink, "JPEG", quality=82)
        return Picture(sink.getvalue(), "image/jpeg")

    async def map(self, job: Job, row: dict[str, Any], label: str, *, blurred: bool) -> Picture:
        """A map of the regions that raise a label's score; one at a time, for it loads a model.

        Args:
            label: as :func:`vlmflow.explain.draw_heatmap` takes it.

        Raises:
            VlmflowError: there can be none.
        """
        from vlmflow.explain import draw_heatmap, evidence_of

        key = (row["image_id"], row["content_hash"], row["policy_digest"], label, blurred)

        def make() -> Picture:
            _, picture = draw_heatmap(job, evidence_of(row), label=label, show_flagged=not blurred)
            sink = io.BytesIO()
            picture.save(sink, "PNG")
            return Picture(sink.getvalue(), "image/png")

        made = self._made.get(key)
        if made is not None:
            return made
        return await run_sync(self._made.get_or_make, key, make, limiter=self._drawing)


def _host_of(place: Place) -> tuple[str, bool]:
    """Who is asked for an image: a host, a bucket, or the disk; apart from it, for rows of its Parquet files."""
    host = "/".join(place.locator.split("/", 3)[:3]).lower() if "://" in place.locator else ""
    return host, place.row is not None


def _share_of(place: Place) -> int:
    return _READ_OF_A_HOST if place.row is None else _READ_OF_PARQUET


def why_unread(row: Mapping[str, Any]) -> str:
    """Why a row has no content: a sentence with the class of its first error, without a full stop."""
    found = row["errors"] or []
    return f"It could not be read: {found[0]['class']}" if found else "It could not be read"


def placeholder(reason: str) -> Picture:
    """A grey square that says why there is no picture."""
    words, lines = printable(sentence(reason)).split()[:24], [""]
    for word in words:
        if len(lines[-1]) + len(word) > 26 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word[:26]}".strip()
    texts = "".join(
        f'<text x="128" y="{120 + 20 * (number - len(lines[:6]) / 2)}" text-anchor="middle">{escape(line)}</text>'
        for number, line in enumerate(lines[:6])
    )
    data = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256" width="256" height="256">'
        '<rect width="256" height="256" fill="#e9ebee"/>'
        f'<g font-family="sans-serif" font-size="15" fill="#44484e">{texts}</g></svg>'
    )
    return Picture(data.encode("utf-8"), "image/svg+xml")


def _fitted(row: Mapping[str, Any], side: int) -> tuple[int, int]:
    """Width and height of the picture, in the image's own shape."""
    width, height = row["width"] or 1, row["height"] or 1
    share = min(_MAX_SHARE, max(1 / _MAX_SHARE, width / height))
    return (side, max(1, round(side / share))) if share >= 1 else (max(1, round(side * share)), side)
