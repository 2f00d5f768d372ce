"""Rows whose text fits their image least, by the match score that `enrich` stored.

That is the probability of a matching head. Models that have none, such as CLIP and SigLIP, store a cosine, by which
texts are ranked as well (CLIPScore: Hessel et al. 2021, arXiv:2104.08718), those of one model among each other: of two
models cosines do not compare, nor with probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from numpy.typing import NDArray

from vlmflow.catalog.columns import source_columns
from vlmflow.catalog.keys import digest_of
from vlmflow.catalog.masks import Mask
from vlmflow.config import CatalogConfig, Frozen
from vlmflow.errors import ConfigError, SearchError
from vlmflow.search.live import LiveRows
from vlmflow.search.searcher import Searcher

_COLUMNS = ["image_id", "uri", "decision", "caption", "text_itm", "text_itc", "text_digest"]


class Title(Frozen):
    """A row and how well its text fits.

    Attributes:
        text: the caller's text that was scored; None: no column of the source holds it any more.
        text_itm: probability that text and image match, in [0, 1]; null where the model has no matching head.
        text_itc: cosine of text and image; null where it was not scored.
    """

    rank: int
    image_id: str
    uri: str
    decision: str
    text: str | None
    text_column: str | None
    caption: str | None
    text_itm: float | None
    text_itc: float | None


class TitleReport(Frozen):
    """The rows whose text fits least, the worst first.

    Attributes:
        ranked_by: the score; ``text_itc`` where no row has the other.
        num_scored: rows that are ranked.
        num_left_out: rows whose score does not compare with theirs: a cosine where the others have a probability, or of
            another model than most.
    """

    catalog: str
    images_version: int
    ranked_by: Literal["text_itm", "text_itc"] = "text_itm"
    num_scored: int
    num_left_out: int = 0
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
    found = _Scores.read(live)
    if np.isnan(found.itm).all() and np.isnan(found.itc).all():
        raise SearchError(
            f"no row of {catalog.uri} has a match score for a text",
            remedy="Run `vlmflow enrich --text-column NAME` with the task match.",
        )
    scores, ranked_by, num_left_out = found.comparable(wanted)
    order = np.argsort(scores, kind="stable")[: min(top_k, int((~np.isnan(scores)).sum()))]
    texts = [field.name for field in source_columns(live.columns) if pt.is_string(field.type)]
    names = [*_COLUMNS, *(["source"] if texts else [])]
    rows = live.take(order, names)
    return TitleReport(
        catalog=catalog.uri,
        images_version=live.version,
        ranked_by=ranked_by,
        num_left_out=num_left_out,
        num_scored=int((~np.isnan(scores)).sum()),
        titles=tuple(_titles(rows, texts)),
    )


@dataclass(frozen=True)
class _Scores:
    """Of all rows, (N,) each; not a number where there is none.

    Attributes:
        itm: probabilities.
        itc: cosines.
        models: by which model, as a number.
    """

    itm: NDArray[np.float32]
    itc: NDArray[np.float32]
    models: NDArray[np.int32]

    @classmethod
    def read(cls, live: LiveRows) -> _Scores:
        """Of the live rows."""
        itm, itc = (np.full(len(live), np.nan, np.float32) for _ in range(2))
        models, numbers = np.zeros(len(live), np.int32), dict[str | None, int]()
        for start, rows in live.read(["text_itm", "text_itc", "match_fingerprint"]):
            here = slice(start, start + rows.num_rows)
            itm[here], itc[here] = (rows[name].to_numpy() for name in ("text_itm", "text_itc"))  # nulls as such
            coded = rows["match_fingerprint"].combine_chunks().dictionary_encode(null_encoding="encode")
            known = [numbers.setdefault(name, len(numbers)) for name in coded.dictionary.to_pylist()]
            models[here] = np.array(known, np.int32)[coded.indices.to_numpy()]
        return cls(itm, itc, models)

    def comparable(self, wanted: Mask) -> tuple[NDArray[np.float32], Literal["text_itm", "text_itc"], int]:
        """The scores that compare with each other, by their name; and how many rows have others."""
        has_itm, has_itc = (wanted & ~np.isnan(values) for values in (self.itm, self.itc))
        num_scored = int((has_itm | has_itc).sum())
        if has_itm.any() or not has_itc.any():
            return np.where(has_itm, self.itm, np.nan), "text_itm", num_scored - int(has_itm.sum())
        most = np.bincount(self.models[has_itc]).argmax()
        ranked = has_itc & (self.models == most)
        return np.where(ranked, self.itc, np.nan), "text_itc", num_scored - int(ranked.sum())


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
