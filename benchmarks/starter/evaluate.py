"""Prints every figure of the model cards: ``python -m benchmarks.starter.evaluate``.

Pictures of each test set are written as files and go through `vlmflow.evaluation`, as anybody's would: the engine, the
shipped folders, the field's metrics. What is here is what is true of the pictures, and figures of words in sentences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import ViltForQuestionAnswering

from benchmarks.starter.captions import Writer, build_tokenizer
from benchmarks.starter.cards import misses, write_cards
from benchmarks.starter.concepts import Concept, World
from benchmarks.starter.data import TRAINED_ARTISTS, encode
from benchmarks.starter.demo_figures import Demo
from benchmarks.starter.metrics import Nouns
from benchmarks.starter.objectives import answer_logits
from benchmarks.starter.policy import label_name
from benchmarks.starter.questions import KINDS, Asker, Question
from benchmarks.starter.scenes import COLOR_NAMES, EVALUATION_STEP, Painter, Scene, SceneSampler
from benchmarks.starter.sources import HELD_OUT, WORK_FOLDER, DrawingSet, build_drawings, load_world
from vlmflow.config import Job, RayConfig
from vlmflow.engine.cluster import ray_cluster
from vlmflow.evaluation import Choices, Dataset, EvaluationTask
from vlmflow.evaluation.dataset import table_of
from vlmflow.evaluation.evaluate import evaluate_with_predictions
from vlmflow.evaluation.metrics.captions import bleu, cider
from vlmflow.evaluation.metrics.classes import roc_auc
from vlmflow.evaluation.metrics.ptb import tokenize
from vlmflow.evaluation.report import EvaluationReport
from vlmflow.evaluation.score import score_answers

RESULTS = Path("benchmarks/results/starter.json")
STARTER = Path("vlmflow/starter")
_BATCH = 125
_CONSTANT_CAPTION = "a cat on a white background"
_GALLERY = 1000


@dataclass(frozen=True)
class TestSet:
    """Scenes that training never saw, of one kind. ``concepts``: those that occur."""

    name: str
    painter: Painter
    sampler: SceneSampler
    concepts: list[int]

    def paint(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """(N, 3, side, side) float32 in [-1, 1], rounded to whole pixel values as a file would hold them."""
        rng = self.sampler.rng(EVALUATION_STEP, purpose=len(scenes))
        return self.painter.paint(scenes, rng).round() / 127.5 - 1

    def scenes(self, num: int, number: int, *, num_kinds: int | None = None) -> list[Scene]:
        """``number`` sets one draw apart from another; ``num_kinds`` None mixes as training did."""
        if num_kinds is None:
            return self.sampler.sample(num, EVALUATION_STEP + number)
        return self.sampler.sample_items(num, EVALUATION_STEP + number, num_kinds=num_kinds, count=1)

    def gallery(self, num: int) -> list[Scene]:
        """Scenes no two of which are described by the same sentence."""
        distinct: dict[tuple[object, ...], Scene] = {}
        for scene in self.scenes(4 * num, 1):
            distinct.setdefault((frozenset(scene.items), scene.color), scene)
        return list(distinct.values())[:num]


def test_sets(world: World, drawings: DrawingSet) -> list[TestSet]:
    """Unseen scenes of known drawings, the artist never trained on, the concepts never trained on."""
    known = Painter(drawings, TRAINED_ARTISTS, world.side_px)
    held_out = Painter(drawings, (HELD_OUT.name,), world.side_px)
    num_trained = len(world.concepts)
    parts = [
        ("unseen scenes", known, [c for c in known.concepts if c < num_trained]),
        ("unseen artist", held_out, [c for c in held_out.concepts if c < num_trained]),
        ("unseen concepts", known, [c for c in known.concepts if c >= num_trained]),
    ]
    return [TestSet(name, p, SceneSampler(world, c, seed=2), c) for name, p, c in parts]


class Evaluation:
    """The figures of one set, model by model, from the folders that are there."""

    def __init__(self, world: World, test: TestSet, num: int, folder: Path, work: Path) -> None:
        self._world, self._test, self._num, self._folder = world, test, num, folder
        self._work = work / "evaluate" / test.name.replace(" ", "-")
        self._writer = Writer(world)
        self._nouns = Nouns(world.all_concepts)
        self._models = {
            "embed": {"family": "open_clip", "path": str(folder / "clip"), "repo": "vlmflow/starter-clip"},
            "caption": {"family": "blip_caption", "path": str(folder / "captioner")},
            "match": {"family": "blip_itm", "path": str(folder / "matcher")},
        }

    def clip(self) -> dict[str, float]:
        names = [concept.name for concept in self._world.all_concepts]
        scenes = self._test.scenes(self._num, 0, num_kinds=1)
        rows = {"class": [names[scene.items[0][0]] for scene in scenes]}
        prompts = tuple(self._writer.name(number) for number in range(len(names)))
        choices = Choices(class_names=prompts, templates=("{}",))
        report, _ = self._run("zeroshot", scenes, rows, choices, classes=tuple(names))
        figures = {f"zero-shot {k}": _value(report, k) for k in ("top-1", "top-5")}
        gallery = self._test.gallery(_GALLERY)
        report, _ = self._run("retrieval", gallery, {"captions": [[self._writer.full(scene)] for scene in gallery]})
        figures |= {f"image-to-text recall@{k}": _value(report, f"image-to-text R@{k}") for k in (1, 5, 10)}
        figures |= {"text-to-image recall@1": _value(report, "text-to-image R@1"), "gallery": len(gallery)}
        return figures | self._moderation()

    def captioner(self) -> dict[str, float]:
        single, mixed = self._test.scenes(self._num, 2, num_kinds=1), self._test.scenes(self._num, 3)
        several = self._test.scenes(self._num // 2, 4, num_kinds=2) + self._test.scenes(self._num // 2, 5, num_kinds=3)
        of_single, of_several, captions = (self._captions(scenes) for scenes in (single, several, mixed))
        said = [self._nouns.find(text) for text in of_single]
        exact = [found == {scene.items[0][0]} for found, scene in zip(said, single, strict=True)]
        recalled = [
            len(self._nouns.find(text) & {c for c, _ in scene.items}) / len(scene.items)
            for text, scene in zip(of_several, several, strict=True)
        ]
        references = [self._writer.full(scene) for scene in mixed]
        colors = [f"{COLOR_NAMES[s.color]} background" in text for text, s in zip(captions, mixed, strict=True)]
        words, others = [tokenize(text) for text in captions], [[tokenize(text)] for text in references]
        return {
            "exact noun, single objects": float(np.mean(exact)),
            "noun recall, two or three": float(np.mean(recalled)),
            "background colour": float(np.mean(colors)),
            "whole caption exact": float(np.mean([a == b for a, b in zip(captions, references, strict=True)])),
            "BLEU-4": bleu(words, others)[3],
            "BLEU-4 of a constant caption": bleu([tokenize(_CONSTANT_CAPTION)] * len(others), others)[3],
            "CIDEr": cider(words, others),
        }

    def matcher(self) -> dict[str, float]:
        scenes = self._test.scenes(self._num, 6)
        true = [self._writer.full(scene) for scene in scenes]
        wrong = {}
        for name, change in self._wrong_texts().items():
            rng = self._test.sampler.rng(EVALUATION_STEP + 7)
            wrong[name] = [self._writer.full(change(scene, rng)) for scene in scenes]
        pairs = {
            (at, text): texts is true for texts in (*wrong.values(), true) for at, text in enumerate(texts)
        }  # the true text last: it is true whatever else it was
        uris = self._paint("match", scenes)
        rows = {
            "uri": [uris[at] for at, _ in pairs],
            "key": [text for _, text in pairs],
            "text": [text for _, text in pairs],
            "match": list(pairs.values()),
        }
        _, scores = self._evaluate("match", table_of("match", rows), Choices())
        found = dict(zip(pairs, map(float, scores), strict=True))
        figures = {}
        for name, texts in wrong.items():
            values = np.array([found[at, text] for texts in (true, texts) for at, text in enumerate(texts)])
            positive = np.arange(len(values)) < len(true)
            figures[f"ITM AUC, {name}"] = roc_auc(values, positive) or 0.0
        return figures

    def vqa(self) -> dict[str, float]:
        scenes = self._test.scenes(self._num, 8)
        asker, rng = Asker(self._world), self._test.sampler.rng(EVALUATION_STEP + 9)
        asked = [asker.ask(scene, rng) for scene in scenes]
        questions = [
            {"question_id": str(at), "answers": [one.answer], "question_type": one.kind} for at, one in enumerate(asked)
        ]
        said = dict(zip(map(str, range(len(asked))), self._answer(scenes, asked), strict=True))
        scored = score_answers(said, questions)
        by_kind = scored.groups["question type"]
        figures = {"VQA overall": scored.figures["accuracy"].value}
        figures |= {f"VQA, {kind}": by_kind[kind]["accuracy"].value for kind in KINDS}
        return {name: value or 0.0 for name, value in figures.items()}

    def _moderation(self) -> dict[str, float]:
        """What the demo policy finds of scenes with things that it flags, and of the others; shares of a kind."""
        scenes = self._test.scenes(self._num, 11)
        labels = [[label_name(concept) for concept, _ in self._things(scene) if concept.flagged] for scene in scenes]
        flags = [bool(names) for names in labels]
        _, decisions = self._run("moderate", scenes, {"labels": labels, "flag": flags})
        flagged = np.array([decision != "allow" for decision in decisions])
        parts = {"flagged of those to flag": np.array(flags), "flagged of the others": ~np.array(flags)}
        return {f"moderation, {name}": float(flagged[part].mean()) for name, part in parts.items() if part.any()}

    def _things(self, scene: Scene) -> list[tuple[Concept, int]]:
        return [(self._world.all_concepts[number], count) for number, count in scene.items]

    def _captions(self, scenes: Sequence[Scene]) -> list[str]:
        rows = {"captions": [[self._writer.full(scene)] for scene in scenes]}
        _, captions = self._run("caption", scenes, rows)
        return [caption or "" for caption in captions]

    def _answer(self, scenes: Sequence[Scene], asked: Sequence[Question]) -> list[str]:
        model = ViltForQuestionAnswering.from_pretrained(self._folder / "vqa", dtype=torch.float32).eval()
        pixels, tokenizer = self._test.paint(scenes), build_tokenizer(self._world)
        said: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(asked), _BATCH):
                tokens = encode(tokenizer, [one.text for one in asked[start : start + _BATCH]])
                best = answer_logits(model, pixels[start : start + _BATCH], tokens).argmax(1)
                said += [model.config.id2label[int(number)] for number in best]
        return said

    def _run(
        self,
        task: EvaluationTask,
        scenes: Sequence[Scene],
        truth: dict[str, list[object]],
        choices: Choices | None = None,
        classes: tuple[str, ...] = (),
    ) -> tuple[EvaluationReport, Sequence[object]]:
        rows = table_of(task, {"uri": self._paint(task, scenes), **truth})
        return self._evaluate(task, rows, choices or Choices(), classes)

    def _evaluate(
        self, task: EvaluationTask, rows: pa.Table, choices: Choices, classes: tuple[str, ...] = ()
    ) -> tuple[EvaluationReport, Sequence[object]]:
        job = Job.model_validate(
            {
                "source": {"uri": "unused"},
                "catalog": {"uri": "unused"},
                "profile": "starter",
                "models": self._models,
                "policy": "demo",
                "max_caption_tokens": 28,
                "views": ("squash",),
            }
        )
        report, said = evaluate_with_predictions(Dataset(task, self._test.name, rows, classes=classes), job, choices)
        assert report.num_missing == 0
        return report, said

    def _paint(self, task: str, scenes: Sequence[Scene]) -> list[object]:
        """Writes the pictures as files, one folder a task and size of set; returns where they are."""
        folder = self._work / f"{task}-{len(scenes)}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((self._test.paint(scenes) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        uris: list[object] = []
        for number, picture in enumerate(pixels):
            path = folder / f"{number:04d}.png"
            Image.fromarray(picture).save(path)
            uris.append(str(path.absolute()))
        return uris

    def _wrong_texts(self) -> dict[str, Callable[[Scene, np.random.Generator], Scene]]:
        """How the true text of a scene is made wrong: each returns the scene that the wrong text describes."""
        others = iter(self._test.scenes(2 * self._num, 10))

        def random_text(scene: Scene, _: np.random.Generator) -> Scene:
            return next(other for other in others if other.items != scene.items)

        def same_category(scene: Scene, rng: np.random.Generator) -> Scene:
            present = {concept for concept, _ in scene.items}
            category = self._world.all_concepts[scene.items[0][0]].category
            absent = [c for c in self._test.concepts if c not in present]
            alike = [c for c in absent if self._world.all_concepts[c].category == category] or absent
            first = (alike[int(rng.integers(len(alike)))], scene.items[0][1])
            return replace(scene, items=(first, *scene.items[1:]))

        def color(scene: Scene, rng: np.random.Generator) -> Scene:
            return replace(scene, color=int((scene.color + 1 + rng.integers(9)) % 10))

        def count(scene: Scene, rng: np.random.Generator) -> Scene:
            concept, number = scene.items[0]
            return replace(scene, items=((concept, int((number + rng.integers(3)) % 4) + 1), *scene.items[1:]))

        return {"random text": random_text, "same category": same_category, "other colour": color, "other count": count}


def _value(report: EvaluationReport, name: str) -> float:
    value = report.figures[name].value
    assert value is not None
    return value


def evaluate(folder: Path, world: World, drawings: DrawingSet, num: int, work: Path) -> dict[str, dict[str, float]]:
    """Set name -> figure name -> value, for all models of the folder."""
    results: dict[str, dict[str, float]] = {}
    with ray_cluster(RayConfig()):
        for test in test_sets(world, drawings):
            evaluation = Evaluation(world, test, num, folder, work)
            figures: dict[str, float] = {}
            for name in ("clip", "captioner", "matcher", "vqa"):
                if (folder / name).is_dir():
                    figures |= getattr(evaluation, name)()
            results[test.name] = {key: round(value, 4) for key, value in figures.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("small", "full"), default="small")
    parser.add_argument("--folder", type=Path, default=STARTER)
    parser.add_argument("--num", type=int, default=500, help="scenes per figure")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--policy", default="demo", help="of the demo catalog")
    options = parser.parse_args()
    world = load_world(options.world, options.work)
    results = evaluate(options.folder, world, build_drawings(world, options.work), options.num, options.work)
    if (options.folder / "demo").is_dir() and (options.folder / "matcher").is_dir():
        figures = Demo(options.folder, options.policy).figures()
        results["demo catalog"] = {name: round(value, 4) for name, value in figures.items()}
    for name, figures in results.items():
        print(f"== {name}")
        for key, value in figures.items():
            print(f"{key:34} {value:.3f}")
    for model, part, name, value, bar in misses(results):
        print(f"missed: {model}, {part}, {name}: {value:.3f} under {bar}")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n")
    write_cards(options.folder, results, side_px=world.side_px, num_concepts=len(world.concepts))


if __name__ == "__main__":
    main()
