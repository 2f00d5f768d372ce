"""ViLBERT of the starter world: its sizes, its two stages, and its folder.

Stage ``regions`` trains a head on CLIP's finished tower that finds the things in a picture; stage ``vilbert`` trains
the two streams on what it finds: questions, captions that fit or do not, and phrases to be found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision.ops import box_iou, generalized_box_iou_loss

from benchmarks.starter.captions import CONTEXT_LENGTH, Caption, agreement, noun_phrase
from benchmarks.starter.concepts import World
from benchmarks.starter.data import Batch, Studio
from benchmarks.starter.loop import Schedule, train
from benchmarks.starter.questions import Asker
from benchmarks.starter.scenes import COLOR_NAMES, Scene
from vlmflow.config import ModelConfig
from vlmflow.models.clip import load_tower
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.vilbert.config import VilbertConfig
from vlmflow.models.vilbert.finders import BOX_HEAD_FILE, REGIONS_FILE, TowerRegionsSource
from vlmflow.models.vilbert.model import Encoded, Text, Vilbert
from vlmflow.models.vilbert.regions import Regions, with_whole_image
from vlmflow.models.vilbert.tasks import QUESTION, REFERENCE, RETRIEVAL
from vlmflow.models.vilbert.tower import BoxHead, TowerRegions, patch_centres
from vlmflow.models.weights import read_open_clip_model, weights_digest

VILBERT_NAME = "vilbert"
_HEAD_WIDTH = 64
GROUNDED = 0.5  # intersection over union from which on a box shows the thing, as referring expressions are judged
_NEAR_MISSES = 0.6
_OTHER_COLORS = 0.33  # of the near misses
_RATE = 8e-4
_MATCH_WEIGHT = 3.0  # the sums over answers and over regions would outweigh it


def tower_width(clip: Path) -> int:
    """Numbers of a patch: of an early and of the last layer."""
    return 2 * int(read_open_clip_model(clip, None)["vision_cfg"]["width"])


def vilbert_config(vocabulary: int, width: int, num_answers: int) -> VilbertConfig:
    """128 wide, four layers for words and three for regions, three connections. ``width``: of the tower."""
    return VilbertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=CONTEXT_LENGTH,
        type_vocab_size=1,
        hidden_act="gelu",
        v_feature_size=width,
        v_target_size=1,
        v_hidden_size=128,
        v_num_hidden_layers=3,
        v_num_attention_heads=4,
        v_intermediate_size=256,
        v_hidden_act="gelu",
        bi_hidden_size=128,
        bi_num_attention_heads=4,
        v_biattention_id=(0, 1, 2),
        t_biattention_id=(1, 2, 3),
        heads=("vil_prediction", "vil_logit", "vision_logit"),
        num_answers=num_answers,
        num_task_tokens=20,
    )


def build_vilbert(config: VilbertConfig) -> Vilbert:
    """With first weights as BERT's."""
    model = Vilbert(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    # Of a hundred answers one is right: the losses of the other ninety-nine need not be learned first.
    nn.init.constant_(model.vil_prediction.logit_fc[-1].bias, -4.0)
    return model


def region_source(clip: Path) -> TowerRegionsSource:
    """Of a folder beside that of the exported CLIP."""
    return TowerRegionsSource(
        kind="tower",
        folder=f"../{clip.name}",
        weights_digest=weights_digest(clip, "open_clip"),
        box_head_width=_HEAD_WIDTH,
        max_regions=8,
        min_score=0.3,
    )


def region_finder(clip: Path, head: BoxHead, device: str) -> TowerRegions:
    """The head on the tower of an exported CLIP, in bf16."""
    config, dtype = ModelConfig(family="open_clip", path=str(clip)), torch.bfloat16
    normalize = PixelNormalizer(read_preprocessing(clip, config), device, dtype)
    return TowerRegions(load_tower(clip, config, device, dtype), head, normalize, region_source(clip))


class RegionLosses:
    """Objectness by how well a patch's box fits, and the boxes themselves by GIoU (Rezatofighi et al. 2019)."""

    def __init__(self, head: BoxHead, studio: Studio, clip: Path, batch_size: int) -> None:
        self._head, self._studio, self._batch_size = head, studio, batch_size
        self._find = region_finder(clip, head, studio.device)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        batch = self._studio.batch(self._batch_size, step)
        logits, boxes = self._head(self._find.patches(batch.pixels))
        wanted, inside = _boxes_of_patches(batch.boxes, boxes.shape[1])
        overlap = functional.relu(1 - generalized_box_iou_loss(boxes[inside], wanted[inside])).detach()
        target = torch.zeros_like(logits)
        target[inside] = overlap
        return {
            "found": functional.binary_cross_entropy_with_logits(logits, target),
            "boxes": generalized_box_iou_loss(boxes[inside], wanted[inside], reduction="mean"),
        }


def _boxes_of_patches(boxes: Sequence[torch.Tensor], num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest box that each patch's centre lies in: (N, P, 4), and (N, P) bool, whether there is one."""
    centre = patch_centres(num_patches, boxes[0].device)
    wanted, inside = [], []
    for of in boxes:
        low, high = centre[:, None] >= of[None, :, :2], centre[:, None] <= of[None, :, 2:]
        holds = (low & high).all(-1)
        area = ((of[:, 2] - of[:, 0]) * (of[:, 3] - of[:, 1])).expand(num_patches, -1)
        wanted.append(of[area.masked_fill(~holds, 2).argmin(1)])
        inside.append(holds.any(1))
    return torch.stack(wanted), torch.stack(inside)


@dataclass(frozen=True)
class Phrase:
    """Words for a thing in a picture, and where it is: (boxes, 4)."""

    text: str
    boxes: torch.Tensor


class Pointer:
    """Names one kind of thing of a scene, to be found."""

    def __init__(self, world: World) -> None:
        self._concepts = world.all_concepts

    def point(self, scene: Scene, boxes: torch.Tensor, rng: np.random.Generator) -> Phrase:
        """``boxes``: of the scene's objects, in its order."""
        number = int(rng.integers(len(scene.items)))
        concept, count = scene.items[number]
        first = sum(c for _, c in scene.items[:number])
        return Phrase(noun_phrase(self._concepts[concept], 1), boxes[first : first + count])


class VilbertLosses:
    """Answers (BCE over all of them), captions that fit (BCE) and phrases (BCE over regions), as arXiv:1912.02315."""

    def __init__(self, model: Vilbert, find: TowerRegions, studio: Studio, batch_size: int) -> None:
        self._model, self._find, self._studio, self._batch_size = model, find, studio, batch_size
        self._asker, self._pointer = Asker(studio.world), Pointer(studio.world)
        self._answers = {answer: number for number, answer in enumerate(self._asker.answers)}

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        batch = self._studio.batch(self._batch_size, step)
        rng = self._studio.sampler.rng(step, purpose=2)
        regions = self._find.find(self._find.patches(batch.pixels))
        num = len(regions)
        questions = [self._asker.ask(scene, rng) for scene in batch.scenes]
        wrong = self._wrong_captions(batch, rng)
        phrases = [self._pointer.point(s, b, rng) for s, b in zip(batch.scenes, batch.boxes, strict=True)]
        texts = [q.text for q in questions] + [c.text for c in batch.captions] + wrong + [p.text for p in phrases]
        tasks = [QUESTION] * num + [RETRIEVAL] * (2 * num) + [REFERENCE] * num
        encoded = encode_pairs(self._model, self._studio, regions, texts, tasks)
        answer, true, false, _ = encoded.pair.split(num)
        target = torch.zeros(num, len(self._answers), device=answer.device)
        target[range(num), [self._answers[q.answer] for q in questions]] = 1
        logits = self._model.vil_prediction(answer).float()
        match = self._model.vil_logit(torch.cat([true, false])).float()[:, 0]
        fits = (torch.arange(2 * num, device=match.device) < num).float()
        return {
            "vqa": functional.binary_cross_entropy_with_logits(logits, target) * target.shape[1],
            "itm": _MATCH_WEIGHT * functional.binary_cross_entropy_with_logits(match, fits),
            "grounding": self._grounding(encoded.regions[-num:], regions, phrases),
        }

    def _grounding(self, states: torch.Tensor, regions: Regions, phrases: Sequence[Phrase]) -> torch.Tensor:
        """The first region is the whole image, which is no answer."""
        logits = self._model.vision_logit(states[:, 1:]).float()[..., 0]
        target = torch.zeros_like(logits)
        for row, (phrase, boxes) in enumerate(zip(phrases, regions.boxes, strict=True)):
            best = box_iou(boxes, phrase.boxes).max(1).values
            target[row] = best * (best >= GROUNDED)
        losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (losses * regions.mask).sum() / len(states)

    def _near_miss(self, scene: Scene, rng: np.random.Generator) -> Caption:
        """Of a scene that differs in one thing. The background, slow to be learned, every third time at least."""
        if rng.random() < _OTHER_COLORS:
            color = int((scene.color + 1 + rng.integers(len(COLOR_NAMES) - 1)) % len(COLOR_NAMES))
            text = self._studio.writer.full(replace(scene, color=color))
            return Caption(text, scene.items, color, True)
        return self._studio.writer.varied(self._studio.sampler.vary(scene, rng), rng)

    def _wrong_captions(self, batch: Batch, rng: np.random.Generator) -> list[str]:
        """Of a scene that differs in one thing, or of another of the batch; never one that is true as well."""
        captions = [self._near_miss(scene, rng) for scene in batch.scenes]
        num_concepts = len(self._studio.world.all_concepts)
        near_true = agreement(batch.scenes, captions, num_concepts).diagonal().tolist()
        true = agreement(batch.scenes, batch.captions, num_concepts).numpy()
        wrong = []
        for row, caption in enumerate(captions):
            others = np.flatnonzero(~true[row])
            if (rng.random() < _NEAR_MISSES and not near_true[row]) or not len(others):
                wrong.append(caption.text)
            else:
                wrong.append(batch.captions[int(others[rng.integers(len(others))])].text)
        return wrong


def encode_pairs(
    model: Vilbert, studio: Studio, regions: Regions, texts: Sequence[str], tasks: Sequence[int]
) -> Encoded:
    """Every picture with ``len(texts) / N`` texts: those of the first kind for all pictures, then the next."""
    dtype = model.bert.v_embeddings.image_embeddings.weight.dtype
    features, places, mask = with_whole_image(regions)
    stream = model.embed_regions(features.to(dtype), places.to(dtype), mask)
    rows = torch.arange(len(texts), device=mask.device) % len(regions)
    tokens = studio.tokens(texts)
    text = Text(tokens.ids, tokens.mask.bool(), torch.tensor(tasks, device=mask.device))
    return model.encode(stream.take(rows), text)


def export_vilbert(model: Vilbert, head: BoxHead, studio: Studio, clip: Path, folder: Path) -> None:
    """The folder that vlmflow loads: weights under the published names, the box head, what it stands on, answers."""
    folder.mkdir(parents=True, exist_ok=True)
    studio.tokenizer.save_pretrained(folder)
    weights = {name: weight.detach().half().contiguous().cpu() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    boxes = {name: weight.detach().half().contiguous().cpu() for name, weight in head.state_dict().items()}
    save_file(boxes, folder / BOX_HEAD_FILE, metadata={"format": "pt"})
    _write(folder / "config.json", model.config.model_dump(mode="json"))
    _write(folder / REGIONS_FILE, region_source(clip).model_dump(mode="json"))
    _write(folder / "answers.json", list(Asker(studio.world).answers))


@dataclass(frozen=True)
class Stages:
    """Budgets of the two stages: wall-clock minutes, and steps that end them earlier (tests)."""

    region_minutes: float = 3.0
    minutes: float = 25.0
    max_steps: int | None = None
    batch_size: int = 32


def train_vilbert(studio: Studio, work: Path, clip: Path, stages: Stages) -> tuple[Vilbert, BoxHead]:
    """Both stages, each from its checkpoint in ``work`` if there is one, on the exported CLIP of a folder."""
    torch.manual_seed(1)
    head = BoxHead(tower_width(clip), _HEAD_WIDTH)
    schedule = Schedule(stages.region_minutes, max_steps=stages.max_steps)
    losses = RegionLosses(head, studio, clip, 2 * stages.batch_size)
    print(f"regions: {train(head, losses, schedule, work / f'{studio.world.name}-regions.pt')} steps", flush=True)
    model = build_vilbert(vilbert_config(len(studio.tokenizer), tower_width(clip), len(Asker(studio.world).answers)))
    find = region_finder(clip, head.eval().requires_grad_(False), studio.device)
    schedule = Schedule(stages.minutes, rate=_RATE, max_steps=stages.max_steps)
    losses_of_pairs = VilbertLosses(model, find, studio, stages.batch_size)
    checkpoint = work / f"{studio.world.name}-vilbert.pt"
    print(f"vilbert: {train(model, losses_of_pairs, schedule, checkpoint)} steps", flush=True)
    return model, head


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
