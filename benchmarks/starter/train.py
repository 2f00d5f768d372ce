"""Trains the starter models and writes their folders; resumes where it was killed.

``python -m benchmarks.starter.train`` trains the small world on the CPU,
``python -m benchmarks.starter.train --world full --device cuda`` the full one on one GPU.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed

from benchmarks.starter import export
from benchmarks.starter.data import Studio, open_studio
from benchmarks.starter.loop import Schedule, load_weights, train
from benchmarks.starter.models import Matcher, Sizes, Trunk, build_vqa, sizes_of, start_vqa_from_tower
from benchmarks.starter.objectives import MatcherLosses, TrunkLosses, VqaLosses
from benchmarks.starter.questions import Asker
from benchmarks.starter.sources import WORK_FOLDER
from benchmarks.starter.vilbert import VILBERT_NAME, Stages, export_vilbert, train_vilbert

STAGES = ("trunk", "matcher", "vqa", "export", "vilbert")
# Wall-clock minutes of each stage: two CPU cores for the small world, one H100 for the full one.
_MINUTES = {
    "small": {"trunk": 50.0, "matcher": 30.0, "vqa": 30.0},
    "full": {"trunk": 10.0, "matcher": 5.0, "vqa": 5.0},
}
_BATCH_SIZES = {"small": 64, "full": 1024}


@dataclass(frozen=True)
class Recipe:
    """One training run of one world. ``minutes`` overrides a stage's own budget, ``max_steps`` ends it earlier."""

    world: str
    work: Path
    device: str = "cpu"
    seed: int = 1
    minutes: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    start_from: Path | None = None  # exported folders whose weights are the first ones, where there is no checkpoint

    def schedule(self, stage: str) -> Schedule:
        minutes = self.minutes if self.minutes is not None else _MINUTES[self.world][stage]
        return Schedule(minutes, max_steps=self.max_steps)

    @property
    def batch(self) -> int:
        return self.batch_size or _BATCH_SIZES[self.world]

    def checkpoint(self, stage: str) -> Path:
        return self.work / f"{self.world}-{stage}.pt"


@dataclass(frozen=True)
class Models:
    """The modules of all stages, with the weights of those that are trained."""

    sizes: Sizes
    trunk: Trunk
    matcher: Matcher


def build(recipe: Recipe, studio: Studio) -> Models:
    """Models with seeded first weights, or those of the checkpoints that are there."""
    torch.manual_seed(recipe.seed)
    sizes = sizes_of(studio.world.side_px, studio.tokenizer)
    trunk, matcher = Trunk(sizes, studio.tokenizer), Matcher(sizes, studio.tokenizer)
    if recipe.start_from is not None:
        export.import_trunk(trunk, recipe.start_from)
        export.import_matcher(matcher, recipe.start_from / export.MATCHER_NAME)
    for stage, model in (("trunk", trunk), ("matcher", matcher)):
        if recipe.checkpoint(stage).is_file():
            load_weights(model, recipe.checkpoint(stage))
    return Models(sizes, trunk.to(recipe.device), matcher.to(recipe.device))


def train_stage(stage: str, recipe: Recipe, studio: Studio) -> int:
    """Trains one stage; ``matcher`` and ``vqa`` start from the trunk's checkpoint. Returns the number of steps."""
    models = build(recipe, studio)
    schedule, checkpoint = recipe.schedule(stage), recipe.checkpoint(stage)
    if stage == "trunk":
        return train(models.trunk, TrunkLosses(models.trunk, studio, recipe.batch), schedule, checkpoint)
    if stage == "matcher":
        if not checkpoint.is_file() and recipe.start_from is None:
            # The captioner's decoder has learned to look already; BLIP shares most of the two as well.
            models.matcher.text_encoder.load_state_dict(models.trunk.decoder.bert.state_dict())
        losses = MatcherLosses(models.matcher, models.trunk.vision, studio, recipe.batch)
        return train(models.matcher, losses, schedule, checkpoint)
    vqa = build_vqa(models.sizes, studio.tokenizer, Asker(studio.world).answers)
    if recipe.start_from is None:
        start_vqa_from_tower(vqa, models.trunk.vision)
    else:
        vqa.load_state_dict(export.read_weights(recipe.start_from / export.VQA_NAME))
    vqa = vqa.to(recipe.device)
    return train(vqa, VqaLosses(vqa, studio, recipe.batch), schedule, checkpoint)


def write_folders(recipe: Recipe, studio: Studio, target: Path) -> None:
    """Exports what is trained so far to ``target``/{clip, captioner, matcher, vqa}."""
    models = build(recipe, studio)
    sizes, tokenizer = models.sizes, studio.tokenizer
    export.export_clip(models.trunk, sizes, tokenizer, target / export.CLIP_NAME)
    export.export_captioner(models.trunk, sizes, tokenizer, target / export.CAPTIONER_NAME)
    if recipe.checkpoint("matcher").is_file():
        folder = target / export.MATCHER_NAME
        export.export_matcher(models.matcher, models.trunk.vision, sizes, tokenizer, folder)
    if recipe.checkpoint("vqa").is_file():
        vqa = build_vqa(sizes, tokenizer, Asker(studio.world).answers)
        load_weights(vqa, recipe.checkpoint("vqa"))
        export.export_vqa(vqa, sizes, tokenizer, target / export.VQA_NAME)


def train_on_export(recipe: Recipe, studio: Studio, target: Path) -> None:
    """ViLBERT stands on the exported CLIP, whose weights its folder names: it is trained and exported after it."""
    clip = target / export.CLIP_NAME
    stages = Stages(max_steps=recipe.max_steps, batch_size=recipe.batch_size or Stages.batch_size)
    if recipe.minutes is not None:
        stages = replace(stages, minutes=recipe.minutes)
    model, head = train_vilbert(studio, recipe.work, clip, stages)
    export_vilbert(model, head, studio, clip, target / VILBERT_NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("small", "full"), default="small")
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all of them, in this order")
    parser.add_argument("--minutes", type=float, help="wall clock of each stage, instead of the world's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--start-from", type=Path, help="go on from the weights of these folders, such as vlmflow/starter"
    )
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    parser.add_argument("--target", type=Path, default=Path("vlmflow/starter"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if "RANK" in os.environ:  # under torchrun
        distributed.init_process_group("gloo")
    recipe = Recipe(options.world, options.work, options.device, minutes=options.minutes, start_from=options.start_from)
    studio = open_studio(recipe.world, recipe.work, seed=recipe.seed, device=recipe.device)
    for stage in options.stage or STAGES:
        if stage == "export" and int(os.environ.get("RANK", "0")) == 0:
            write_folders(recipe, studio, options.target)
        elif stage == "vilbert":
            train_on_export(recipe, studio, options.target)
        elif stage != "export":
            print(f"{stage}: {train_stage(stage, recipe, studio)} steps", flush=True)


if __name__ == "__main__":
    main()
