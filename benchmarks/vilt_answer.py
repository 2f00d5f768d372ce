"""Answers a second of our ViLT beside the model of transformers.

``python -m benchmarks.vilt_answer --device cuda`` (or ``cpu``) builds a ViLT-base of the real size (384 px in patches
of 32, 118 million parameters, 3,129 answers) with random weights, and asks one question of 6 to 14 tokens about each of
the same images with both in one process, turn about, in float32 and bfloat16, from pixels and tokens to the number of
the answer; transformers is given pixels that are normalised and questions that are padded already. A third side is
transformers given the embedded patches too, without the loop that shuffles those of each image. Of the repeats the best
counts. The multiplications and additions that the answers need, over the time, are set against the best of a plain
product of large matrices on the same device, measured between the repeats.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import ViltConfig, ViltForQuestionAnswering

from benchmarks.side_by_side import Place, Run, Workload, compare
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing
from vlmflow.models.vilt_fast import ViltTower

SIZE, PATCH, WIDTH, LAYERS, ANSWERS = 384, 32, 768, 12, 3129
LENGTHS = (6, 14)  # tokens of a question, special ones included
_PREPROCESSING = Preprocessing(SIZE, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def build_model(device: str) -> Any:
    """The size of `vilt-b32-finetuned-vqa`; as built all places would be alike."""
    torch.manual_seed(0)
    config = ViltConfig(num_hidden_layers=LAYERS, num_labels=ANSWERS)
    model = ViltForQuestionAnswering(config).eval().requires_grad_(False)
    model.vilt.embeddings.position_embeddings.normal_(std=0.02)
    model.vilt.embeddings.cls_token.normal_(std=0.02)
    return model.to(device)


def questions(count: int) -> list[list[int]]:
    """Random tokens, of lengths that follow no order."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (count,), generator=generator).tolist()
    return [torch.randint(1000, 30_000, (length,), generator=generator).tolist() for length in lengths]


class Reference:
    """What transformers is given, prepared at the first call of each size."""

    def __init__(self, model: Any, tower: ViltTower, normalize: PixelNormalizer) -> None:
        self._model, self._tower, self._normalize = model, tower, normalize
        self._prepared: dict[int, tuple[dict[str, torch.Tensor], ...]] = {}

    def from_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        texts, images, _ = self._inputs(pixels)
        return number_of(self._model(**texts, **images).logits)

    def from_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        texts, _, patches = self._inputs(pixels)
        return number_of(self._model(**texts, **patches).logits)

    def _inputs(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], ...]:
        if len(pixels) not in self._prepared:
            ids = [torch.tensor(tokens) for tokens in questions(len(pixels))]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            values = self._normalize(pixels)
            patches = self._tower.embed(pixels).to(values.dtype)
            kind = self._model.vilt.embeddings.token_type_embeddings.weight[1]  # which the model adds itself
            texts = {"input_ids": padded, "attention_mask": (padded > 0).long()}
            ones = torch.ones(patches.shape[:2], dtype=torch.long, device=values.device)
            self._prepared[len(pixels)] = (
                {name: value.to(values.device) for name, value in texts.items()},
                {"pixel_values": values},
                {"image_embeds": patches - kind, "pixel_mask": ones},
            )
        return self._prepared[len(pixels)]


def number_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=1, keepdim=True)


def sides(model: Any, place: Place) -> dict[str, Run]:
    """Ours and transformers', on the same weights: pixels to (N, 1) numbers of answers."""
    normalize = PixelNormalizer(_PREPROCESSING, *place)
    tower = ViltTower(model, normalize, SIZE)
    reference = Reference(model, tower, normalize)

    def ours(pixels: torch.Tensor) -> torch.Tensor:
        return number_of(tower.logits(tower.embed(pixels), range(len(pixels)), questions(len(pixels))))

    return {"ours": ours, "transformers": reference.from_pixels, "transformers_from_patches": reference.from_patches}


def flops_per_answer() -> float:
    """Twice the multiplications of all products that a question of mean length needs; of the last layer one token's."""
    patches = (SIZE // PATCH) ** 2
    tokens = patches + 1 + sum(LENGTHS) / 2
    layer = 12 * WIDTH * WIDTH  # of weights: four projections, and two of four times the width
    before = (LAYERS - 1) * tokens * (layer + 2 * tokens * WIDTH)
    last = tokens * 2 * WIDTH * WIDTH + (layer - 2 * WIDTH * WIDTH) + 2 * tokens * WIDTH
    head = WIDTH * WIDTH + 2 * WIDTH * WIDTH + 2 * WIDTH * ANSWERS
    return 2.0 * (patches * 3 * PATCH * PATCH * WIDTH + before + last + head)


def main() -> None:
    compare(Workload("vilt_answer", "answer", __doc__ or "", SIZE, flops_per_answer(), build=build_model, sides=sides))


if __name__ == "__main__":
    main()
