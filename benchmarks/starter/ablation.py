"""With and without the auxiliary objectives: ``python -m benchmarks.starter.ablation --minutes 3``.

MIM joins the trunk's losses, MLM the matcher's; both arms start from the same weights, see the same batches and get the
same wall-clock minutes. The trunk starts from nothing, the matcher from nothing on the trained tower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.machine import add_results_option, save_result
from benchmarks.starter import export
from benchmarks.starter.data import Studio, open_studio
from benchmarks.starter.evaluate import Evaluation, test_sets
from benchmarks.starter.loop import Schedule, load_weights, train
from benchmarks.starter.models import Matcher, Sizes, Trunk, sizes_of
from benchmarks.starter.objectives import MatcherLosses, TrunkLosses
from benchmarks.starter.sources import WORK_FOLDER, build_drawings

_MASKED_PATCHES = 0.5
_BATCH = 64
_NUM_SCENES = 300


class TrunkWithMim(Trunk):
    """A trunk that can also fill in masked patches."""

    def __init__(self, sizes: Sizes, studio: Studio) -> None:
        super().__init__(sizes, studio.tokenizer)
        self.mask_token = nn.Parameter(torch.zeros(sizes.width))
        self.pixel_head = nn.Linear(sizes.width, 3 * sizes.patch_px**2)
        self._patch_px = sizes.patch_px

    def masked_image_loss(self, pixels: torch.Tensor, step: int) -> torch.Tensor:
        """MIM: SimMIM's L1 loss on the pixels of masked patches (Xie et al. 2022, arXiv:2111.09886)."""
        states = self.vision.embeddings(pixels)
        generator = torch.Generator().manual_seed(step)
        masked = (torch.rand(states.shape[0], states.shape[1] - 1, generator=generator) < _MASKED_PATCHES)[..., None]
        positions = self.vision.embeddings.position_embedding[:, 1:]
        patches = torch.where(masked.to(states.device), self.mask_token + positions, states[:, 1:])
        states = self.vision.encoder(inputs_embeds=torch.cat([states[:, :1], patches], dim=1)).last_hidden_state
        said = self.pixel_head(self.vision.post_layernorm(states)[:, 1:])
        wanted = functional.unfold(pixels.float(), self._patch_px, stride=self._patch_px).transpose(1, 2)
        return ((said.float() - wanted).abs() * masked.to(states.device)).sum() / masked.sum() / wanted.shape[-1]


def with_mim(trunk: TrunkWithMim, studio: Studio) -> Callable[[int], dict[str, torch.Tensor]]:
    plain = TrunkLosses(trunk, studio, _BATCH)

    def losses(step: int) -> dict[str, torch.Tensor]:
        pixels = studio.batch(_BATCH, step).pixels
        return {**plain(step), "mim": trunk.masked_image_loss(pixels, step)}

    return losses


def run(work: Path, minutes: float) -> dict[str, dict[str, float]]:
    """Arm -> figures on unseen scenes, with the number of steps that its minutes were enough for."""
    studio = open_studio("small", work)
    sizes, schedule = sizes_of(studio.world.side_px, studio.tokenizer), Schedule(minutes)
    results = {}
    for arm in ("trunk", "trunk + MIM"):
        torch.manual_seed(1)
        trunk = TrunkWithMim(sizes, studio)
        losses = with_mim(trunk, studio) if "MIM" in arm else TrunkLosses(trunk, studio, _BATCH)
        steps = _train(trunk, losses, schedule, work / "ablation.pt")
        export.export_clip(trunk, sizes, studio.tokenizer, work / "ablation" / export.CLIP_NAME)
        results[arm] = {**_figures(studio, work, "clip"), "steps": steps}
    trained = Trunk(sizes, studio.tokenizer)
    load_weights(trained, work / "small-trunk.pt")
    for arm in ("matcher", "matcher + MLM"):
        torch.manual_seed(1)
        matcher = Matcher(sizes, studio.tokenizer)
        masked_losses = MatcherLosses(matcher, trained.vision, studio, _BATCH, masked_words="MLM" in arm)
        steps = _train(matcher, masked_losses, schedule, work / "ablation.pt")
        folder = work / "ablation" / export.MATCHER_NAME
        export.export_matcher(matcher, trained.vision, sizes, studio.tokenizer, folder)
        results[arm] = {**_figures(studio, work, "matcher"), "steps": steps}
    return results


def _train(
    model: nn.Module, losses: Callable[[int], dict[str, torch.Tensor]], schedule: Schedule, checkpoint: Path
) -> int:
    checkpoint.unlink(missing_ok=True)
    return train(model, losses, schedule, checkpoint)


def _figures(studio: Studio, work: Path, model: str) -> dict[str, float]:
    test = test_sets(studio.world, build_drawings(studio.world, work))[0]
    evaluation = Evaluation(studio.world, test, _NUM_SCENES, work / "ablation", work)
    figures: dict[str, float] = getattr(evaluation, model)()
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="of each of the four arms")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER)
    add_results_option(parser)
    options = parser.parse_args()
    results = run(options.work, options.minutes)
    print(json.dumps(results, indent=2))
    print(save_result("starter-ablation", {"minutes of each arm": options.minutes, **results}, options.results))


if __name__ == "__main__":
    main()
