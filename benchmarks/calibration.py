"""What calibration does on drawings: the starter CLIP and the demo policy, ``python -m benchmarks.calibration``.

Verdicts are the truth of painted scenes. Thresholds are fitted on one draw of scenes and counted on others, before and
after: of the same artists, and of the artist whom training never saw. Nothing is counted on what it was fitted to.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import save_result
from benchmarks.starter.concepts import World
from benchmarks.starter.evaluate import TestSet, test_sets
from benchmarks.starter.policy import label_name
from benchmarks.starter.scenes import Scene
from benchmarks.starter.sources import WORK_FOLDER, build_drawings, load_world
from vlmflow.config import ModelConfig
from vlmflow.models import ImageEmbedder, identify, load_embedder
from vlmflow.moderation.calibrate import Targets, calibrate_labels
from vlmflow.moderation.decide import DECISIONS, Moderator
from vlmflow.moderation.fit import Rates, Sample, rates_at
from vlmflow.moderation.policy import Binding, Policy, find_binding, load_policy
from vlmflow.moderation.prompts import encode_prompts
from vlmflow.moderation.scoring import Scorer
from vlmflow.moderation.verdicts import Matched

README = Path("vlmflow/moderation/policies/README.md")
_BEGIN, _END = "<!-- figures: python -m benchmarks.calibration -->", "<!-- end of figures -->"
_FIT, _COUNT = 20, 21  # numbers that set one draw of scenes apart from another; evaluate uses those up to 10
_SEEN = "unseen scenes"
_SETS = (_SEEN, "unseen artist")


class Drawings:
    """Scenes of one set with their margins and verdicts under a policy. N: scenes, L: labels."""

    def __init__(self, test: TestSet, number: int, num: int, world: World, policy: Policy, clip: ImageEmbedder) -> None:
        scenes = test.scenes(num, number)
        pixels = ((test.paint(scenes) + 1) * 127.5).round().to(torch.uint8)
        vectors = np.concatenate([clip.embed_images(part) for part in pixels.split(250)])
        self.margins = np.asarray(Scorer(encode_prompts(policy, clip)).score(vectors))
        self.positive = np.array([[name in _names(scene, world) for _, name in policy.labels] for scene in scenes])

    def matched(self) -> Matched:
        """As verdicts of people would come."""
        ids = [f"{number:032x}" for number in range(len(self.positive))]
        weights = np.ones(self.positive.shape)
        return Matched(ids, self.positive.astype(np.int8), weights, False, Counter(), (0.0, 0.0))

    def count(self, policy: Policy, binding: Binding) -> dict[str, dict[str, Rates]]:
        """Label -> review or block -> what is caught."""
        decisions = Moderator(policy, binding, None).decide_labels(self.margins)
        counted: dict[str, dict[str, Rates]] = {}
        for number, ref in enumerate(policy.labels):
            positive = self.positive[:, number]
            sample = Sample(self.margins[:, number].astype(np.float64), positive, np.ones(len(positive)))
            counted[ref.label] = {
                name: rates_at(sample, decisions[:, number] >= DECISIONS.index(name)) for name in ("review", "block")
            }
        return counted


def _names(scene: Scene, world: World) -> set[str]:
    return {label_name(world.all_concepts[concept]) for concept, _ in scene.items}


def measure(num_fit: int, num_count: int, work: Path) -> dict[str, dict[str, dict[str, dict[str, Rates]]]]:
    """Set -> before or after -> label -> review or block -> rates."""
    world = load_world("small", work)
    config = ModelConfig(family="open_clip", path="vlmflow/starter/clip", repo="vlmflow/starter-clip")
    policy, clip, identity = load_policy("demo"), load_embedder(config, "cpu"), identify("embed", config)
    before = find_binding(policy, identity)
    assert before is not None
    sets = {test.name: test for test in test_sets(world, build_drawings(world, work))}
    fitted = Drawings(sets[_SEEN], _FIT, num_fit, world, policy, clip)
    done = calibrate_labels(policy, identity, before, fitted.matched(), fitted.margins, Targets())
    for label in done.labels:
        print(f"{label.label:18} {label.num_positive:4}+ {label.refused or ''} {'; '.join(label.warnings)}")
    results = {}
    for name in _SETS:
        drawings = Drawings(sets[name], _COUNT, num_count, world, policy, clip)
        results[name] = {"before": drawings.count(policy, before), "after": drawings.count(policy, done.binding)}
    return results


def tables(results: dict[str, dict[str, dict[str, Rates]]]) -> str:
    """The tables of the README for one set: at block and at review."""
    parts = []
    for at in ("block", "review"):
        lines = [f"| at {at} | precision before | after | recall before | after |", "| --- | --- | --- | --- | --- |"]
        for label, before in results["before"].items():
            both = (before[at], results["after"][label][at])
            cells = [_cell(rates.precision, rates.precision_interval) for rates in both]
            cells += [_cell(rates.recall, rates.recall_interval) for rates in both]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(share: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if share is None or interval is None else f"{share:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=3000, help="scenes with verdicts")
    parser.add_argument("--count", type=int, default=3000, help="scenes of each set that are counted")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    options = parser.parse_args()
    start = time.perf_counter()
    results = measure(options.fit, options.count, options.work)
    seconds = round(time.perf_counter() - start, 1)
    plain = {
        name: {
            when: {label: {at: vars(rates) for at, rates in both.items()} for label, both in labels.items()}
            for when, labels in by_time.items()
        }
        for name, by_time in results.items()
    }
    facts = {"scenes_fitted": options.fit, "scenes_counted": options.count, "seconds": seconds}
    save_result("calibration", {**facts, "results": plain})
    shown = "\n\n".join(f"### {name[0].upper()}{name[1:]}\n\n{tables(results[name])}" for name in _SETS)
    head, _, tail = README.read_text(encoding="utf-8").partition(_BEGIN)
    README.write_text(f"{head}{_BEGIN}\n\n{shown}\n\n{_END}{tail.partition(_END)[2]}", encoding="utf-8")
    print(shown, f"\n{seconds} s")


if __name__ == "__main__":
    main()
