"""What a sentence of the starter's world names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.starter.concepts import Concept

Scores = npt.NDArray[np.float32]


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
