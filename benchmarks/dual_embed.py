"""Images a second of dual encoders' image encoders, with packed layers beside those of transformers.

``python -m benchmarks.dual_embed --device cuda`` (or ``cpu``) builds the image encoders of SigLIP base (patches of 16,
224 px, 93 million parameters) and of CLIP ViT-L/14 (224 px, 304 million; its sides end in ``_clip``) with random
weights, and embeds the same images with packed layers and with those of transformers in one process, turn about, in
float32 and bfloat16, from pixels to features. Equal are images whose feature is nearest to the same of 100 random
vectors. Of the repeats the best counts. On CUDA no job packs these layers yet: that waits for this figure.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from benchmarks.side_by_side import Place, Run, Workload, compare
from vlmflow.models.dual_encoder import pack_layers
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing
from vlmflow.models.sizes import in_few_sizes

SIZE_PX = 224
SIGLIP: dict[str, Any] = {"image_size": SIZE_PX}  # as transformers has it by default
CLIP: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "image_size": SIZE_PX,
}
# Of the encoders of texts, which nobody runs, next to nothing.
_NO_TEXT = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "vocab_size": 64}
_NUM_PROBES = 100


class Models:
    """Both in float32; stands for a model that is cast."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.models: dict[str, Any] = {
            "": SiglipModel(SiglipConfig(text_config=_NO_TEXT, vision_config=SIGLIP)),
            "_clip": CLIPModel(CLIPConfig(text_config=_NO_TEXT, vision_config=CLIP, projection_dim=768)),
        }
        for model in self.models.values():
            model.eval().requires_grad_(False).to(device)

    def to(self, dtype: torch.dtype) -> Models:
        """Each side is cast later, as a job casts it."""
        return self


def sides(models: Models, place: Place) -> dict[str, Run]:
    """Of both models, pixels to (N, 1) numbers of the nearest probe."""
    device, dtype = place
    found: dict[str, Run] = {}
    for name, model in models.models.items():
        packed, theirs = copy.deepcopy(model), copy.deepcopy(model).to(dtype)
        carried = torch.float32 if device == "cpu" else dtype  # as :class:`vlmflow.models.dual_encoder.DualEmbedder`
        pack_layers(packed, dtype, carried)
        found[f"ours{name}"] = partial(_nearest, packed.to(carried), _normalizer(device, carried))
        found[f"transformers{name}"] = partial(_nearest, theirs, _normalizer(device, dtype))
    return found


def _normalizer(device: str, dtype: torch.dtype) -> PixelNormalizer:
    return PixelNormalizer(Preprocessing(SIZE_PX, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), device, dtype)


def _nearest(model: Any, normalize: PixelNormalizer, pixels: torch.Tensor) -> torch.Tensor:
    def encode(given: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = model.get_image_features(pixel_values=normalize(given), return_dict=True).pooler_output
        return features

    features = in_few_sizes(encode, pixels, normalize).float()
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(_NUM_PROBES, features.shape[1], generator=generator).to(features.device)
    return (features @ probes.T).argmax(dim=1, keepdim=True)


def flops_per_image() -> float:
    """Twice the multiplications of all products of SigLIP's image encoder but its head's."""
    config = SiglipConfig(vision_config=SIGLIP).vision_config
    tokens, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
    layer = tokens * (4 * width * width + 2 * width * config.intermediate_size) + 2 * tokens * tokens * width
    return 2.0 * (tokens * 3 * config.patch_size**2 * width + config.num_hidden_layers * layer)


def main() -> None:
    compare(Workload("dual_embed", "image", __doc__ or "", SIZE_PX, flops_per_image(), Models, sides))


if __name__ == "__main__":
    main()
