"""Scenes: what is in them (seeded, in Python), and their pixels (composed in batches, on CPU or GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.starter.concepts import COLORS, World
from benchmarks.starter.sources import DrawingSet

MAX_OBJECTS = 4
COLOR_NAMES = tuple(COLORS)
# Longest sides as fractions of the picture; one object takes the upper ones, several the lower ones.
_SIZES = (0.33, 0.38, 0.43, 0.48, 0.58, 0.72, 0.88)
_NUM_SMALL = 4
# A picture that is squashed to a square shows its things narrow or low.
_ASPECTS = ((1.0, 1.0), (0.7, 1.0), (1.0, 0.7))
_KIND_SHARES = (0.60, 0.28, 0.12)
_COUNT_SHARES = (0.55, 0.17, 0.14, 0.14)
_FLAGGED_WEIGHT = 1.5
# Seeds of evaluation start here; training counts its steps up from 0.
EVALUATION_STEP = 1 << 40


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in reading order. ``items``: (index into ``World.all_concepts``, count)."""

    items: tuple[tuple[int, int], ...]
    color: int

    @property
    def num_objects(self) -> int:
        return sum(count for _, count in self.items)


class SceneSampler:
    """Draws the contents of scenes; batch ``step`` of a seed is the same on every machine."""

    def __init__(self, world: World, concepts: Sequence[int], seed: int) -> None:
        """``concepts``: the indexes that may occur."""
        self._seed = seed
        self._concepts = np.asarray(concepts)
        categories = [world.all_concepts[c].category for c in concepts]
        weights = np.array([_FLAGGED_WEIGHT if world.all_concepts[c].flagged else 1.0 for c in concepts])
        self._shares = weights / weights.sum()
        self._alike = {
            int(c): [int(o) for o, other in zip(concepts, categories, strict=True) if other == mine and o != c]
            for c, mine in zip(concepts, categories, strict=True)
        }

    def rng(self, step: int, purpose: int = 0) -> np.random.Generator:
        """The numbers of a step. ``purpose``: 0 for what a scene holds, 1 for its picture and its caption."""
        return np.random.default_rng([self._seed, step, purpose])

    def sample(self, num: int, step: int, *, num_near: int = 0) -> list[Scene]:
        """Draws ``num`` scenes; the last ``num_near`` differ from one of the others in one thing alone.

        Near scenes are what teaches counts and colours: without them the noun alone tells a batch apart.
        """
        rng = self.rng(step)
        scenes = [self._draw(rng) for _ in range(num - num_near)]
        return scenes + [self.vary(scenes[i % len(scenes)], rng) for i in range(num_near)]

    def sample_items(self, num: int, step: int, *, num_kinds: int, count: int | None = None) -> list[Scene]:
        """Draws scenes of ``num_kinds`` kinds of things; one kind may have its count fixed."""
        rng = self.rng(step)
        return [self._draw(rng, num_kinds, count) for _ in range(num)]

    def vary(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Changes the colour, the count, or one thing (half the time for one of its category)."""
        choice = rng.random()
        if choice < 0.25:
            return replace(scene, color=_other(rng, len(COLOR_NAMES), scene.color))
        if choice < 0.5 and len(scene.items) == 1:
            concept, count = scene.items[0]
            return replace(scene, items=((concept, 1 + _other(rng, MAX_OBJECTS, count - 1)),))
        items = list(scene.items)
        place = int(rng.integers(len(items)))
        present = {concept for concept, _ in items}
        alike = [c for c in self._alike[items[place][0]] if c not in present]
        if not alike or rng.random() < 0.5:
            alike = [int(c) for c in self._concepts if int(c) not in present]
        items[place] = (alike[int(rng.integers(len(alike)))], items[place][1])
        return replace(scene, items=tuple(items))

    def _draw(self, rng: np.random.Generator, num_kinds: int | None = None, count: int | None = None) -> Scene:
        if num_kinds is None:
            num_kinds = 1 + int(rng.choice(3, p=_KIND_SHARES))
        chosen = rng.choice(self._concepts, size=num_kinds, replace=False, p=self._shares)
        if num_kinds == 1 and count is None:
            count = 1 + int(rng.choice(MAX_OBJECTS, p=_COUNT_SHARES))
        items = tuple((int(c), count or 1) for c in chosen)
        return Scene(items, int(rng.integers(len(COLOR_NAMES))))


class Painter:
    """Composes scenes from drawings with premultiplied alpha, a batch at a time.

    Every drawing is resized beforehand to each size and aspect, so that painting only copies at integer offsets.
    """

    def __init__(self, drawings: DrawingSet, artists: Sequence[str], side_px: int, device: str = "cpu") -> None:
        self._side = side_px
        self._device = device
        kept = [number for number, artist in enumerate(drawings.artists) if artist in artists]
        self._by_concept: dict[int, list[int]] = {}
        for row, number in enumerate(kept):
            self._by_concept.setdefault(int(drawings.concepts[number]), []).append(row)
        cells, sizes = _resize_all(drawings, kept, side_px)
        # One int32 per RGBA pixel, so that one gather copies all four channels.
        self._cells = torch.from_numpy(cells.view(np.int32).reshape(-1)).to(device)
        self._sizes = sizes
        self._num_variants = len(_SIZES) * len(_ASPECTS)

    @property
    def concepts(self) -> list[int]:
        """The concepts that the artists drew."""
        return sorted(self._by_concept)

    def paint(self, scenes: Sequence[Scene], rng: np.random.Generator) -> torch.Tensor:
        """Returns (N, 3, side, side) float32 in [0, 255]."""
        return self.paint_with_boxes(scenes, rng)[0]

    def paint_with_boxes(
        self, scenes: Sequence[Scene], rng: np.random.Generator
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Paints, and tells where each object is: (objects, 4) left, top, right, bottom as parts of the picture.

        Objects are in the order of a scene's items, as many of each as it counts.
        """
        canvas = _backgrounds(scenes, rng, self._side).to(self._device)
        layout = self._layout(scenes, rng)
        cell, left, top, flip = (torch.from_numpy(a).to(self._device) for a in layout)
        side = self._side
        axis = torch.arange(side, device=self._device)
        for slot in range(MAX_OBJECTS):
            rows = (cell[:, slot] >= 0).nonzero()[:, 0]
            if not len(rows):
                break
            number = cell[rows, slot]
            widths = torch.from_numpy(self._sizes).to(self._device)[number, 0]
            x = axis[None] - left[rows, slot, None]
            x = torch.where(flip[rows, slot, None], widths[:, None] - 1 - x, x)
            y = axis[None] - top[rows, slot, None]
            inside = ((x >= 0) & (x < side))[:, None, :] & ((y >= 0) & (y < side))[:, :, None]
            index = number[:, None, None] * side * side + y[:, :, None] * side + x[:, None, :]
            rgba = self._cells[torch.where(inside, index, 0)].masked_fill_(~inside, 0)
            rgba = rgba.contiguous().view(torch.uint8).view(len(rows), side, side, 4).permute(0, 3, 1, 2).float()
            canvas[rows] = rgba[:, :3] + canvas[rows] * (1 - rgba[:, 3:] / 255)
        gain = torch.from_numpy(rng.uniform(0.92, 1.08, (len(scenes), 1, 1, 1)).astype(np.float32))
        return (canvas * gain.to(self._device)).clamp_(0, 255), self._boxes(layout)

    def _boxes(self, layout: tuple[npt.NDArray[np.generic], ...]) -> list[torch.Tensor]:
        cell, left, top, _ = layout
        width, height = self._sizes[np.maximum(cell, 0)].transpose(2, 0, 1)
        sides = np.stack([left, top, left + width, top + height], axis=-1) / self._side
        boxes = torch.from_numpy(sides.clip(0, 1).astype(np.float32)).to(self._device)
        return [of[torch.from_numpy(here)] for of, here in zip(boxes, cell >= 0, strict=True)]

    def _layout(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[npt.NDArray[np.generic], ...]:
        shape = (len(scenes), MAX_OBJECTS)
        cell, left, top = (np.full(shape, -1, np.int64) for _ in range(3))
        flip = rng.random(shape) < 0.5
        for row, scene in enumerate(scenes):
            places = boxes(scene.num_objects, rng)
            chosen = self._choose(scene, rng)
            low, high = (_NUM_SMALL - 1, len(_SIZES)) if len(places) == 1 else (0, _NUM_SMALL)
            aspect = int(rng.integers(len(_ASPECTS))) if rng.random() < 0.4 else 0
            for slot, (box, drawing) in enumerate(zip(places, chosen, strict=True)):
                size = 0 if min(box[2:]) < 0.4 else int(rng.integers(low, high))
                number = drawing * self._num_variants + size * len(_ASPECTS) + aspect
                cell[row, slot] = number
                left[row, slot], top[row, slot] = place(box, self._sizes[number], self._side, rng)
        return cell, left, top, flip

    def _choose(self, scene: Scene, rng: np.random.Generator) -> list[int]:
        """One drawing per object; several things of a kind are mostly equal."""
        chosen: list[int] = []
        for concept, count in scene.items:
            drawings = self._by_concept[concept]
            picks = rng.integers(len(drawings), size=count)
            if rng.random() < 0.75:
                picks[:] = picks[0]
            chosen += [drawings[int(pick)] for pick in picks]
        return chosen


def boxes(num: int, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Where the objects go, in reading order: (left, top, width, height) as fractions of the picture."""
    if num == 1:
        return [(0, 0, 1, 1)]
    choice = rng.random()
    if num == 2:
        return [(0, 0, 0.5, 1), (0.5, 0, 0.5, 1)] if choice < 0.6 else [(0, 0, 1, 0.5), (0, 0.5, 1, 0.5)]
    if num == 3 and choice < 0.35:
        return [(0, 0, 0.34, 1), (0.33, 0, 0.34, 1), (0.66, 0, 0.34, 1)]
    grid = [(0, 0, 0.5, 0.5), (0.5, 0, 0.5, 0.5), (0, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)]
    if num == 3:
        del grid[int(rng.integers(4))]
    return grid


def place(
    box: tuple[float, float, float, float], size: npt.NDArray[np.int64], side: int, rng: np.random.Generator
) -> tuple[int, int]:
    """A corner for an object of ``size`` (width, height) in the box: anywhere that keeps it inside."""
    corner = []
    for start, length, extent in zip(box[:2], box[2:], size, strict=True):
        slack = length * side - float(extent)
        corner.append(round(start * side + rng.random() * slack if slack > 0 else start * side + slack / 2))
    return corner[0], corner[1]


def _backgrounds(scenes: Sequence[Scene], rng: np.random.Generator, side: int) -> torch.Tensor:
    """(N, 3, side, side): the colour with a jitter; half of them shaded in some direction, a third grainy."""
    num = len(scenes)
    base = np.array([COLORS[COLOR_NAMES[scene.color]] for scene in scenes], np.float32)
    base = base + rng.uniform(-10, 10, base.shape).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, num).astype(np.float32)
    depth = (rng.uniform(0, 0.3, num) * (rng.random(num) < 0.5)).astype(np.float32)
    axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    ramp = np.cos(angle)[:, None, None] * axis[None, None, :] + np.sin(angle)[:, None, None] * axis[None, :, None]
    shade = 1 + depth[:, None, None] * ramp
    canvas = base[:, :, None, None] * shade[:, None]
    grain = rng.uniform(0, 5, num).astype(np.float32) * (rng.random(num) < 0.33)
    noise = rng.standard_normal((num, 1, side, side), np.float32) * grain[:, None, None, None]
    return torch.from_numpy((canvas + noise).clip(0, 255).astype(np.float32))


def _resize_all(
    drawings: DrawingSet, kept: Sequence[int], side: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Every kept drawing at every size and aspect, each in the corner of a (side, side, 4) cell, and their sizes."""
    num_variants = len(_SIZES) * len(_ASPECTS)
    cells = np.zeros((len(kept) * num_variants, side, side, 4), np.uint8)
    sizes = np.zeros((len(cells), 2), np.int64)
    row = 0
    for number in kept:
        width, height = (int(extent) for extent in drawings.sizes[number])
        image = Image.fromarray(drawings.pixels[number, :height, :width])
        image = Image.frombuffer("RGBa", image.size, image.tobytes(), "raw", "RGBa", 0, 1)
        for fraction in _SIZES:
            scale = fraction * side / max(width, height)
            for aspect_x, aspect_y in _ASPECTS:
                size = (max(2, round(width * scale * aspect_x)), max(2, round(height * scale * aspect_y)))
                small = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
                cells[row, : size[1], : size[0]] = small
                sizes[row] = size
                row += 1
    return cells, sizes


def _other(rng: np.random.Generator, num: int, value: int) -> int:
    """Any of ``range(num)`` but ``value``."""
    return int((value + 1 + rng.integers(num - 1)) % num)
