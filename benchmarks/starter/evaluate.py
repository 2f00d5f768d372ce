"""Prints every figure of the model cards, from the shipped folders: ``python -m benchmarks.starter.evaluate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch.nn import functional
from torchvision.ops import box_iou
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, ViltForQuestionAnswering

from benchmarks.starter.captions import Writer, build_tokenizer
from benchmarks.starter.cards import misses, read_results, write_cards
from benchmarks.starter.concepts import World
from benchmarks.starter.data import TRAINED_ARTISTS, Tokens, encode
from benchmarks.starter.demo_figures import Demo
from benchmarks.starter.metrics import Nouns, Scores, auc, bleu4, top_k
from benchmarks.starter.objectives import answer_logits
from benchmarks.starter.questions import KINDS, Asker
from benchmarks.starter.scenes import COLOR_NAMES, EVALUATION_STEP, Painter, Scene, SceneSampler
from benchmarks.starter.sources import HELD_OUT, WORK_FOLDER, DrawingSet, build_drawings, load_world
from benchmarks.starter.vilbert import GROUNDED, VILBERT_NAME, Pointer
from vlmflow.models.vilbert.adapter import VilbertAnswerer, VilbertGrounder, VilbertMatcher

RESULTS = Path("benchmarks/results/starter.json")
STARTER = Path("vlmflow/starter")
_BATCH = 125
_CONSTANT_CAPTION = "a cat on a white background"


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
    """The figures of one set, model by model."""

    def __init__(self, world: World, test: TestSet, num: int) -> None:
        self._world, self._test, self._num = world, test, num
        self._writer, self._tokenizer = Writer(world), build_tokenizer(world)
        self._nouns = Nouns(world.all_concepts)

    def clip(self, model: open_clip.CLIP) -> dict[str, float]:
        scenes = self._test.scenes(self._num, 0, num_kinds=1)
        names = [self._writer.name(c) for c in range(len(self._world.all_concepts))]
        truth = np.array([scene.items[0][0] for scene in scenes])
        scores = _similarities(model, self._test.paint(scenes), self._tokens(names))
        figures = {"zero-shot top-1": top_k(scores, truth, 1), "zero-shot top-5": top_k(scores, truth, 5)}
        gallery = self._test.gallery(1000)
        texts = self._tokens([self._writer.full(scene) for scene in gallery])
        scores = _similarities(model, self._test.paint(gallery), texts)
        own = np.arange(len(gallery))
        for k in (1, 5, 10):
            figures[f"image-to-text recall@{k}"] = top_k(scores, own, k)
        return figures | {"text-to-image recall@1": top_k(scores.T, own, 1), "gallery": len(gallery)}

    def captioner(self, model: BlipForConditionalGeneration) -> dict[str, float]:
        single, mixed = self._test.scenes(self._num, 2, num_kinds=1), self._test.scenes(self._num, 3)
        several = self._test.scenes(self._num // 2, 4, num_kinds=2) + self._test.scenes(self._num // 2, 5, num_kinds=3)
        said = [self._nouns.find(text) for text in self._caption(model, single)]
        exact = [found == {scene.items[0][0]} for found, scene in zip(said, single, strict=True)]
        recalled = [
            len(self._nouns.find(text) & {c for c, _ in scene.items}) / len(scene.items)
            for text, scene in zip(self._caption(model, several), several, strict=True)
        ]
        captions, references = self._caption(model, mixed), [self._writer.full(scene) for scene in mixed]
        colors = [f"{COLOR_NAMES[s.color]} background" in text for text, s in zip(captions, mixed, strict=True)]
        return {
            "exact noun, single objects": float(np.mean(exact)),
            "noun recall, two or three": float(np.mean(recalled)),
            "background colour": float(np.mean(colors)),
            "whole caption exact": float(np.mean([a == b for a, b in zip(captions, references, strict=True)])),
            "BLEU-4": bleu4(captions, references),
            "BLEU-4 of a constant caption": bleu4([_CONSTANT_CAPTION] * len(references), references),
        }

    def matcher(self, model: BlipForImageTextRetrieval) -> dict[str, float]:
        scenes = self._test.scenes(self._num, 6)
        with torch.inference_mode():
            parts = self._test.paint(scenes).split(_BATCH)
            images = torch.cat([model.vision_model(pixel_values=part).last_hidden_state for part in parts])
        true = self._match(model, images, scenes)
        figures = {}
        for name, change in self._wrong_texts().items():
            rng = self._test.sampler.rng(EVALUATION_STEP + 7)
            figures[f"ITM AUC, {name}"] = auc(true, self._match(model, images, [change(s, rng) for s in scenes]))
        return figures

    def vqa(self, model: ViltForQuestionAnswering) -> dict[str, float]:
        scenes = self._test.scenes(self._num, 8)
        asker, rng = Asker(self._world), self._test.sampler.rng(EVALUATION_STEP + 9)
        questions = [asker.ask(scene, rng) for scene in scenes]
        logits = self._batched(
            lambda p, t: answer_logits(model, p, t), self._test.paint(scenes), [q.text for q in questions]
        )
        said = [model.config.id2label[int(number)] for number in logits.argmax(1)]
        hits = np.array([a == q.answer for a, q in zip(said, questions, strict=True)])
        kinds = np.array([q.kind for q in questions])
        return {"VQA overall": float(hits.mean())} | {f"VQA, {k}": float(hits[kinds == k].mean()) for k in KINDS}

    def vilbert(self, model: Starter) -> dict[str, float]:
        scenes, asker = self._test.scenes(self._num, 8), Asker(self._world)
        rng = self._test.sampler.rng(EVALUATION_STEP + 9)
        questions = [asker.ask(scene, rng) for scene in scenes]
        given = model.answerer.answer(self._test.paint_with_boxes(scenes)[0], [[q.text] for q in questions])
        hits = np.array([said[0].text == q.answer for said, q in zip(given, questions, strict=True)])
        kinds = np.array([q.kind for q in questions])
        figures = {"ViLBERT VQA overall": float(hits.mean())}
        figures |= {f"ViLBERT VQA, {k}": float(hits[kinds == k].mean()) for k in KINDS}
        scenes = self._test.scenes(self._num, 6)
        images = model.matcher.encode_images(self._test.paint_with_boxes(scenes)[0])
        true = model.matcher.match_itm(images, [self._writer.full(scene) for scene in scenes])
        for name, change in self._wrong_texts().items():
            rng = self._test.sampler.rng(EVALUATION_STEP + 7)
            wrong = model.matcher.match_itm(images, [self._writer.full(change(scene, rng)) for scene in scenes])
            figures[f"ViLBERT ITM AUC, {name}"] = auc(true, wrong)
        return figures | self._grounding(model.grounder)

    def _grounding(self, grounder: VilbertGrounder) -> dict[str, float]:
        """Of scenes with two or three things: is the likeliest region the thing that the phrase names?"""
        scenes = self._test.scenes(self._num // 2, 11, num_kinds=2) + self._test.scenes(self._num // 2, 12, num_kinds=3)
        pixels, boxes = self._test.paint_with_boxes(scenes)
        pointer, rng = Pointer(self._world), self._test.sampler.rng(EVALUATION_STEP + 13)
        phrases = [pointer.point(scene, of, rng) for scene, of in zip(scenes, boxes, strict=True)]
        found = grounder.ground(pixels, [[phrase.text] for phrase in phrases])
        first, any_region, chance = [], [], []
        for (of,), phrase in zip(found, phrases, strict=True):
            shows = (box_iou(torch.from_numpy(of.boxes), phrase.boxes) >= GROUNDED).any(1).numpy()
            first.append(shows[0])
            any_region.append(shows.any())
            chance.append(shows.mean())
        return {
            "ViLBERT grounding, first region": float(np.mean(first)),
            "ViLBERT grounding, any region": float(np.mean(any_region)),
            "ViLBERT grounding by chance": float(np.mean(chance)),
        }

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

    def _match(self, model: BlipForImageTextRetrieval, images: torch.Tensor, scenes: Sequence[Scene]) -> Scores:
        """(N,) the head's probability that ``scenes[i]``'s caption fits; ``images``: (N, tokens, width)."""

        def score(tokens: torch.Tensor, texts: Tokens) -> torch.Tensor:
            states = model.text_encoder(
                texts.ids,
                attention_mask=texts.mask,
                encoder_hidden_states=tokens,
                encoder_attention_mask=tokens.new_ones(tokens.shape[:2]),
            ).last_hidden_state
            return model.itm_head(states[:, 0]).softmax(dim=1)[:, 1]

        return self._batched(score, images, [self._writer.full(scene) for scene in scenes])

    def _caption(self, model: BlipForConditionalGeneration, scenes: Sequence[Scene]) -> list[str]:
        captions: list[str] = []
        for pixels in self._test.paint(scenes).split(_BATCH):
            ids = model.generate(pixel_values=pixels, max_new_tokens=28, do_sample=False)
            captions += self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [caption.replace(" ,", ",").strip() for caption in captions]

    def _batched(
        self, score: Callable[[torch.Tensor, Tokens], torch.Tensor], pixels: torch.Tensor, texts: Sequence[str]
    ) -> npt.NDArray[np.float32]:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                part = self._tokens(texts[start : start + _BATCH])
                parts.append(score(pixels[start : start + _BATCH], part).float().numpy())
        return np.concatenate(parts)

    def _tokens(self, texts: Sequence[str]) -> Tokens:
        return encode(self._tokenizer, texts)


def _similarities(model: open_clip.CLIP, pixels: torch.Tensor, texts: Tokens) -> Scores:
    context = model.context_length
    with torch.inference_mode():
        images = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(_BATCH)])
        ids = functional.pad(texts.ids, (0, context - texts.ids.shape[1]))
        words = torch.cat([model.encode_text(part, normalize=True) for part in ids.split(_BATCH)])
    return np.asarray((images @ words.T).float().numpy())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Module]:
    """The models of the folders that are there, through the libraries' own loaders."""
    models: dict[str, torch.nn.Module] = {}
    if (folder / "clip").is_dir():
        models["clip"] = open_clip.create_model(f"local-dir:{folder / 'clip'}")
    classes = {
        "captioner": BlipForConditionalGeneration,
        "matcher": BlipForImageTextRetrieval,
        "vqa": ViltForQuestionAnswering,
    }
    for name, kind in classes.items():
        if (folder / name).is_dir():
            models[name] = kind.from_pretrained(folder / name, dtype=dtype)
    return {name: model.eval() for name, model in models.items()}


@dataclass(frozen=True)
class Starter:
    """The starter's ViLBERT in its three roles."""

    matcher: VilbertMatcher
    answerer: VilbertAnswerer
    grounder: VilbertGrounder


def load_vilbert(folder: Path) -> Starter:
    """Through vlmflow's own adapters, from the folder of that model."""
    return Starter(*(role.load(folder, "cpu") for role in (VilbertMatcher, VilbertAnswerer, VilbertGrounder)))


def evaluate(
    folder: Path, world: World, drawings: DrawingSet, num: int, only: str | None = None
) -> dict[str, dict[str, float]]:
    """Set name -> figure name -> value, for all models of the folder, or for one."""
    models: dict[str, object] = dict(load(folder)) if only != VILBERT_NAME else {}
    if (folder / VILBERT_NAME).is_dir():
        models[VILBERT_NAME] = load_vilbert(folder / VILBERT_NAME)
    if only is not None:
        models = {only: models[only]}
    results: dict[str, dict[str, float]] = {}
    for test in test_sets(world, drawings):
        evaluation = Evaluation(world, test, num)
        figures: dict[str, float] = {}
        for name, model in models.items():
            figures |= getattr(evaluation, name)(model)
        results[test.name] = {key: round(value, 4) for key, value in figures.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("small", "full"), default="small")
    parser.add_argument("--folder", type=Path, default=STARTER)
    parser.add_argument("--model", help="evaluate this one alone, and keep the figures of the others")
    parser.add_argument("--num", type=int, default=500, help="scenes per figure")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--policy", default="demo", help="of the demo catalog")
    options = parser.parse_args()
    world = load_world(options.world, options.work)
    results = evaluate(options.folder, world, build_drawings(world, options.work), options.num, options.model)
    if options.model is not None:
        held = read_results(options.results)
        results = {name: held[name] | results.get(name, {}) for name in held}
    elif (options.folder / "demo").is_dir() and (options.folder / "matcher").is_dir():
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
