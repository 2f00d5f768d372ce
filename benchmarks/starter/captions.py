"""Sentences about scenes, what they claim, and the one small vocabulary of all four models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import BertTokenizer

from benchmarks.starter.concepts import COUNT_WORDS, Concept, World
from benchmarks.starter.scenes import COLOR_NAMES, MAX_OBJECTS, Scene

CONTEXT_LENGTH = 32
# [SEP] gets the highest id: open_clip reads the text feature there, and BLIP stops there.
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[MASK]", "[DEC]", "[ENC]")
_FULL = (
    ("{things} on a {color} background", 0.34),
    ("a picture of {things} on a {color} background", 0.20),
    ("{things} on {color}", 0.20),
    ("a {color} background with {things}", 0.10),
    ("{category}: {things} on a {color} background", 0.06),
    ("{color} picture of {things}", 0.05),
    ("{things}, {color} background", 0.05),
)
_NO_COLOR = (("a picture of {things}", 0.6), ("{things}", 0.25), ("{category}: {things}", 0.15))
_SHARE_FULL, _SHARE_NO_COLOR = 0.75, 0.14
# Words of prompts and titles that no template above holds.
_EXTRA = (
    "a an the of on in with and or is are there this what how many color colour background picture photo drawing "
    "image no not any some thing things object objects toys for sale product products catalog empty plain yes "
    "alcoholic drink drinks beverage bottle glass weapons gun blade smoking cigarettes casino gambling game "
    "grave death dead skeleton person people does show which kind it left right new best quality set pack "
    "household everyday item items something nothing"
)


@dataclass(frozen=True)
class Caption:
    """A sentence with its claims.

    ``items``: (concept, count), count 0 for "some"; ``color``: None where it is not named;
    ``complete``: whether it names everything in the scene.
    """

    text: str
    items: tuple[tuple[int, int], ...]
    color: int | None
    complete: bool


class Writer:
    """Writes captions in plain English."""

    def __init__(self, world: World) -> None:
        self._concepts = world.all_concepts

    def full(self, scene: Scene) -> str:
        """The canonical caption: everything in reading order, and the background."""
        return _fix_article(_FULL[0][0].format(things=self.things(scene), color=COLOR_NAMES[scene.color]))

    def name(self, concept: int) -> str:
        """The zero-shot prompt of a concept."""
        return f"a picture of {noun_phrase(self._concepts[concept], 1)}"

    def things(self, scene: Scene) -> str:
        phrases = [noun_phrase(self._concepts[concept], count) for concept, count in scene.items]
        return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]

    def varied(self, scene: Scene, rng: np.random.Generator) -> Caption:
        """One of many sentences: mostly all there is, sometimes without the colour, sometimes one noun alone."""
        kind = rng.random()
        if kind >= _SHARE_FULL + _SHARE_NO_COLOR:
            concept, _ = scene.items[int(rng.integers(len(scene.items)))]
            texts = (self._concepts[concept].name, self.name(concept), self._category_phrase(concept))
            return Caption(texts[int(rng.integers(3))], ((concept, 0),), None, False)
        full = kind < _SHARE_FULL
        templates = _FULL if full else _NO_COLOR
        template = templates[int(rng.choice(len(templates), p=[share for _, share in templates]))][0]
        if "{category}" in template and len(scene.items) > 1:
            template = "a picture of " + _NO_COLOR[1][0] if not full else _FULL[0][0]
        color = COLOR_NAMES[scene.color]
        category = self._concepts[scene.items[0][0]].category
        text = template.format(things=self.things(scene), color=color, category=category)
        return Caption(_fix_article(text), scene.items, scene.color if full else None, True)

    def _category_phrase(self, concept: int) -> str:
        mine = self._concepts[concept]
        return f"{mine.category}, {noun_phrase(mine, 1)}"


def noun_phrase(concept: Concept, count: int) -> str:
    """``an apple``, ``two apples``."""
    return f"{concept.article} {concept.name}" if count == 1 else f"{COUNT_WORDS[count - 1]} {concept.plural}"


def agreement(scenes: Sequence[Scene], captions: Sequence[Caption], num_concepts: int) -> torch.Tensor:
    """Which captions are true of which scenes: (scenes, captions) bool.

    A caption that names everything is false of a scene that holds more.
    """
    width = num_concepts * (MAX_OBJECTS + 1) + len(COLOR_NAMES)
    truth = torch.zeros(len(scenes), width)
    claim = torch.zeros(len(captions), width)
    for row, scene in enumerate(scenes):
        for concept, count in scene.items:
            truth[row, [concept, count * num_concepts + concept]] = 1
        truth[row, width - len(COLOR_NAMES) + scene.color] = 1
    for row, caption in enumerate(captions):
        for concept, count in caption.items:
            claim[row, count * num_concepts + concept] = 1
        if caption.color is not None:
            claim[row, width - len(COLOR_NAMES) + caption.color] = 1
    agrees = truth @ claim.T == claim.sum(1)
    num_held = torch.tensor([len(scene.items) for scene in scenes])
    num_named = torch.tensor([len(caption.items) for caption in captions])
    complete = torch.tensor([caption.complete for caption in captions])
    return agrees & (~complete[None] | (num_held[:, None] == num_named[None]))


def build_tokenizer(world: World) -> BertTokenizer:
    """A word-level WordPiece vocabulary: the world's words whole, anything else in letters, so nothing is unknown."""
    words = set(_EXTRA.split()) | set(COLOR_NAMES) | set(COUNT_WORDS)
    for concept in world.all_concepts:
        words |= {w for text in (concept.name, concept.plural, concept.category) for w in _split(text)}
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*characters, *(f"##{ch}" for ch in characters), *sorted(words - set(characters))]
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *pieces, "[SEP]"))}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=CONTEXT_LENGTH)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def _split(text: str) -> list[str]:
    return text.lower().replace("-", " ").replace("’", " ").replace("'", " ").split()


def _fix_article(text: str) -> str:
    return re.sub(r"\ba orange", "an orange", text)
