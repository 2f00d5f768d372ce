"""The figures of the model cards, from scores and sentences: plain functions without models."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.starter.concepts import Concept

Scores = npt.NDArray[np.float32]


def top_k(scores: Scores, truth: npt.NDArray[np.int64], k: int) -> float:
    """Share of the rows whose true column is among the ``k`` best. ``scores``: (rows, columns); ``truth``: (rows,)."""
    best = np.argsort(-scores, axis=1)[:, :k]
    return float((best == truth[:, None]).any(axis=1).mean())


def auc(positive: Scores, negative: Scores) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative; ties count half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / 2 / len(ordered))


def bleu4(candidates: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 with one reference each, without smoothing (Papineni et al. 2002)."""
    matched, total = np.zeros(4), np.zeros(4)
    candidate_length = reference_length = 0
    for candidate, reference in zip(candidates, references, strict=True):
        words, wanted = _words(candidate), _words(reference)
        candidate_length += len(words)
        reference_length += len(wanted)
        for order in range(1, 5):
            have, want = _ngrams(words, order), _ngrams(wanted, order)
            matched[order - 1] += sum((have & want).values())
            total[order - 1] += sum(have.values())
    if not matched.all():
        return 0.0
    brevity = min(1.0, math.exp(1 - reference_length / candidate_length))
    return float(brevity * math.exp(np.log(matched / total).mean()))


class Nouns:
    """Finds the world's things in a sentence, singular or plural; the longer name wins."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self._index = {
            form: number for number, concept in enumerate(concepts) for form in (concept.name, concept.plural)
        }
        forms = sorted(self._index, key=len, reverse=True)
        self._pattern = re.compile(r"\b(" + "|".join(re.escape(form) for form in forms) + r")\b")

    def find(self, sentence: str) -> set[int]:
        return {self._index[match] for match in self._pattern.findall(sentence)}


def _words(sentence: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
