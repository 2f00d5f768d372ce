"""The alternative texts of a catalog that a person should write or look at: those that break a rule.

The rules of one image were applied when its row was written. That two images share a text can only be seen in the whole
catalog, and changes with every image that comes or goes, so it is found here and stored nowhere.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.catalog import Catalog
from vlmflow.catalog.where import check_where, mask_where
from vlmflow.config import CatalogConfig, Frozen

DUPLICATE = "duplicate"
_COLUMNS = ["image_id", "uri", "content_hash", "caption", "alt_text", "alt_text_rule"]


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
        num_without: of these, rows without a caption.
        rules: images by the rule that they break.
        broken: in the order of rules and texts, so that duplicates stand together.
    """

    catalog: str
    num_images: int
    num_without: int
    rules: dict[str, int]
    broken: tuple[AltText, ...]


def find_alt_texts(catalog: CatalogConfig, *, where: str | None = None) -> AltTextReport:
    """Lists the images whose alternative text breaks a rule.

    Args:
        where: a condition in SQL: other rows are left out, also as what a text may not repeat.

    Raises:
        ConfigError: the condition cannot be used.
        CatalogError: there is no catalog.
    """
    opened = Catalog.open(catalog)
    if where is not None:
        check_where(where, opened.newest_images.schema)
    parts = []
    for rows in opened.image_batches(None if where else _COLUMNS):
        kept = rows if where is None or not rows.num_rows else rows.filter(pa.array(mask_where(rows, where)))
        parts.append(kept.select(_COLUMNS))
    rows = pa.concat_tables(parts)
    rules = pc.if_else(
        pc.and_(pc.is_null(rows["alt_text_rule"]), _shared(rows)), pa.scalar(DUPLICATE), rows["alt_text_rule"]
    )
    rows = rows.append_column("rule", rules)
    broken = rows.filter(pc.is_valid(rows["rule"])).sort_by(
        [("rule", "ascending"), ("alt_text", "ascending"), ("uri", "ascending")]
    )
    found = tuple(AltText(**row) for row in broken.select(list(AltText.model_fields)).to_pylist())
    return AltTextReport(
        catalog=opened.uri,
        num_images=rows.num_rows,
        num_without=rows["caption"].null_count,
        rules=dict(Counter(text.rule for text in found).most_common()),
        broken=found,
    )


def _shared(rows: pa.Table) -> pa.ChunkedArray:
    """Rows whose text an image with other bytes has too, whatever the case of its letters."""
    texts = pa.table({"text": pc.utf8_lower(rows["alt_text"]), "hash": rows["content_hash"]})
    counted = texts.filter(pc.is_valid(texts["text"])).group_by("text").aggregate([("hash", "count_distinct")])
    several = counted.filter(pc.greater(counted["hash_count_distinct"], 1))["text"]
    return pc.fill_null(pc.is_in(texts["text"], value_set=several.combine_chunks()), False)
