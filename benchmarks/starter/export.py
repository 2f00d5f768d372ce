"""Writes trained stages as the folders that open_clip and transformers load, with fp16 safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipVisionModel,
    PreTrainedModel,
    ViltForQuestionAnswering,
    ViltImageProcessor,
)

from benchmarks.starter.captions import CONTEXT_LENGTH
from benchmarks.starter.models import PIXEL_MEAN, PIXEL_STD, Matcher, Sizes, Trunk, blip_config

CLIP_NAME, CAPTIONER_NAME, MATCHER_NAME, VQA_NAME = "clip", "captioner", "matcher", "vqa"
_BICUBIC = 3


def export_clip(trunk: Trunk, sizes: Sizes, tokenizer: BertTokenizer, folder: Path) -> None:
    """open_clip's own format, for ``local-dir:`` names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": {
            "embed_dim": sizes.width,
            "vision_cfg": {
                "image_size": sizes.side_px,
                "layers": sizes.vision_layers,
                "width": sizes.width,
                "head_width": sizes.width // sizes.heads,
                "patch_size": sizes.patch_px,
                "no_ln_pre": True,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": sizes.vocabulary,
                "width": sizes.width,
                "heads": sizes.heads,
                "layers": sizes.text_layers,
                # open_clip reads the tokenizer from the folder of a local-dir: name; the value only has to be there.
                "hf_tokenizer_name": ".",
            },
        },
        "preprocess_cfg": {
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {f"visual.{name}": weight for name, weight in _open_clip_vision(trunk.vision).items()}
    weights |= {"visual.proj": trunk.visual_projection, "logit_scale": trunk.logit_scale.clamp(max=4.6052)}
    weights |= dict(trunk.text.state_dict())
    save_file(_half(weights), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def export_captioner(trunk: Trunk, sizes: Sizes, tokenizer: BertTokenizer, folder: Path) -> None:
    """A ``BlipForConditionalGeneration`` folder."""
    model = BlipForConditionalGeneration(blip_config(sizes, tokenizer))
    model.vision_model.load_state_dict(trunk.vision.state_dict())
    model.text_decoder.load_state_dict(trunk.decoder.state_dict())
    _save(model, tokenizer, folder, _blip_preprocessor(sizes.side_px))


def export_matcher(
    matcher: Matcher, vision: BlipVisionModel, sizes: Sizes, tokenizer: BertTokenizer, folder: Path
) -> None:
    """A ``BlipForImageTextRetrieval`` folder."""
    model = BlipForImageTextRetrieval(blip_config(sizes, tokenizer))
    model.vision_model.load_state_dict(vision.state_dict())
    for name in ("text_encoder", "vision_proj", "text_proj", "itm_head"):
        part: nn.Module = getattr(model, name)
        part.load_state_dict(getattr(matcher, name).state_dict())
    _save(model, tokenizer, folder, _blip_preprocessor(sizes.side_px))


def export_vqa(model: ViltForQuestionAnswering, sizes: Sizes, tokenizer: BertTokenizer, folder: Path) -> None:
    """A ``ViltForQuestionAnswering`` folder."""
    processor = ViltImageProcessor(
        do_resize=True,
        size={"shortest_edge": sizes.side_px},
        size_divisor=sizes.patch_px,
        resample=_BICUBIC,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    _save(model, tokenizer, folder, processor)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an exported folder, in float32."""
    (path,) = folder.glob("*.safetensors")
    return {name: weight.float() for name, weight in load_file(path).items()}


def import_trunk(trunk: Trunk, target: Path) -> None:
    """Puts the weights of exported folders back: the tower and the decoder of the captioner, the rest of CLIP."""
    captioner, clip = read_weights(target / CAPTIONER_NAME), read_weights(target / CLIP_NAME)
    trunk.vision.load_state_dict(_below(captioner, "vision_model."))
    trunk.decoder.load_state_dict(_below(captioner, "text_decoder."), strict=False)  # tied weights are saved once
    trunk.decoder.tie_weights()
    own = ("visual.", "logit_scale")
    trunk.text.load_state_dict({name: weight for name, weight in clip.items() if not name.startswith(own)})
    with torch.no_grad():
        trunk.visual_projection.copy_(clip["visual.proj"])
        trunk.logit_scale.copy_(clip["logit_scale"])


def import_matcher(matcher: Matcher, folder: Path) -> None:
    """Puts the weights of an exported matcher back."""
    weights = read_weights(folder)
    for name in ("text_encoder", "vision_proj", "text_proj", "itm_head"):
        part: nn.Module = getattr(matcher, name)
        part.load_state_dict(_below(weights, f"{name}."))


def _below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _blip_preprocessor(side_px: int) -> BlipImageProcessor:
    return BlipImageProcessor(
        do_resize=True,
        size={"height": side_px, "width": side_px},
        resample=_BICUBIC,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
        do_convert_rgb=True,
    )


def _save(model: PreTrainedModel, tokenizer: BertTokenizer, folder: Path, processor: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.half().save_pretrained(folder)
    # fp16 is how the weights are kept, not how they are to be run: from_pretrained takes its dtype from here.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().half().contiguous().cpu() for name, weight in weights.items()}


def _open_clip_vision(vision: BlipVisionModel) -> dict[str, torch.Tensor]:
    """The tower under open_clip's names; q, k and v are packed in the same order in both."""
    state = vision.state_dict()
    assert not state["embeddings.patch_embedding.bias"].any(), "open_clip's patches have no offset"
    weights = {
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "class_embedding": state["embeddings.class_embedding"][0, 0],
        "positional_embedding": state["embeddings.position_embedding"][0],
        "ln_post.weight": state["post_layernorm.weight"],
        "ln_post.bias": state["post_layernorm.bias"],
    }
    names = {
        "layer_norm1.": "ln_1.",
        "layer_norm2.": "ln_2.",
        "self_attn.qkv.": "attn.in_proj_",
        "self_attn.projection.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    for layer in range(len(vision.encoder.layers)):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                target = f"transformer.resblocks.{layer}.{ours}{kind}"
                weights[target] = state[f"encoder.layers.{layer}.{theirs}{kind}"]
    return weights
