"""Questions about scenes with one-word answers, for ViLT."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.starter.concepts import COUNT_WORDS, World
from benchmarks.starter.scenes import COLOR_NAMES, Scene

KINDS = ("what", "count", "color", "is there a thing", "is there a category")


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str


class Asker:
    """Asks about what a scene holds; yes and no are equally frequent."""

    def __init__(self, world: World) -> None:
        self._concepts = world.all_concepts
        self._trained = len(world.concepts)
        self._categories = sorted({concept.category for concept in world.concepts})
        self.answers: tuple[str, ...] = (
            "yes", "no", *COUNT_WORDS, *COLOR_NAMES, *(concept.name for concept in self._concepts),
        )  # fmt: skip

    def ask(self, scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
        """A question of that kind, or of any kind that the scene allows."""
        if kind is None:
            kind = KINDS[int(rng.choice(len(KINDS), p=(0.34, 0.18, 0.12, 0.2, 0.16)))]
        concept, count = scene.items[int(rng.integers(len(scene.items)))]
        mine = self._concepts[concept]
        if kind == "color":
            return Question("what color is the background?", COLOR_NAMES[scene.color], kind)
        if kind == "count":
            return Question(f"how many {mine.plural} are there?", COUNT_WORDS[count - 1], kind)
        if kind == "what" and len(scene.items) == 1:
            return Question("what is in the picture?", mine.name, kind)
        if kind == "is there a category":
            return self._category_question(scene, rng)
        present = {index for index, _ in scene.items}
        if rng.random() < 0.5:
            absent = [c for c in range(self._trained) if c not in present]
            alike = [c for c in absent if self._concepts[c].category == mine.category]
            pool = alike if alike and rng.random() < 0.5 else absent
            other = self._concepts[pool[int(rng.integers(len(pool)))]]
            return Question(f"is there {other.article} {other.name}?", "no", "is there a thing")
        return Question(f"is there {mine.article} {mine.name}?", "yes", "is there a thing")

    def _category_question(self, scene: Scene, rng: np.random.Generator) -> Question:
        present = {self._concepts[index].category for index, _ in scene.items}
        answer = "yes" if rng.random() < 0.5 else "no"
        pool = [name for name in self._categories if (name in present) == (answer == "yes")]
        if not pool:
            answer, pool = ("no", self._categories) if answer == "yes" else ("yes", sorted(present))
        category = pool[int(rng.integers(len(pool)))]
        return Question(f"is any {category} in the picture?", answer, "is there a category")
