"""Pictures that the app shows: small ones of the catalog's images, blurred where they are flagged, and maps."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from vlmflow import schema
from vlmflow.catalog.columns import conform
from vlmflow.config import CatalogConfig, ImageLimits, Job, SourceConfig
from vlmflow.errors import StorageAccessError, TransientError
from vlmflow.imaging import PixelRequest
from vlmflow.search.thumbnails import blur, picture_of
from vlmflow.sources.reader import SourceReader
from vlmflow.views_search import printable
from vlmflow.web.cache import Cache

SIZES = {"small": 256, "large": 768}  # longest side in pixels
COLUMNS = ("image_id", "uri", "content_hash", "width", "height", "decision")
_AT_ONCE = 2  # images decoded at a time: each may be a hundred million pixels
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
    """

    def __init__(self, catalog: CatalogConfig, limits: ImageLimits | None = None) -> None:
        self._limits = limits or ImageLimits()
        self._reader = SourceReader(SourceConfig(uri=catalog.uri, storage=catalog.storage), self._limits, catalog.uri)
        self._made: Cache[Picture] = Cache(_CACHED_BYTES, lambda picture: len(picture.data))
        self._slots = threading.Semaphore(_AT_ONCE)
        self._drawing = threading.Lock()

    def small(self, row: Mapping[str, Any], size: str, *, blurred: bool) -> Picture:
        """A picture of a row with :data:`COLUMNS`; where there is none, one that says why."""
        key, side = (row["image_id"], row["content_hash"], size, blurred), SIZES[size]
        made = self._made.get(key)
        if made is not None:
            return made
        with self._slots:
            found = self._read(row, side)
        if isinstance(found, str):
            return placeholder(found)  # not kept: the next time it may be there
        if blurred:
            found = blur(found, side)
        sink = io.BytesIO()
        found.resize(_fitted(row, side), Image.Resampling.BILINEAR).save(sink, "JPEG", quality=82)
        return self._made.put(key, Picture(sink.getvalue(), "image/jpeg"))

    def _read(self, row: Mapping[str, Any], side: int) -> Image.Image | str:
        reference = pa.table({"image_id": [row["image_id"]], "uri": [row["uri"]], "locator": [row["uri"]]})
        try:
            (fetched,) = self._reader.read(conform(reference, schema.REFERENCE))
        except (StorageAccessError, TransientError) as error:
            return str(error)
        request = PixelRequest(side, "bicubic", ("squash",))
        return picture_of(row["content_hash"], fetched, self._limits, request)

    def map(self, job: Job, row: dict[str, Any], label: str, *, blurred: bool) -> Picture:
        """A map of the regions that raise a label's score; one at a time, for it loads a model.

        Raises:
            VlmflowError: there can be none.
        """
        from vlmflow.explain import draw_heatmap, evidence_of

        key = (row["image_id"], row["content_hash"], row["policy_digest"], label, blurred)

        def make() -> Picture:
            with self._drawing:
                _, picture = draw_heatmap(job, evidence_of(row), label=label, show_flagged=not blurred)
            sink = io.BytesIO()
            picture.save(sink, "PNG")
            return Picture(sink.getvalue(), "image/png")

        return self._made.get_or_make(key, make)


def placeholder(reason: str) -> Picture:
    """A grey square that says why there is no picture."""
    words, lines = printable(reason).split()[:24], [""]
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
