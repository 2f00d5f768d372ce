"""Batches for training and for evaluation: scenes painted and described, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertTokenizer

from benchmarks.starter.captions import CONTEXT_LENGTH, Caption, Writer, build_tokenizer
from benchmarks.starter.concepts import World
from benchmarks.starter.scenes import Painter, Scene, SceneSampler
from benchmarks.starter.sources import ARTISTS, WORK_FOLDER, DrawingSet, build_drawings, load_world

TRAINED_ARTISTS = tuple(artist.name for artist in ARTISTS)


@dataclass(frozen=True)
class Tokens:
    """``ids`` and ``mask``: (N, T) int64, T the longest of the batch."""

    ids: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """``pixels``: (N, 3, side, side) bf16 in [-1, 1]; ``captions[i]`` is true of ``scenes[i]``.

    ``boxes``: where the objects are, as :meth:`Painter.paint_with_boxes` tells it.
    """

    pixels: torch.Tensor
    scenes: list[Scene]
    captions: list[Caption]
    boxes: list[torch.Tensor]


class Studio:
    """Makes batches of the trained concepts by the trained artists; a batch is a function of (seed, step)."""

    def __init__(self, world: World, drawings: DrawingSet, *, seed: int = 1, device: str = "cpu") -> None:
        self.world = world
        self.device = device
        self.tokenizer: BertTokenizer = build_tokenizer(world)
        self.writer = Writer(world)
        self.painter = Painter(drawings, TRAINED_ARTISTS, world.side_px, device)
        trained = [c for c in self.painter.concepts if c < len(world.concepts)]
        self.sampler = SceneSampler(world, trained, seed)

    def batch(self, num: int, step: int) -> Batch:
        """Half of the scenes are near misses of the other half."""
        scenes = self.sampler.sample(num, step, num_near=num // 2)
        rng = self.sampler.rng(step, purpose=1)
        captions = [self.writer.varied(scene, rng) for scene in scenes]
        pixels, boxes = self.painter.paint_with_boxes(scenes, rng)
        return Batch(normalise(pixels), scenes, captions, boxes)

    def tokens(self, texts: Sequence[str]) -> Tokens:
        tokens = encode(self.tokenizer, texts)
        return Tokens(tokens.ids.to(self.device), tokens.mask.to(self.device))


def encode(tokenizer: BertTokenizer, texts: Sequence[str]) -> Tokens:
    """Token ids on the CPU, cut at the context length."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt")
    return Tokens(encoded.input_ids, encoded.attention_mask)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """[0, 255] -> bf16 in [-1, 1], as mean and deviation 0.5 of every preprocessor config."""
    return (pixels / 127.5 - 1).bfloat16()


def open_studio(world_name: str, work: Path = WORK_FOLDER, *, seed: int = 1, device: str = "cpu") -> Studio:
    world = load_world(world_name, work)
    return Studio(world, build_drawings(world, work), seed=seed, device=device)
