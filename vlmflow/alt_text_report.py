"""The alternative texts of a catalog that a person should write or look at: those that break a rule.

The rules of one image were applied when its row was written. That two images share a text can only be seen in the whole
catalog, and changes with every image that comes or goes, so it is found here and stored nowhere: by a first pass that
keeps a digest of each text, and a second one that keeps the rows which break a rule.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KeyIndex, concat, to_words
from vlmflow.catalog.masks import Mask, is_valid
from vlmflow.catalog.read import image_batches
from vlmflow.catalog.where import check_where, mask_where
from vlmflow.config import CatalogConfig, Frozen

DUPLICATE = "duplicate"
_TEXT_COLUMNS = ["content_hash", "alt_text"]
_COLUMNS = ["image_id", "uri", "alt_text_rule", "alt_text", "caption"]
_SLICE_ROWS = 4_096  # that become Python objects at a time


class AltText(Frozen):
    """An image whose alternative text breaks a rule.

    Attributes:
        rule: one of :data:`vlmflow.alt_text.RULES`, or `duplicate`: an image with other bytes has the same text.
    """

    image_id: str
    uri: str
    rule: str
    alt_text: str | None
    caption: str | None


class AltTextReport(Frozen):
    """How the alternative texts of a catalog stand.

    Attributes:
        num_images: rows looked at.
        num_without: of these, rows without an alternative text and without a rule that says why: without a caption, or
            of an older version and not listed by a run since.
        rules: images by the rule that they break.
        broken: in the order of rules and texts, so that duplicates stand together.
    """

    catalog: str
    num_images: int
    num_without: int
    rules: dict[str, int]
    broken: tuple[AltText, ...]


@dataclass(frozen=True)
class BrokenAltTexts:
    """What an :class:`AltTextReport` says, with the texts as Arrow rows: they may be millions.

    Attributes:
        counts: the report, with no texts.
        rows: the columns of :class:`AltText`, in its order.
    """

    counts: AltTextReport
    rows: pa.Table

    def texts(self) -> Iterator[dict[str, Any]]:
        """The rows one by one."""
        for batch in self.rows.to_batches(_SLICE_ROWS):
            yield from batch.to_pylist()

    def examples(self, per_rule: int) -> Iterator[AltText]:
        """The first rows of each rule."""
        for rule in sorted(self.counts.rules):
            some = self.rows.filter(pc.equal(self.rows["rule"], rule)).slice(0, per_rule)
            yield from (AltText(**row) for row in some.to_pylist())

    def as_json(self) -> Iterator[str]:
        """The whole report as JSON, in pieces."""
        yield f"{self.counts.model_dump_json(exclude={'broken'})[:-1]}," + '"broken":['
        for number, batch in enumerate(self.rows.to_batches(_SLICE_ROWS)):
            rows = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in batch.to_pylist())
            yield ("," if number else "") + ",".join(rows)
        yield "]}"


def find_alt_texts(catalog: CatalogConfig, *, where: str | None = None) -> AltTextReport:
    """Lists the images whose alternative text breaks a rule.

    Args:
        where: a condition in SQL: other rows are left out, also as what a text may not repeat.

    Raises:
        ConfigError: the condition cannot be used.
        CatalogError: there is no catalog.
    """
    found = broken_alt_texts(catalog, where=where)
    return found.counts.model_copy(update={"broken": tuple(AltText(**row) for row in found.texts())})


def broken_alt_texts(catalog: CatalogConfig, *, where: str | None = None) -> BrokenAltTexts:
    """Finds what :func:`find_alt_texts` lists, for any number of images: 24 bytes of each are kept, and the rows found.

    Raises:
        ConfigError, CatalogError: as there.
    """
    opened = Catalog.open(catalog)
    folder, images = Folder(catalog), opened.newest_images  # one version for both passes
    if where is not None:
        check_where(where, images.schema)
    texts = _Texts()
    masks: list[Mask | None] = []
    for rows in image_batches(folder, images, None if where else _TEXT_COLUMNS):
        masks.append(None if where is None or not rows.num_rows else mask_where(rows, where))
        texts.add(_kept(rows, masks[-1]))
    shared = texts.shared()
    num_images = num_without = 0
    found = []
    for rows, mask in zip(image_batches(folder, images, _COLUMNS), masks, strict=True):
        rows = _kept(rows, mask)
        num_images += rows.num_rows
        num_without += int((~is_valid(rows["alt_text"]) & ~is_valid(rows["alt_text_rule"])).sum())
        alone = is_valid(rows["alt_text_rule"]) | (shared.find(*to_words(_text_digests(rows))) < 0)
        rule = pc.if_else(pa.array(alone), rows["alt_text_rule"].combine_chunks(), DUPLICATE)
        found.append(rows.append_column("rule", rule).filter(pc.is_valid(rule)).select([*AltText.model_fields]))
    broken = pa.concat_tables(found).sort_by([("rule", "ascending"), ("alt_text", "ascending"), ("uri", "ascending")])
    counted = broken["rule"].value_counts().to_pylist()
    counts = Counter({entry["values"]: entry["counts"] for entry in counted})
    report = AltTextReport(
        catalog=opened.uri,
        num_images=num_images,
        num_without=num_without,
        rules=dict(counts.most_common()),
        broken=(),
    )
    return BrokenAltTexts(report, broken)


class _Texts:
    """Digests of the texts of images, each with 64 bits of that of the bytes that it is of."""

    def __init__(self) -> None:
        self._texts: list[pa.FixedSizeBinaryArray] = []
        self._bytes: list[NDArray[np.uint64]] = []

    def add(self, rows: pa.Table) -> None:
        rows = rows.filter(pc.and_(pc.is_valid(rows["alt_text"]), pc.is_valid(rows["content_hash"])))
        self._texts.append(_text_digests(rows))
        self._bytes.append(to_words(_digests(rows["content_hash"]))[0])

    def shared(self) -> KeyIndex:
        """The texts that images with different bytes have."""
        high, low = to_words(concat(self._texts))
        content = np.concatenate(self._bytes)
        order = np.lexsort((content, low, high))
        high, low, content = high[order], low[order], content[order]
        several = (high[1:] == high[:-1]) & (low[1:] == low[:-1]) & (content[1:] != content[:-1])
        return KeyIndex(high[1:][several], low[1:][several], np.zeros(int(several.sum()), np.int64))


def _kept(rows: pa.Table, mask: Mask | None) -> pa.Table:
    return rows if mask is None else rows.filter(pa.array(mask))


def _text_digests(rows: pa.Table) -> pa.FixedSizeBinaryArray:
    """Of the alternative texts, whatever the case of their letters."""
    return _digests(pc.utf8_lower(rows["alt_text"]))


def _digests(texts: pa.ChunkedArray) -> pa.FixedSizeBinaryArray:
    """16 bytes of each text; of null those of no text."""
    digests = [
        bytes(16) if text is None else blake2b(text.encode("utf-8"), digest_size=16).digest()
        for text in texts.to_pylist()
    ]
    return pa.array(digests, schema.KEY)
