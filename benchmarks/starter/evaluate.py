"""Prints every figure of the model cards: ``python -m benchmarks.starter.evaluate``.

Pictures of each test set are written as files and go through `vlmflow.evaluation`, as anybody's would: the engine, the
shipped folders, the field's metrics. What is here is what is true of the pictures, and figures of words in sentences.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.machine import add_results_option
from benchmarks.starter.captions import Writer
from benchmarks.starter.cards import Results, misses, read_results, write_cards, write_results
from benchmarks.starter.concepts import World
from benchmarks.starter.data import TRAINED_ARTISTS
from benchmarks.starter.demo_figures import Demo
from benchmarks.starter.metrics import Nouns
from benchmarks.starter.policy import label_name
from benchmarks.starter.questions import KINDS, Asker
from benchmarks.starter.scenes import COLOR_NAMES, EVALUATION_STEP, Painter, Scene, SceneSampler
from benchmarks.starter.sources import HELD_OUT, WORK_FOLDER, DrawingSet, build_drawings, load_world
from benchmarks.starter.vilbert import VILBERT_NAME, Pointer
from benchmarks.starter.vilbert_figures import Roles
from vlmflow.config import CatalogConfig, Job, RayConfig
from vlmflow.engine.cluster import ray_cluster
from vlmflow.evaluation import Choices, Dataset, EvaluationTask
from vlmflow.evaluation.dataset import table_of
from vlmflow.evaluation.measure import evaluate_with_predictions
from vlmflow.evaluation.metrics.captions import bleu, cider
from vlmflow.evaluation.metrics.classes import roc_auc
from vlmflow.evaluation.metrics.ptb import tokenize
from vlmflow.evaluation.report import EvaluationReport
from vlmflow.evaluation.run import Run

STARTER = Path("vlmflow/starter")
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

    def paint_with_boxes(self, scenes: Sequence[Scene]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(N, 3, side, side) uint8, and where the objects are, in the order of each scene."""
        rng = self.sampler.rng(EVALUATION_STEP, purpose=len(scenes))
        pixels, boxes = self.painter.paint_with_boxes(scenes, rng)
        return pixels.round().to(torch.uint8), boxes

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
    """The figures of one set, model by model, from the folders that are there.

    Args:
        catalog: where results are kept, so that one run of the models can serve several figures; None: nowhere.
    """

    def __init__(
        self, world: World, test: TestSet, num: int, folder: Path, work: Path, catalog: CatalogConfig | None = None
    ) -> None:
        self._world, self._test, self._num, self._folder = world, test, num, folder
        self._work = work / "evaluate" / test.name.replace(" ", "-")
        self._catalog = catalog
        self.name = test.name
        self._writer = Writer(world)
        self._nouns = Nouns(world.all_concepts)
        self.job = starter_job(folder)

    def clip(self) -> dict[str, float]:
        prompts = tuple(self._writer.name(number) for number in range(len(self._world.all_concepts)))
        report, _ = self._evaluate(self.zeroshot, class_names=prompts, templates=("{}",))
        figures = {f"zero-shot {k}": _value(report, k) for k in ("top-1", "top-5")}
        report, _ = self._evaluate(self.gallery)
        figures |= {f"image-to-text recall@{k}": _value(report, f"image-to-text R@{k}") for k in (1, 5, 10)}
        figures |= {"text-to-image recall@1": _value(report, "text-to-image R@1"), "gallery": report.num_images}
        return figures | self._moderation()

    def captioner(self) -> dict[str, float]:
        _, captions = self._evaluate(self.captions)
        single, several, mixed = self._captioned()
        said = [self._nouns.find(text) for text in captions]
        exact = [found == {scene.items[0][0]} for found, scene in zip(said, single, strict=False)]
        recalled = [
            len(found & {number for number, _ in scene.items}) / len(scene.items)
            for found, scene in zip(said[len(single) :], several, strict=False)
        ]
        whole = captions[-len(mixed) :]
        references = [self._writer.full(scene) for scene in mixed]
        colors = [f"{COLOR_NAMES[s.color]} background" in text for text, s in zip(whole, mixed, strict=True)]
        words, others = [tokenize(text) for text in whole], [[tokenize(text)] for text in references]
        return {
            "exact noun, single objects": float(np.mean(exact)),
            "noun recall, two or three": float(np.mean(recalled)),
            "background colour": float(np.mean(colors)),
            "whole caption exact": float(np.mean([a == b for a, b in zip(whole, references, strict=True)])),
            "BLEU-4": bleu(words, others)[3],
            "BLEU-4 of a constant caption": bleu([tokenize(_CONSTANT_CAPTION)] * len(others), others)[3],
            "CIDEr": cider(words, others),
        }

    def matcher(self) -> dict[str, float]:
        _, scores = self._evaluate(self.pairs)
        rows = self.pairs.rows
        found = dict(zip(zip(rows["uri"].to_pylist(), rows["text"].to_pylist(), strict=True), scores, strict=True))
        true, wrong = self._texts()
        uris = self._uris("match", len(true))
        figures = {}
        for name, texts in wrong.items():
            values = np.array([found[pair] for of in (true, texts) for pair in zip(uris, of, strict=True)])
            figures[f"ITM AUC, {name}"] = roc_auc(values, np.arange(len(values)) < len(true)) or 0.0
        return figures

    def vqa(self) -> dict[str, float]:
        report, _ = self._evaluate(self.asked)
        by_kind = report.groups["question type"]
        figures = {"VQA overall": report.figures["accuracy"].value}
        figures |= {f"VQA, {kind}": by_kind[kind]["accuracy"].value for kind in KINDS}
        return {name: value or 0.0 for name, value in figures.items()}

    def vilbert(self) -> dict[str, float]:
        roles, num = Roles.load(self._folder / VILBERT_NAME), self._num
        scenes, asker, rng = self._test.scenes(num, 8), Asker(self._world), self._test.sampler.rng(EVALUATION_STEP + 9)
        asked = [asker.ask(scene, rng) for scene in scenes]
        figures = roles.answering(self._test.paint_with_boxes(scenes)[0], asked)
        pixels, _ = self._test.paint_with_boxes(self._test.scenes(num, 6))
        figures |= roles.matching(pixels, *self._texts())
        scenes = self._test.scenes(num // 2, 12, num_kinds=2) + self._test.scenes(num // 2, 13, num_kinds=3)
        pixels, boxes = self._test.paint_with_boxes(scenes)
        pointer, rng = Pointer(self._world), self._test.sampler.rng(EVALUATION_STEP + 14)
        return figures | roles.grounding(pixels, [pointer.point(*one, rng) for one in zip(scenes, boxes, strict=True)])

    @cached_property
    def zeroshot(self) -> Dataset:
        names = [concept.name for concept in self._world.all_concepts]
        scenes = self._test.scenes(self._num, 0, num_kinds=1)
        truth = {"class": [names[scene.items[0][0]] for scene in scenes]}
        return self._dataset("zeroshot", scenes, truth, classes=tuple(names))

    @cached_property
    def gallery(self) -> Dataset:
        scenes = self._test.gallery(_GALLERY)
        return self._dataset("retrieval", scenes, {"captions": [[self._writer.full(scene)] for scene in scenes]})

    @cached_property
    def moderation(self) -> Dataset:
        scenes = self._test.scenes(self._num, 11)
        shown = [[self._world.all_concepts[number] for number, _ in scene.items] for scene in scenes]
        labels = [[label_name(concept) for concept in concepts if concept.flagged] for concepts in shown]
        return self._dataset("moderate", scenes, {"labels": labels, "flag": [bool(names) for names in labels]})

    @cached_property
    def captions(self) -> Dataset:
        parts = dict(zip(("single", "several", "mixed"), self._captioned(), strict=True))
        uris = [uri for name, scenes in parts.items() for uri in self._paint(f"caption-{name}", scenes)]
        texts = [[self._writer.full(scene)] for scenes in parts.values() for scene in scenes]
        return Dataset("caption", self._test.name, table_of("caption", {"uri": uris, "captions": texts}))

    @cached_property
    def pairs(self) -> Dataset:
        """Every scene with its own text, and with a wrong one of each kind."""
        true, wrong = self._texts()
        uris = self._paint("match", self._test.scenes(self._num, 6))
        # The true text last: it is true whatever else it was.
        found = {pair: texts is true for texts in (*wrong.values(), true) for pair in zip(uris, texts, strict=True)}
        texts = [text for _, text in found]
        rows = {"uri": [uri for uri, _ in found], "key": texts, "text": texts, "match": list(found.values())}
        return Dataset("match", self._test.name, table_of("match", rows))

    @cached_property
    def asked(self) -> Dataset:
        """One question to each scene."""
        scenes, asker, rng = (
            self._test.scenes(self._num, 8),
            Asker(self._world),
            self._test.sampler.rng(EVALUATION_STEP + 9),
        )
        questions = [
            [{"question_id": str(at), "question": one.text, "answers": [one.answer], "question_type": one.kind}]
            for at, one in enumerate(asker.ask(scene, rng) for scene in scenes)
        ]
        return self._dataset("answer", scenes, {"questions": questions})

    def _moderation(self) -> dict[str, float]:
        """What the demo policy flags of scenes that hold what it must, and of the others, where there are such."""
        _, decisions = self._evaluate(self.moderation)
        flagged = np.array([decision != "allow" for decision in decisions])
        must = self.moderation.rows["flag"].to_numpy()
        parts = {"flagged of those to flag": must, "flagged of the others": ~must}
        return {f"moderation, {name}": float(flagged[part].mean()) for name, part in parts.items() if part.any()}

    def _captioned(self) -> tuple[list[Scene], list[Scene], list[Scene]]:
        """Scenes of one thing; of two and of three kinds; and as training had them."""
        half = self._num // 2
        several = self._test.scenes(half, 4, num_kinds=2) + self._test.scenes(half, 5, num_kinds=3)
        return self._test.scenes(self._num, 2, num_kinds=1), several, self._test.scenes(self._num, 3)

    def _texts(self) -> tuple[list[str], dict[str, list[str]]]:
        """The true text of each scene, and wrong ones by kind."""
        scenes = self._test.scenes(self._num, 6)
        wrong = {}
        for name, change in self._wrong_texts().items():
            rng = self._test.sampler.rng(EVALUATION_STEP + 7)
            wrong[name] = [self._writer.full(change(scene, rng)) for scene in scenes]
        return [self._writer.full(scene) for scene in scenes], wrong

    def _evaluate(self, data: Dataset, **choices: Any) -> tuple[EvaluationReport, Any]:
        report, said = evaluate_with_predictions(data, self.job, Choices(catalog=self._catalog, **choices))
        assert report.num_missing == 0
        return report, said

    def _dataset(
        self, task: EvaluationTask, scenes: Sequence[Scene], truth: dict[str, Any], classes: tuple[str, ...] = ()
    ) -> Dataset:
        rows = table_of(task, {"uri": self._paint(task, scenes), **truth})
        return Dataset(task, self._test.name, rows, classes=classes)

    def _paint(self, name: str, scenes: Sequence[Scene]) -> list[str]:
        """Writes the pictures as files; returns where they are."""
        pixels = ((self._test.paint(scenes) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        uris = self._uris(name, len(scenes))
        Path(uris[0]).parent.mkdir(parents=True, exist_ok=True)
        for uri, picture in zip(uris, pixels, strict=True):
            Image.fromarray(picture).save(uri)
        return uris

    def _uris(self, name: str, num: int) -> list[str]:
        return [str((self._work / name / f"{number:04d}.png").absolute()) for number in range(num)]

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


def starter_job(folder: Path) -> Job:
    """The models of the folder; of images the whole alone, which is all that the scenes need."""
    models = {
        "embed": {"family": "open_clip", "path": str(folder / "clip"), "repo": "vlmflow/starter-clip"},
        "caption": {"family": "blip_caption", "path": str(folder / "captioner")},
        "match": {"family": "blip_itm", "path": str(folder / "matcher")},
        "answer": {"family": "vilt", "path": str(folder / "vqa")},
    }
    return Job.model_validate(
        {
            "source": {"uri": "unused"},
            "catalog": {"uri": "unused"},
            "profile": "starter",
            "models": models,
            "policy": "demo",
            "max_caption_tokens": 28,
            "views": ("squash",),
        }
    )


def run_models(evaluations: Sequence[Evaluation], catalog: CatalogConfig) -> None:
    """Runs each model once over all sets into the catalog; the figures then find everything there."""
    embedded = [data.rows.select(["uri"]) for e in evaluations for data in (e.zeroshot, e.gallery, e.moderation)]
    nothing = {"labels": pa.nulls(1, pa.list_(pa.string())), "flag": pa.nulls(1, pa.bool_())}
    uris = pa.concat_tables(embedded)
    for name, value in nothing.items():
        uris = uris.append_column(name, value.take(pa.array(np.zeros(uris.num_rows, np.int64))))
    parts = {
        "moderate": uris,
        "caption": pa.concat_tables([evaluation.captions.rows for evaluation in evaluations]),
        "match": pa.concat_tables([evaluation.pairs.rows for evaluation in evaluations]),
        "answer": pa.concat_tables([evaluation.asked.rows for evaluation in evaluations]),
    }
    for task, rows in parts.items():
        Run(evaluations[0].job, Dataset(task, "all sets", rows), catalog, None)  # type: ignore[arg-type]


def _value(report: EvaluationReport, name: str) -> float:
    value = report.figures[name].value
    assert value is not None
    return value


def evaluate_vilbert(folder: Path, world: World, drawings: DrawingSet, num: int, work: Path) -> Results:
    """Set name -> figure name -> value, for the ViLBERT of the folder."""
    evaluations = [Evaluation(world, test, num, folder, work) for test in test_sets(world, drawings)]
    return {one.name: {key: round(value, 4) for key, value in one.vilbert().items()} for one in evaluations}


def evaluate(folder: Path, world: World, drawings: DrawingSet, num: int, work: Path) -> Results:
    """Set name -> figure name -> value, for the other four models of the folder."""
    place = work / "evaluate" / "catalog"
    shutil.rmtree(place, ignore_errors=True)
    catalog = CatalogConfig(uri=str(place))
    evaluations = [Evaluation(world, test, num, folder, work, catalog) for test in test_sets(world, drawings)]
    results: Results = {}
    with ray_cluster(RayConfig()):
        run_models(evaluations, catalog)
        for evaluation in evaluations:
            figures = evaluation.clip() | evaluation.captioner() | evaluation.matcher() | evaluation.vqa()
            results[evaluation.name] = {key: round(value, 4) for key, value in figures.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("small", "full"), default="small")
    parser.add_argument("--folder", type=Path, default=STARTER)
    parser.add_argument("--only-vilbert", action="store_true", help="keep the figures of the other models")
    parser.add_argument("--num", type=int, default=500, help="scenes per figure")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    add_results_option(parser)
    parser.add_argument("--policy", default="demo", help="of the demo catalog")
    options = parser.parse_args()
    world = load_world(options.world, options.work)
    measured = (options.folder, world, build_drawings(world, options.work), options.num, options.work)
    results = read_results(options.results) if options.only_vilbert else evaluate(*measured)
    for name, figures in evaluate_vilbert(*measured).items():
        results[name] |= figures
    if options.only_vilbert:
        print("The figures of the other models are those of the file.")
    elif (options.folder / "demo").is_dir() and (options.folder / "matcher").is_dir():
        figures = Demo(options.folder, options.policy).figures()
        results["demo catalog"] = {name: round(value, 4) for name, value in figures.items()}
    for name, figures in results.items():
        print(f"== {name}")
        for key, value in figures.items():
            print(f"{key:34} {value:.3f}")
    for model, part, name, value, bar in misses(results):
        print(f"missed: {model}, {part}, {name}: {value:.3f} under {bar}")
    write_results(results, options.results, only_vilbert=options.only_vilbert)
    write_cards(options.folder, results, side_px=world.side_px, num_concepts=len(world.concepts))


if __name__ == "__main__":
    main()
