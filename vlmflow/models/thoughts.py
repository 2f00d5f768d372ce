"""Models that think before they answer: what they say of an image begins where the thought ends."""

from __future__ import annotations

import re
from typing import Any

import torch

# By which a thought begins and ends: of Qwen, GLM, DeepSeek and most others; of Mistral; of Kimi; of Gemma 4.
_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>", "<channel|>"),
)
# What the GLM family frames its answers with.
_FRAMES = ("<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>")
# Of chat templates, which know one of them or none: a thought may fill all the tokens that a text may have.
NO_THOUGHT = {"enable_thinking": False, "thinking": False}


def without_thought(text: str) -> str:
    """What a text says after its thought; nothing, if it ends within that."""
    for begin, end in _MARKS:
        text = text.rpartition(end)[2].partition(begin)[0]
    for frame in _FRAMES:
        text = text.replace(frame, "")
    return text


def ends_in_thought(text: str) -> bool:
    """Whether a text ends before its thought does."""
    return any(begin in text.rpartition(end)[2] for begin, end in _MARKS)


def no_thought(template: object) -> dict[str, bool]:
    """Of :data:`NO_THOUGHT` what a chat template reads: transformers warns of all else.

    Args:
        template: its source, or several by name.
    """
    # As a variable, neither in quotes nor of something: `message.thinking` is what was thought before.
    return {
        name: off for name, off in NO_THOUGHT.items() if re.search(rf"(?<![.\w'\"]){name}(?![\w'\"])", str(template))
    }


def begins_thought(prompt: str) -> bool:
    """Whether a prompt ends with the beginning of a thought, which the model goes on with."""
    return prompt.rstrip().endswith(tuple(begin for begin, _ in _MARKS))


class ThoughtTokens:
    """Finds thoughts among tokens, where marks are special tokens that no text shows. N: texts, T: tokens."""

    def __init__(self, tokenizer: Any) -> None:
        vocab = tokenizer.get_vocab()
        self._begins, self._ends = (
            [vocab[mark] for mark in marks if mark in vocab] for marks in zip(*_MARKS, strict=True)
        )

    def find(self, tokens: torch.Tensor, has_begun: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are of a thought.

        Args:
            tokens: (N, T) that were written.
            has_begun: (N,) bool, whether the prompt ends within a thought.

        Returns:
            (N, T) bool, up to the end of the last thought that ends, marks included; (N, T) bool, of one that does not.
        """
        is_end = self._are(tokens, self._ends)
        ended = is_end.flip(1).cumsum(dim=1).flip(1) > 0
        begun = (self._are(tokens, self._begins) & ~ended).cumsum(dim=1) > 0
        return ended, begun | (has_begun & ~is_end.any(dim=1))[:, None]

    @staticmethod
    def _are(tokens: torch.Tensor, marks: list[int]) -> torch.Tensor:
        return torch.isin(tokens, torch.tensor(marks, dtype=tokens.dtype, device=tokens.device))
