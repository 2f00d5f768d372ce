"""Models of real architectures and sizes with random weights, in the folders that jobs name: for time, not sense.

A caption of theirs never ends before its last token, and words and pictures all count.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from vlmflow.config import ModelConfig

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT_B_32: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
VIT_L_14: dict[str, Any] = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def write_models(folder: Path, *, tiny: bool) -> dict[str, ModelConfig]:
    """BLIP-base for captions and for matching, and CLIP ViT-L/14; or something tiny in their form.

    Captioner and matcher have vision towers of their own, as the published checkpoints have.
    """
    return {
        "embed": ModelConfig(
            family="open_clip", path=str(write_clip(folder / "clip", TINY_CLIP if tiny else VIT_L_14))
        ),
        "caption": ModelConfig(
            family="blip_caption", path=str(_write_blip(BlipForConditionalGeneration, folder / "captioner", 0, tiny))
        ),
        "match": ModelConfig(
            family="blip_itm", path=str(_write_blip(BlipForImageTextRetrieval, folder / "matcher", 1, tiny))
        ),
    }


def write_clip(folder: Path, architecture: dict[str, Any]) -> Path:
    """A CLIP of open_clip's architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    side = architecture["vision_cfg"]["image_size"]
    pixels = {"size": side, "mean": _MEAN, "std": _STD, "interpolation": "bicubic"}
    config = {"model_cfg": architecture, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    logging.getLogger().setLevel(logging.ERROR)  # "initialized randomly"
    torch.manual_seed(2)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def _write_blip(model_class: Any, folder: Path, seed: int, tiny: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    size, vocab_size = (64, 400) if tiny else (384, 30_524)
    words = [*_SPECIAL, *(f"word{number}" for number in range(vocab_size - len(_SPECIAL)))]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), bos_token="[DEC]").save_pretrained(folder)
    pixels = {
        "image_processor_type": "BlipImageProcessor",
        "image_mean": _MEAN,
        "image_std": _STD,
        "resample": 3,
        "size": {"height": size, "width": size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    text: dict[str, Any] = {"num_attention_heads": 12, "encoder_hidden_size": 768, "vocab_size": vocab_size}
    text |= {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3, "initializer_range": 0.02}
    vision: dict[str, Any] = {"image_size": size, "initializer_range": 0.02}
    if tiny:
        text, vision = text | _TINY | {"encoder_hidden_size": 64}, vision | _TINY
    torch.manual_seed(seed)
    model = model_class(BlipConfig(text_config=text, vision_config=vision)).eval()
    if hasattr(model, "text_decoder"):
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[3] = -1e4  # [SEP] never comes
    model.save_pretrained(folder)
    return folder
