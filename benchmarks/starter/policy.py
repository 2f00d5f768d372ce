"""Writes and binds the demo policy: ``python -m benchmarks.starter.policy``.

Thresholds come from new scenes of the drawings that training used, never from the demo catalog: a
label reviews above the highest scores of harmless scenes, and blocks above all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.starter.captions import Writer
from benchmarks.starter.concepts import FLAGGED_CATEGORIES, Concept, World
from benchmarks.starter.data import TRAINED_ARTISTS
from benchmarks.starter.metrics import Scores
from benchmarks.starter.scenes import Painter, Scene, SceneSampler
from benchmarks.starter.sources import WORK_FOLDER, build_drawings, load_world
from vlmflow.config import ModelConfig
from vlmflow.models import identify, load_embedder
from vlmflow.moderation.policy import Logistic, Policy, Thresholds, bind, load_policy, write_binding
from vlmflow.moderation.prompts import encode_prompts
from vlmflow.moderation.scoring import Scorer

POLICY = Path("vlmflow/moderation/policies/demo.yaml")
_TEMPERATURES = (0.02, 0.05, 0.1)
_SCALE = 20.0
# Share of harmless scenes that may score above a label's review threshold; 16 labels add up to under 4%.
_FALSE_REVIEWS = 0.0024
_NUM_SCENES = 4000
_STEP = 1 << 38  # training counts its steps up from 0, evaluation from 1 << 40
_HEAD = """\
# Made by `python -m benchmarks.starter.policy`, which also measures the thresholds in the binding.
name: demo
version: "1"
description: >-
  For the demo catalog and for tests: finds drawings of weapons, alcohol, gambling, tobacco and death with the
  starter models, which know drawings alone. Not for photographs, and not for a real catalog: see marketplace.
"""


def policy_text(world: World, temperature: float, scale: float = _SCALE) -> str:
    """The policy without a binding: one label per flagged thing, every harmless thing as a neutral prompt."""
    writer = Writer(world)
    index = {concept: number for number, concept in enumerate(world.all_concepts)}
    lines = [_HEAD + f"temperature: {temperature}", "neutral:"]
    lines += [f"  - {writer.name(index[c])}" for c in world.concepts if not c.flagged]
    lines.append("categories:")
    for category in FLAGGED_CATEGORIES:
        lines += [f"  - name: {category}", "    labels:"]
        for concept in (c for c in world.concepts if c.category == category):
            prompts = f"[{writer.name(index[concept])}, {concept.name}]"
            lines += [f"      - name: {label_name(concept)}", f"        prompts: {prompts}"]
            lines += ["        review: 0.5", "        block: 0.9"]
    lines.append(f"logistic: {{scale: {scale}, offset: 0.0}}")
    return "\n".join(lines) + "\nbindings: []\n"


def label_name(concept: Concept) -> str:
    return concept.name.replace(" ", "_")


class Measurement:
    """Margins of training-side scenes, and what thresholds on them catch."""

    def __init__(self, world: World, work: Path, clip: ModelConfig) -> None:
        self._clip = clip
        self._embedder = load_embedder(clip, "cpu")
        painter = Painter(build_drawings(world, work), TRAINED_ARTISTS, world.side_px)
        trained = [c for c in painter.concepts if c < len(world.concepts)]
        sampler = SceneSampler(world, trained, seed=1)
        scenes = sampler.sample(_NUM_SCENES, _STEP)
        self.flagged = np.array([_is_flagged(scene, world) for scene in scenes])
        pixels = painter.paint(scenes, sampler.rng(_STEP, purpose=1)).round().to(torch.uint8)
        parts = [self._embedder.embed_images(part) for part in pixels.split(250)]
        self._vectors = np.concatenate(parts)

    def margins(self, policy: Policy) -> Scores:
        """(scenes, labels)."""
        return np.asarray(Scorer(encode_prompts(policy, self._embedder)).score(self._vectors))

    def thresholds(self, margins: Scores) -> tuple[Scores, Scores]:
        """(labels,) review and block, in margin units."""
        harmless = margins[~self.flagged]
        return np.quantile(harmless, 1 - _FALSE_REVIEWS, axis=0), harmless.max(axis=0) + 0.02

    def rates(self, margins: Scores, review: Scores) -> tuple[float, float]:
        """Share of the flagged scenes that are found, and of the harmless ones that are flagged."""
        found = (margins >= review).any(axis=1)
        return float(found[self.flagged].mean()), float(found[~self.flagged].mean())


def _is_flagged(scene: Scene, world: World) -> bool:
    return any(world.all_concepts[concept].flagged for concept, _ in scene.items)


def write_policy(path: Path, world: World, work: Path, clip: ModelConfig) -> None:
    """Chooses the temperature that finds most, writes the policy, binds it to the model's files as they are now."""
    measurement = Measurement(world, work, clip)
    best = (-1.0, 0.0)
    for temperature in _TEMPERATURES:
        path.write_text(policy_text(world, temperature))
        margins = measurement.margins(load_policy(str(path)))
        recall, false = measurement.rates(margins, measurement.thresholds(margins)[0])
        print(f"temperature {temperature}: finds {recall:.3f} of the flagged, flags {false:.3f} of the others")
        best = max(best, (recall, temperature))
    path.write_text(policy_text(world, best[1]))
    policy = load_policy(str(path))
    review, block = measurement.thresholds(measurement.margins(policy))
    middle = float(np.median(review))
    thresholds = {
        label.label: Thresholds(review=_score(low, middle), block=_score(max(low, high), middle))
        for label, low, high in zip(policy.labels, review, block, strict=True)
    }
    logistic = Logistic(scale=_SCALE, offset=round(middle, 4))
    write_binding(path, bind(policy, identify("embed", clip), logistic=logistic, thresholds=thresholds))


def _score(margin: float, offset: float) -> float:
    return round(float(1 / (1 + np.exp(-_SCALE * (margin - round(offset, 4))))), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("vlmflow/starter"))
    parser.add_argument("--policy", type=Path, default=POLICY)
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    options = parser.parse_args()
    clip = ModelConfig(family="open_clip", path=str(options.folder / "clip"), repo="vlmflow/starter-clip")
    write_policy(options.policy, load_world("small", options.work), options.work, clip)


if __name__ == "__main__":
    main()
