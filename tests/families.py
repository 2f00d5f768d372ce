"""Tiny models with random weights of the other families, in the very formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AlignConfig,
    AlignModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    FlavaConfig,
    FlavaForPreTraining,
    FlavaModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GitConfig,
    GitForCausalLM,
    PreTrainedTokenizerFast,
    ShieldGemma2Config,
    ShieldGemma2ForImageClassification,
    ShieldGemma2Processor,
)

from tests.models import CHAT_TEMPLATE, IMAGE_SIZE, PREPROCESSOR, WORDS, write_json

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>")
_PAD, _CLS, _SEP, _IMAGE = 0, 2, 3, 4
_VOCAB_SIZE = len(_SPECIAL) + len(WORDS)
# Large enough for pictures, words and places to count: as built, all pictures would look nearly the same.
_RANGE = {"initializer_range": 0.2}


def make_blip2_captioner(folder: Path, *, t5: bool = False) -> Path:
    """Writes a `Blip2ForConditionalGeneration` folder, with an OPT or a T5 as its language model."""
    config = _blip2_config(_t5() if t5 else _opt())
    model = build_model(Blip2ForConditionalGeneration, config)
    with torch.no_grad():
        model.language_projection.weight.mul_(8)  # let the picture outweigh the first word
        if t5:
            # Flan-T5 has an output layer of its own, and so do the published checkpoints.
            weight = torch.randn_like(model.language_model.shared.weight)
            model.language_model.lm_head.weight = torch.nn.Parameter(weight)
        else:
            model.language_model.model.decoder.embed_positions.weight.mul_(4)
            model.language_model.get_input_embeddings().weight[_SEP] *= 1.5  # some captions end early
    model.save_pretrained(folder)
    if t5:
        _publish_as_flan(folder)
    _save_tokenizer(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    return folder


def make_blip2_matcher(folder: Path, *, seed: int = 0, vision_of: Path | None = None) -> Path:
    """Writes a `Blip2ForImageTextRetrieval` folder; ``vision_of``: a captioner with the same vision tower."""
    model = build_model(Blip2ForImageTextRetrieval, _blip2_config(_opt()), seed)
    if vision_of is not None:
        captioner = Blip2ForConditionalGeneration.from_pretrained(vision_of)
        model.vision_model.load_state_dict(captioner.vision_model.state_dict())
    with torch.no_grad():
        model.itm_head.weight.mul_(4)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    return folder


def make_gemma(folder: Path, *, shield: bool = False) -> Path:
    """Writes a Gemma 3 folder, or one of ShieldGemma 2, with a chat template that begins as the tokenizer does."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<boi>", "<img>", "<eoi>", "Yes", "No"]
    vocab = {word: number for number, word in enumerate([*special, "violate?", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {name: f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        **{f"{name}_token": token for name, token in names.items()},
    )
    fast.add_tokens(["<boi>", "<img>", "<eoi>"], special_tokens=True)
    config = (ShieldGemma2Config if shield else Gemma3Config)(
        text_config=_SIZES
        | _RANGE
        | {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(vocab)},
        vision_config=_SIZES | {"model_type": "siglip_vision_model", "image_size": IMAGE_SIZE, "patch_size": 8},
        mm_tokens_per_image=4,
        boi_token_index=vocab["<boi>"],
        image_token_index=vocab["<img>"],
        eoi_token_index=vocab["<eoi>"],
    )
    if shield:
        config.yes_token_index, config.no_token_index = vocab["Yes"], vocab["No"]
    model = build_model(ShieldGemma2ForImageClassification if shield else Gemma3ForConditionalGeneration, config)
    with torch.no_grad():  # as built it is zero, and all images look the same
        (model.model if shield else model).model.multi_modal_projector.mm_input_projection_weight.normal_()
    model.save_pretrained(folder)
    images = Gemma3ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    template = CHAT_TEMPLATE.replace("<image>", "<boi>") + (" violate?" if shield else "")
    processor_class = ShieldGemma2Processor if shield else Gemma3Processor
    processor_class(images, fast, image_seq_length=4, chat_template=template).save_pretrained(folder)
    return folder


def make_git(folder: Path, *, seed: int = 0, num_frames: int | None = None) -> Path:
    """Writes a `GitForCausalLM` folder; its processor crops, as the published ones do."""
    vision = _SIZES | _RANGE | {"image_size": IMAGE_SIZE, "patch_size": 8}
    tokens = {"bos_token_id": _CLS, "eos_token_id": _SEP, "pad_token_id": _PAD, "vocab_size": _VOCAB_SIZE}
    text = _SIZES | _RANGE | tokens | {"max_position_embeddings": 40}
    config = GitConfig(vision_config=vision, num_image_with_embedding=num_frames, **text)
    model = build_model(GitForCausalLM, config, seed)
    with torch.no_grad():
        model.git.visual_projection.visual_projection[1].weight.mul_(3)
        model.output.bias[_SEP] = 1.5  # some captions end early
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    crop = {"do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    size = {"size": {"shortest_edge": IMAGE_SIZE}}
    write_json(
        folder / "preprocessor_config.json", PREPROCESSOR | {"image_processor_type": "CLIPImageProcessor"} | crop | size
    )
    return folder


def make_flava(folder: Path, *, with_head: bool = True) -> Path:
    """Writes a `FlavaForPreTraining` folder with its image codebook, or a `FlavaModel`, which has no matching head."""
    image = _SIZES | _RANGE | {"image_size": IMAGE_SIZE, "patch_size": 8, "vocab_size": 16}
    text = _SIZES | _RANGE | {"vocab_size": _VOCAB_SIZE, "max_position_embeddings": 24}
    config = FlavaConfig(
        image_config=image,
        text_config=text,
        multimodal_config=_SIZES | _RANGE,
        image_codebook_config={"hidden_size": 4, "vocab_size": 16},
        hidden_size=32,
        projection_dim=24,
        **_RANGE,
    )
    model = build_model(FlavaForPreTraining if with_head else FlavaModel, config)
    if with_head:
        with torch.no_grad():
            model.itm_head.seq_relationship.weight.mul_(4)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    crop = {"do_center_crop": True, "crop_size": side, "size": side}
    write_json(
        folder / "preprocessor_config.json", PREPROCESSOR | {"image_processor_type": "FlavaImageProcessor"} | crop
    )
    return folder


def make_align(folder: Path) -> Path:
    """Writes an `AlignModel` folder; its processor crops and offsets, as the published one does."""
    vision = {
        "image_size": IMAGE_SIZE,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 5],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 6],
        "hidden_dim": 24,
        **_RANGE,
    }
    text = _SIZES | _RANGE | {"vocab_size": _VOCAB_SIZE, "max_position_embeddings": 24}
    model = build_model(AlignModel, AlignConfig(text_config=text, vision_config=vision, projection_dim=24))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics of training, which a new model has not
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.01, 0.1, generator=generator)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    side, larger = ({"height": size, "width": size} for size in (IMAGE_SIZE, IMAGE_SIZE + 8))
    changes = {"resample": 2, "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False}
    changes |= {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    changes |= {"do_center_crop": True, "crop_size": side, "size": larger}
    write_json(
        folder / "preprocessor_config.json",
        PREPROCESSOR | {"image_processor_type": "EfficientNetImageProcessor"} | changes,
    )
    return folder


def _blip2_config(text: dict[str, Any]) -> Blip2Config:
    vision = _SIZES | _RANGE | {"image_size": IMAGE_SIZE, "patch_size": 8}
    former = (
        _SIZES | _RANGE | {"vocab_size": _VOCAB_SIZE, "max_position_embeddings": 24, "use_qformer_text_input": True}
    )
    options = {"num_query_tokens": 4, "image_text_hidden_size": 16, "image_token_index": _IMAGE}
    return Blip2Config(vision_config=vision, qformer_config=former, text_config=text, **options, **_RANGE)


def _opt() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": _CLS, "eos_token_id": _SEP, "pad_token_id": _PAD, "vocab_size": _VOCAB_SIZE}
    return {"model_type": "opt", "word_embed_proj_dim": 32, "init_std": 0.2, **sizes, **tokens}


def _t5() -> dict[str, Any]:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    tokens = {"bos_token_id": _CLS, "eos_token_id": _SEP, "pad_token_id": _PAD, "decoder_start_token_id": _PAD}
    flan = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": _VOCAB_SIZE}
    return {"model_type": "t5", **sizes, **tokens, **flan}


def _publish_as_flan(folder: Path) -> None:
    """transformers saves that the weights are tied, whatever they are; Flan-T5's published configuration does not."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["tie_word_embeddings"] = False
    write_json(path, config)


def build_model(model_class: Any, config: Any, seed: int = 0) -> Any:
    """A model whose weights are random enough for pictures, words and places to count."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:  # the factories of some parts know no range, or begin with nought
                weights.normal_(std=max(weights[0].numel() ** -0.5, 0.1))
            elif name.endswith("bias"):
                weights.normal_(std=0.1)
    return model


def _save_tokenizer(folder: Path) -> None:
    """One token a word, between [CLS] and [SEP]."""
    vocab = {word: number for number, word in enumerate([*_SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    ends = [("[CLS]", _CLS), ("[SEP]", _SEP)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        additional_special_tokens=["<image>"],
    )
    fast.save_pretrained(folder)
