"""Tiny models with random weights, in the very formats of the real ones: for tests that need a folder to load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torchvision.transforms.functional import to_pil_image
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViltConfig,
    ViltForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

IMAGE_SIZE = 32
_WORDS = """a an the and of on with picture photo drawing two three four red green blue yellow white black grey apple
apples banana car cars dog cat gun guns bottle wine shoe shirt chair table phone cup house tree"""
WORDS = tuple(_WORDS.split())
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
PREPROCESSOR = {
    "image_processor_type": "BlipImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}


def make_clip(
    folder: Path,
    *,
    seed: int = 0,
    siglip: bool = False,
    half: bool = False,
    embed_dim: int | None = None,
    vision: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Writes an open_clip folder: a CLIP with word-level tokens, or a SigLIP with its kind of towers and pixels.

    Args:
        vision: further values of ``vision_cfg``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _save_word_tokenizer(folder, siglip=siglip)
    text: dict[str, Any] = {"context_length": 16, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 2}
    text["hf_tokenizer_name"] = "in-this-folder"
    model: dict[str, Any] = {"embed_dim": embed_dim or (64 if siglip else 24), "text_cfg": text}
    model["vision_cfg"] = {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    pixels = {"size": IMAGE_SIZE, "mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"}
    if siglip:
        model |= {"custom_text": True, "init_logit_bias": -10}
        model["vision_cfg"] = {"image_size": IMAGE_SIZE, "timm_model_name": "test_vit"}
        model["vision_cfg"] |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
        text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
        text["tokenizer_kwargs"] = {"clean": "canonicalize"}
        pixels |= {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    else:
        model["vision_cfg"] |= {"no_ln_pre": True} | dict(vision)
    write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": pixels})
    torch.manual_seed(seed)
    built = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = {name: value.half() if half else value for name, value in built.state_dict().items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "open_clip_model.safetensors")
    return folder


def make_captioner(folder: Path, *, seed: int = 2) -> Path:
    """Writes a `BlipForConditionalGeneration` folder whose captions differ in content and length."""
    model = _make_blip(BlipForConditionalGeneration, folder, seed)
    _stir(model.text_decoder)
    model.save_pretrained(folder)
    return folder


def make_blip_vqa(folder: Path, *, seed: int = 2) -> Path:
    """Writes a `BlipForQuestionAnswering` folder whose answers differ with picture and question."""
    model = _make_blip(BlipForQuestionAnswering, folder, seed)
    _stir(model.text_decoder)
    model.save_pretrained(folder)
    return folder


def make_vilt(folder: Path) -> Path:
    """Writes a `ViltForQuestionAnswering` folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    side = {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": IMAGE_SIZE}, "size_divisor": 8}
    write_json(folder / "preprocessor_config.json", PREPROCESSOR | side | {"do_pad": True})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViltConfig(
        vocab_size=len(vocab),
        image_size=IMAGE_SIZE,
        patch_size=8,
        max_position_embeddings=16,
        initializer_range=0.4,
        id2label=dict(enumerate(WORDS)),
        label2id={word: number for number, word in enumerate(WORDS)},
        **sizes,
    )
    torch.manual_seed(3)
    model = ViltForQuestionAnswering(config).eval()
    with torch.no_grad():  # as built all positions are equal, and so are all answers
        model.vilt.embeddings.position_embeddings.normal_(std=0.4)
        model.vilt.embeddings.cls_token.normal_(std=0.4)
    model.save_pretrained(folder)
    return folder


def make_matcher(folder: Path) -> Path:
    """Writes a `BlipForImageTextRetrieval` folder."""
    model = _make_blip(BlipForImageTextRetrieval, folder, 0)
    with torch.no_grad():
        model.itm_head.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def make_classifier(folder: Path) -> Path:
    """Writes a ViT with a classification head, as transformers saves it."""
    torch.manual_seed(0)
    classes = {0: "drawings", 1: "hentai", 2: "neutral"}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        id2label=classes,
        label2id={name: number for number, name in classes.items()},
        **sizes,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder


def make_judge(folder: Path, *, chat: bool = False) -> Path:
    """Writes a LLaVA with word-level tokens, as transformers saves it.

    Args:
        chat: with a chat template that begins with the token that the tokenizer puts first, as many do.
    """
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<image>",
        "Yes",
        "No",
        "Does",
        "the",
        "picture",
        "show",
        "a",
        "gun",
        "car",
    ]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens(["<image>"], special_tokens=True)
    if chat:
        first = [("<s>", words.index("<s>"))]
        fast.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=8, **sizes),
        text_config=LlamaConfig(num_key_value_heads=2, vocab_size=len(fast), **sizes),
        image_token_index=words.index("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
    processor = LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    if chat:
        processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


def random_pixels(num_images: int, *, size: int = IMAGE_SIZE, seed: int = 0) -> torch.Tensor:
    """(N, 3, S, S) uint8, flat colours with noise: pictures that differ more than pure noise does."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (num_images, 3, 1, 1), generator=generator)
    noise = torch.randint(-60, 60, (num_images, 3, size, size), generator=generator)
    return (colours + noise).clamp(0, 255).to(torch.uint8)


def as_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels as pictures, for the libraries' own processors."""
    return [to_pil_image(image) for image in pixels]


def write_json(path: Path, content: object) -> None:
    """Writes a configuration file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def _make_blip(model_class: Any, folder: Path, seed: int) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True, bos_token="[DEC]").save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    text = {"vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40, "initializer_range": 0.2}
    text |= {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # The default of transformers, 1e-10, would make every picture look the same.
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 8, "initializer_range": 0.2}
    torch.manual_seed(seed)
    return model_class(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)).eval()


def _stir(decoder: Any) -> None:
    """As built, random weights repeat one word whatever the picture: lets words, places and pictures all count."""
    with torch.no_grad():
        for weights in decoder.parameters():
            if weights.ndim == 2:
                weights.normal_(std=weights.shape[1] ** -0.5)
        decoder.bert.embeddings.position_embeddings.weight.mul_(3)
        for layer in decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight.mul_(2)
        decoder.cls.predictions.bias[3] = 0.9  # [SEP]: some captions end early


def _save_word_tokenizer(folder: Path, *, siglip: bool) -> int:
    """One token a word; the end token has the highest number, because CLIP pools where that is."""
    end = "[EOS]"
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *WORDS, end])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    single = f"$A {end}" if siglip else f"[BOS] $A {end}"
    special = [(token, vocab[token]) for token in ("[BOS]", end)]
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token=end,
        # SigLIP pads with its end token, and pools at the last place.
        pad_token=end if siglip else "[PAD]",
    )
    fast.save_pretrained(folder)
    return len(vocab)
