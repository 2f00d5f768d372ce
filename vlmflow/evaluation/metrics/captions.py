"""BLEU, ROUGE-L and CIDEr of captions, with the conventions of the COCO caption scorer: several references an image.

Every function takes words, as :func:`vlmflow.evaluation.metrics.ptb.tokenize` makes them, and gives what that scorer
(Chen et al. 2015, arXiv:1504.00325) gives for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Words: TypeAlias = Sequence[str]
_Grams: TypeAlias = Counter[tuple[str, ...]]

_MAX_ORDER = 4
# The scorer's guards against division by zero: a caption without words, or without common n-grams, scores near zero.
_SMALL, _TINY = 1e-9, 1e-15
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002), against the closest reference length.

    Args:
        references: of each candidate, one at least.

    Returns:
        Four values in [0, 1].
    """
    matched, total = np.zeros(_MAX_ORDER), np.zeros(_MAX_ORDER)
    candidate_length = reference_length = 0
    for candidate, several in zip(candidates, references, strict=True):
        most: _Grams = Counter()
        for reference in several:
            most |= _grams(reference)
        for gram, count in _grams(candidate).items():
            matched[len(gram) - 1] += min(count, most[gram])
        total += [max(0, len(candidate) - order) for order in range(_MAX_ORDER)]
        candidate_length += len(candidate)
        reference_length += min((abs(len(reference) - len(candidate)), len(reference)) for reference in several)[1]
    precisions = (matched + _TINY) / (total + _SMALL)
    ratio = (candidate_length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(np.prod(precisions[:order]) ** (1 / order)) * brevity for order in range(1, _MAX_ORDER + 1)]


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """ROUGE-L (Lin 2004): F of the longest common subsequence, by the best precision and the best recall; the mean."""
    return float(np.mean([_rouge_l(one, several) for one, several in zip(candidates, references, strict=True)]))


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726), in [0, 10]; the scorer calls it CIDEr.

    Its weights come from the references of the whole corpus: of one image alone it is 0.
    """
    return float(np.mean(cider_each(candidates, references)))


def cider_each(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each image."""
    counted = [[_grams(reference) for reference in several] for several in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for several in counted:
        frequency.update(set().union(*several))
    log_images = math.log(len(counted))
    scores = []
    for candidate, several in zip(candidates, counted, strict=True):
        mine = _Weighted(_grams(candidate), frequency, log_images)
        similar = [mine.similarity(_Weighted(reference, frequency, log_images)) for reference in several]
        scores.append(10 * float(np.mean(similar)))
    return scores


class _Weighted:
    """The n-grams of a sentence, weighted by how rare they are."""

    def __init__(self, counts: _Grams, frequency: _Grams, log_images: float) -> None:
        self._weights = {
            gram: count * (log_images - math.log(max(1, frequency[gram]))) for gram, count in counts.items()
        }
        squares = np.zeros(_MAX_ORDER)
        for gram, weight in self._weights.items():
            squares[len(gram) - 1] += weight**2
        self._norms = np.sqrt(squares)
        self._length = sum(count for gram, count in counts.items() if len(gram) == 2)  # pairs, as the scorer counts

    def similarity(self, other: _Weighted) -> float:
        """In [0, 1]: the cosine with the weights clipped to the other's, less for other lengths; mean over orders."""
        products = np.zeros(_MAX_ORDER)
        for gram, weight in self._weights.items():
            theirs = other._weights.get(gram, 0.0)
            products[len(gram) - 1] += min(weight, theirs) * theirs
        norms = self._norms * other._norms
        cosines = np.divide(products, norms, out=products, where=norms > 0)
        penalty = math.exp(-((self._length - other._length) ** 2) / (2 * _CIDER_SIGMA**2))
        return float(cosines.mean()) * penalty


def _grams(words: Words) -> _Grams:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, _MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def _rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    # The scorer splits at blanks: a sentence without words is one empty word to it.
    own = list(candidate) or [""]
    common = [(_longest_common(own, list(other) or [""]), len(other) or 1) for other in references]
    precision = max(length / len(own) for length, _ in common)
    recall = max(length / num for length, num in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _longest_common(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for at, candidate in enumerate(other, 1):
            above = row[at]
            row[at] = diagonal + 1 if word == candidate else max(above, row[at - 1])
            diagonal = above
    return row[-1]
