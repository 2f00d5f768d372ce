"""Counts, score distributions and examples of every label."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog.masks import explode
from vlmflow.moderation.decide import DECISIONS

NUM_BINS = 20
# In the precision that scores and thresholds have: in another, 0.9 lies before the bar that begins there.
_EDGES = (np.arange(NUM_BINS + 1) / NUM_BINS).astype(np.float32)
Counts = NDArray[np.int64]


def histogram(values: NDArray[np.floating]) -> Counts:
    """(NUM_BINS,) how many values lie in each twentieth of [0, 1]; NaN counts nowhere."""
    held = values[~np.isnan(values)].astype(np.float32)
    bins = np.clip(np.searchsorted(_EDGES, held, side="right") - 1, 0, NUM_BINS - 1)
    return np.bincount(bins, minlength=NUM_BINS).astype(np.int64)


def _no_counts() -> Counts:
    return np.zeros(NUM_BINS, np.int64)


@dataclass
class LabelFacts:
    """One label over the whole catalog.

    Attributes:
        reviews, blocks: the thresholds that rows have; several where policies, or prompts and detectors, differ. None:
            no such threshold.
        counts: (NUM_BINS,) its scores, of each row the highest.
        calibrated: whether these are probabilities; both where rows differ.
        examples: the rows with its highest scores, with the score as last column ``value``.
    """

    num_scored: int = 0
    num_unscored: int = 0
    num_review: int = 0
    num_block: int = 0
    reviews: set[float | None] = field(default_factory=set)
    blocks: set[float | None] = field(default_factory=set)
    counts: Counts = field(default_factory=_no_counts)
    calibrated: set[bool] = field(default_factory=set)
    examples: pa.Table | None = None

    @property
    def num_flagged(self) -> int:
        """Rows in which the label is not allowed."""
        return self.num_review + self.num_block


class Labels:
    """Looks at the labels of rows, table by table.

    Args:
        num_examples: rows to keep of each label.
    """

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples
        self.facts: dict[str, LabelFacts] = {}

    def add(self, rows: pa.Table) -> None:
        """Counts the labels of some rows."""
        places, items = explode(rows["labels"])
        if not len(items):
            return
        names = pc.binary_join_element_wise(
            *(pc.fill_null(pc.struct_field(items, part), "") for part in ("category", "label")), "/"
        )
        coded = pc.dictionary_encode(names)
        codes = coded.indices.to_numpy()
        values = pc.coalesce(pc.struct_field(items, "probability"), pc.struct_field(items, "score"))
        decisions = pc.index_in(pc.struct_field(items, "decision"), pa.array(DECISIONS))
        # A row counts once for a label, by the gravest and the highest that prompts and detectors say of it.
        pairs, at = np.unique(places * len(coded.dictionary) + codes, return_inverse=True)
        scores, gravest = np.full(len(pairs), np.nan), np.zeros(len(pairs), np.int64)
        np.fmax.at(scores, at, values.to_numpy(zero_copy_only=False).astype(np.float64))
        np.maximum.at(gravest, at, pc.fill_null(decisions, 0).to_numpy(zero_copy_only=False))
        places, codes = pairs // len(coded.dictionary), pairs % len(coded.dictionary)
        order = np.lexsort((places, -scores, codes))  # NaN comes last within its label
        starts = np.searchsorted(codes[order], np.arange(len(coded.dictionary) + 1))
        for code, name in enumerate(coded.dictionary.to_pylist()):
            here = order[starts[code] : starts[code + 1]]
            facts = self.facts.setdefault(name, LabelFacts())
            num_unscored = int(np.isnan(scores[here]).sum())
            facts.num_scored += len(here) - num_unscored
            facts.num_unscored += num_unscored
            facts.num_review += int((gravest[here] == DECISIONS.index("review")).sum())
            facts.num_block += int((gravest[here] == DECISIONS.index("block")).sum())
            facts.counts += histogram(scores[here])
            best = here[: len(here) - num_unscored][: self._num_examples]
            self._keep(facts, rows.take(pa.array(places[best])), scores[best])
        self._note_scales(names, items)

    def _note_scales(self, names: pa.Array, items: pa.StructArray) -> None:
        """Notes what scores are compared with, and whether they are probabilities."""
        probability, score = pc.struct_field(items, "probability"), pc.struct_field(items, "score")
        calibrated = pc.if_else(pc.is_valid(score), pc.is_valid(probability), pa.scalar(None, pa.bool_()))
        scales = pa.table(
            {
                "label": names,
                "review": pc.struct_field(items, "review_threshold"),
                "block": pc.struct_field(items, "block_threshold"),
                "calibrated": calibrated,
            }
        )
        for scale in scales.group_by(scales.column_names).aggregate([]).to_pylist():
            facts = self.facts[scale["label"]]
            facts.reviews.add(scale["review"])
            facts.blocks.add(scale["block"])
            if scale["calibrated"] is not None:
                facts.calibrated.add(scale["calibrated"])

    def _keep(self, facts: LabelFacts, rows: pa.Table, scores: NDArray[np.float64]) -> None:
        found = rows.append_column("value", pa.array(scores))
        if facts.examples is not None:
            found = pa.concat_tables([facts.examples, found])
        facts.examples = found.sort_by([("value", "descending"), ("image_id", "ascending")]).slice(
            0, self._num_examples
        )
