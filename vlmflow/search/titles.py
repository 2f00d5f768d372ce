"""Rows whose text fits their image least, by the match score that `enrich` stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from vlmflow.catalog.columns import source_columns
from vlmflow.catalog.keys import digest_of
from vlmflow.catalog.masks import is_valid
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.errors import ConfigError, SearchError
from vlmflow.search.searcher import Searcher

_COLUMNS = ["image_id", "uri", "decision", "caption", "text_itm", "text_itc", "text_digest"]


class Title(Frozen):
    """A row and how well its text fits.

    Attributes:
        text: the caller's text that was scored; None: no column of the source holds it any more.
        text_itm: probability that text and image match, in [0, 1].
        text_itc: cosine of text and image; null where it was not scored.
    """

    rank: int
    image_id: str
    uri: str
    decision: str
    text: str | None
    text_column: str | None
    caption: str | None
    text_itm: float
    text_itc: float | None


class TitleReport(Frozen):
    """The rows whose text fits least, the worst first."""

    catalog: str
    images_version: int
    num_scored: int
    titles: tuple[Title, ...] = ()


def find_titles(catalog: CatalogConfig, *, top_k: int = 50, where: str | None = None) -> TitleReport:
    """Ranks the rows of a catalog by how little the caller's text fits the image.

    Args:
        where: a condition in SQL; other rows are left out.

    Raises:
        ConfigError: the condition or the number cannot be used.
        SearchError: no row has a match score for a text.
        CatalogError: there is no catalog.
    """
    if not 1 <= top_k <= 1_000_000:
        raise ConfigError(f"top_k {top_k}", remedy="Ask for 1 to 1,000,000 rows.")
    live = Searcher(catalog).refresh()
    wanted = np.ones(len(live), np.bool_) if where is None else live.mask(where)
    scores = np.full(len(live), np.nan, np.float32)
    for start, rows in live.read(["image_id", "text_itm"]):
        scores[start : start + rows.num_rows] = np.where(
            is_valid(rows["text_itm"]), rows["text_itm"].to_numpy(), np.float32(np.nan)
        )
    if np.isnan(scores).all():
        raise SearchError(
            f"no row of {catalog.uri} has a match score for a text",
            remedy="Run `vlmflow enrich --text-column NAME` with the task match, and a model that has a matching head.",
        )
    scores[~wanted] = np.nan
    order = np.argsort(scores, kind="stable")[: min(top_k, int((~np.isnan(scores)).sum()))]
    texts = [field.name for field in source_columns(live.columns) if pt.is_string(field.type)]
    names = [*_COLUMNS, *(["source"] if texts else [])]
    rows = live.take(order, names)
    return TitleReport(
        catalog=catalog.uri,
        images_version=live.version,
        num_scored=int((~np.isnan(scores)).sum()),
        titles=tuple(_titles(rows, texts)),
    )


def _titles(rows: pa.Table, texts: list[str]) -> Iterator[Title]:
    for rank, row in enumerate(rows.to_pylist(), start=1):
        column = scored_column(row, texts)
        yield Title(
            rank=rank,
            text=None if column is None else row["source"][column],
            text_column=column,
            **{name: row[name] for name in Title.model_fields if name in row},
        )


def scored_column(row: Mapping[str, Any], texts: list[str]) -> str | None:
    """The column of the source whose text has the digest of what was scored: the row remembers no more than that."""
    source = row.get("source") or {}
    for name in texts:
        if source.get(name) is not None and digest_of(source[name]) == row["text_digest"]:
            return name
    return None
