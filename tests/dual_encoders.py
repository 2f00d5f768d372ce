"""Tiny dual encoders with random weights, in the very formats of the published folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import Lowercase, Replace, Sequence, Strip
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    Tipsv2Config,
    Tipsv2Model,
    Tipsv2Tokenizer,
    XLMRobertaTokenizer,
)

from tests.families import build_model
from tests.models import IMAGE_SIZE, PREPROCESSOR, WORDS, write_json

CONTEXT = 16
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = _SIZES | {"image_size": IMAGE_SIZE, "patch_size": 8}
_SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
_CROPPED = {"do_center_crop": True, "crop_size": _SQUARE, "size": {"shortest_edge": IMAGE_SIZE}}
# What a dual encoder's folder is published as, and by which image processor it is read.
PACKED = ("clip", "laion", "metaclip_2", "siglip", "siglip2", "altclip", "chinese_clip")
KINDS = (*PACKED, "siglip2_naflex", "tipsv2")


def make_dual_encoder(folder: Path, kind: str = "clip", *, num_stray: int = 0) -> Path:
    """Writes the folder of a dual encoder.

    Args:
        kind: one of :data:`KINDS`: a ``model_type``, or ``laion``, a CLIP whose configuration has the end token of the
            first ones, or ``siglip2``, a SigLIP with the tokenizer of SigLIP 2, or ``siglip2_naflex``, which
            transformers calls siglip2.
        num_stray: words of the tokenizer that the model has no row for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {
        "clip": clip_tokenizer,
        "laion": clip_tokenizer,
        "metaclip_2": _xlm_roberta,
        "altclip": _xlm_roberta,
        "siglip": _sentence_pieces,
        "siglip2": _gemma,
        "siglip2_naflex": _gemma,
        "tipsv2": _tips,
        "chinese_clip": _bert,
    }[kind]()
    num_words = len(tokenizer)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(num_stray)])
    tokenizer.save_pretrained(folder)
    text: dict[str, Any] = _SIZES | {"vocab_size": num_words, "max_position_embeddings": CONTEXT}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if kind == "laion":
        text |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    elif kind == "altclip":
        text |= {"max_position_embeddings": CONTEXT + 2, "project_dim": 40}
    config_class, model_class = {
        "clip": (CLIPConfig, CLIPModel),
        "laion": (CLIPConfig, CLIPModel),
        "metaclip_2": (MetaClip2Config, MetaClip2Model),
        "altclip": (AltCLIPConfig, AltCLIPModel),
        "siglip": (SiglipConfig, SiglipModel),
        "siglip2": (SiglipConfig, SiglipModel),
        "siglip2_naflex": (Siglip2Config, Siglip2Model),
        "tipsv2": (Tipsv2Config, Tipsv2Model),
        "chinese_clip": (ChineseCLIPConfig, ChineseCLIPModel),
    }[kind]
    options = {} if kind.startswith(("siglip", "tips")) else {"projection_dim": 24}
    vision = _VISION | ({"hidden_act": "gelu"} if kind == "laion" else {})
    if kind == "siglip2_naflex":
        vision = _SIZES | {"patch_size": 8, "num_patches": 25}
    build_model(model_class, config_class(text_config=text, vision_config=vision, **options)).save_pretrained(folder)
    name = {"altclip": "CLIPFeatureExtractor", "chinese_clip": "ChineseCLIPFeatureExtractor"}.get(kind)
    values = {key: value for key, value in PREPROCESSOR.items() if key != "image_processor_type"}
    if kind.startswith("siglip"):
        half = [0.5, 0.5, 0.5]
        values |= {"image_processor_type": "SiglipImageProcessor", "image_mean": half, "image_std": half}
        if kind == "siglip2_naflex":
            values |= {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 20}
            del values["size"]
    elif kind == "tipsv2":
        values |= {"image_processor_type": "Tipsv2ImageProcessor", "do_normalize": False}
    elif name is not None:
        values |= {"feature_extractor_type": name} | (_CROPPED if kind == "altclip" else {"do_center_crop": False})
    else:
        values |= {"image_processor_type": "CLIPImageProcessor"} | _CROPPED
    write_json(folder / "preprocessor_config.json", values)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    """Byte pairs as OpenAI's, with merges for the words of the tests alone; the end token has the highest number."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(first + second for first, second in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    """Whole words, and letters for others."""
    letters = "abcdefghijklmnopqrstuvwxyz▁"
    return [
        *((piece, 0.0) for piece in special),
        *((f"▁{word}", -2.0) for word in WORDS),
        *((one, -9.0) for one in letters),
    ]


def _xlm_roberta() -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"]), model_max_length=CONTEXT)


def _sentence_pieces() -> PreTrainedTokenizerFast:
    """As the tokenizer.json of SigLIP: lower case, no punctuation, an end that is the padding too, and no mask."""
    tokenizer = Tokenizer(Unigram(_unigram(["<pad>", "</s>", "<unk>"]), unk_id=2))
    tokenizer.normalizer = Sequence(
        [Lowercase(), Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), Replace(Regex(r"\s+"), " "), Strip()]
    )
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids"],
    )


def _gemma() -> GemmaTokenizer:
    """As SigLIP 2's: byte pairs, an end but no begin, padding on the right, no mask, no length; it lowers nothing."""
    vocab, merges = _gemma_pairs()
    return GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        do_lower_case=True,
        model_input_names=["input_ids"],
    )


def _gemma_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = ["▁", *word]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz▁"]
    pieces = list(dict.fromkeys([*pieces, *(first + second for first, second in merges)]))
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _tips() -> Tipsv2Tokenizer:
    """Byte pairs of small letters, without begin or end."""
    vocab, merges = _gemma_pairs()
    return Tipsv2Tokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def _bert() -> BertTokenizer:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"红色汽车狗猫"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(vocab)}, model_max_length=CONTEXT)
