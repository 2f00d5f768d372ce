"""A look at the logits that a text is written by, where transformers writes it."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList


class NumberCheck:
    """Whether all logits were numbers, step for step; without waiting for the device between the steps.

    Broken weights, or a product that overflows, make logits that are none: tokens are chosen by those all the same.
    """

    def __init__(self) -> None:
        self._broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See ``LogitsProcessor`` of transformers; the scores go on as they came."""
        found = scores.isnan().any()
        self._broken = found if self._broken is None else self._broken | found
        return scores

    def as_list(self) -> LogitsProcessorList:
        """As ``generate`` takes it."""
        return LogitsProcessorList([self])

    def check(self) -> None:
        """Once the text is written.

        Raises:
            ValueError: some were not.
        """
        if self._broken is not None and bool(self._broken):
            raise ValueError("the model gave logits that are not numbers")
