"""One pass over the images table, file by file: counts, distributions, and the rows worth showing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import KeyIndex, index_of, to_binary, to_words
from vlmflow.catalog.masks import as_mask, equal, is_valid
from vlmflow.catalog.rows import POLICY_COLUMNS, add_counts, error_classes, policy_names
from vlmflow.report.labels import Counts, LabelFacts, Labels, histogram
from vlmflow.report.rows import COLUMNS, Pick, Row, as_row

# How many rows the page shows of each set at most; the page says so.
NUM_NEW = 120
NUM_LOWEST = 48
NUM_PER_LABEL = 6
NUM_FAILED = 100
NUM_SAMPLED = 1_000
MATCHES = ("caption_itm", "text_itm")
# Of these the first that any row has ranks the rows whose text fits least.
_RANKS = ("text_itm", "caption_itm", "text_itc", "caption_itc")


@dataclass
class Facts:
    """What the page says of a catalog.

    Attributes:
        num_of_run: live rows that the run was the last to write.
        num_new: of these, rows that are flagged and were not before.
        reasons: flagged rows by what decided.
        matches: (NUM_BINS,) distribution of each match score; those that no row has are absent.
        lowest_by: the match score that ``lowest`` is ranked by, a cosine where no row has others; None: none has any.
        num_ranked: rows that have that score.
        rows: everything shown, by image id.
        examples: for each label, the ids of the rows with its highest scores, and these.
    """

    version: int
    num_images: int = 0
    num_of_run: int = 0
    num_new: int = 0
    num_failed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    policies: Counter[str] = field(default_factory=Counter)
    matches: dict[str, Counts] = field(default_factory=dict)
    lowest_by: str | None = None
    num_ranked: int = 0
    labels: dict[str, LabelFacts] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    lowest: list[str] = field(default_factory=list)
    examples: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    @property
    def has_cosines_alone(self) -> bool:
        """Whether texts were matched by models without a matching head, and by no other."""
        return self.lowest_by in ("text_itc", "caption_itc")


def collect(
    catalog: Catalog, run_id: str | None, *, flagged_before: KeyIndex | None = None, wanted: Sequence[str] = ()
) -> Facts:
    """Reads the catalog once.

    Args:
        run_id: the run whose rows count as new; None: none do.
        flagged_before: images that were flagged before the run; None: not known, as if there were none.
        wanted: ids of further images to show, such as duplicates.
    """
    facts = Facts(version=catalog.version)
    before = index_of(pa.array([], schema.KEY)) if flagged_before is None else flagged_before
    texts = [field.name for field in catalog.source_columns if pt.is_string(field.type)]
    new = Pick(NUM_NEW, ("decision", "ascending"))  # block comes before review
    lowest = {name: Pick(NUM_LOWEST, (name, "ascending")) for name in _RANKS}
    failed, sample, others = Pick(NUM_FAILED), Pick(NUM_SAMPLED), Pick(max(1, len(wanted)))
    labels = Labels(NUM_PER_LABEL)
    columns = [*COLUMNS, *POLICY_COLUMNS, *(["source"] if texts else [])]
    ids = pa.array(wanted, pa.string())
    for rows in catalog.image_batches(columns):
        _count(facts, rows)
        labels.add(rows)
        of_run = equal(rows["run_id"], run_id or "")
        facts.num_of_run += int(of_run.sum())
        flagged = rows.filter(pa.array(of_run & ~equal(rows["decision"], "allow")))
        known = before.find(*to_words(to_binary(flagged["image_id"]))) >= 0
        new.add(flagged.filter(pa.array(~known)))
        for name, pick in lowest.items():
            pick.add(rows.filter(pa.array(is_valid(rows[name]))))
        failed.add(rows.filter(pa.array(~equal(rows["status"], "ok"))))
        sample.add(rows)
        others.add(rows.filter(pc.is_in(rows["image_id"], ids)))
    facts.num_new, facts.num_failed = new.num_seen, failed.num_seen
    facts.lowest_by = next((name for name in _RANKS if lowest[name].num_seen), None)
    facts.new = _show(facts, new, "new", texts)
    if facts.lowest_by:
        facts.num_ranked = lowest[facts.lowest_by].num_seen
        facts.lowest = _show(facts, lowest[facts.lowest_by], "lowest", texts)
    _show(facts, failed, "failed", texts)
    _show(facts, others, "duplicate", texts)
    facts.labels = labels.facts
    for name, label in labels.facts.items():
        found = [] if label.examples is None else label.examples.to_pylist()
        facts.examples[name] = [(row["image_id"], row["value"]) for row in found]
        for row in found:
            facts.rows.setdefault(row["image_id"], as_row(row, texts)).sets.add("label")
    _show(facts, sample, "sample", texts)
    return facts


def _count(facts: Facts, rows: pa.Table) -> None:
    facts.num_images += rows.num_rows
    add_counts(facts.statuses, rows["status"])
    add_counts(facts.decisions, rows["decision"])
    flagged = rows.filter(pa.array(as_mask(pc.not_equal(rows["decision"], "allow"))))
    add_counts(facts.reasons, pc.fill_null(flagged["decision_reason"], "no reason given"))
    add_counts(facts.errors, error_classes(rows["errors"])[1])
    add_counts(facts.policies, policy_names(rows))
    for name in MATCHES:
        scores = rows[name].drop_null().to_numpy()
        if len(scores):
            facts.matches[name] = facts.matches.get(name, 0) + histogram(scores.astype(np.float64))


def _show(facts: Facts, pick: Pick, name: str, texts: Sequence[str]) -> list[str]:
    """Puts what was picked on the page; gives the ids in order."""
    found = [] if pick.rows is None else pick.rows.to_pylist()
    for row in found:
        facts.rows.setdefault(row["image_id"], as_row(row, texts)).sets.add(name)
    return [row["image_id"] for row in found]
