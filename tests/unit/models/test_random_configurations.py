"""Small models of random configuration, against what transformers and open_clip make of the same files."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.factory import load_checkpoint
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    ViltConfig,
    ViltForQuestionAnswering,
)

from tests.models import CLIP_MEAN, CLIP_STD, PREPROCESSOR, WORDS, as_images, make_clip, random_pixels, write_json
from vlmflow.config import ModelConfig
from vlmflow.models import load_answerer, load_captioner, load_embedder, load_matcher

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
TEXTS = ["a red car", "two cats and a dog on the table", "", "gun gun gun gun gun gun gun gun gun gun"]
SEEDS = [1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, *range(3, 103)))]


def sizes(random: Random) -> dict[str, Any]:
    heads = random.choice([1, 2, 3])
    return {
        "hidden_size": heads * random.choice([4, 6, 20]),
        "num_attention_heads": heads,
        "intermediate_size": random.choice([7, 48]),
        "num_hidden_layers": random.choice([1, 2, 3]),
        "hidden_act": random.choice(["gelu", "quick_gelu", "gelu_new", "relu", "silu", "tanh"]),
        "layer_norm_eps": random.choice([1e-12, 1e-5, 1e-3, 0.1]),
    }


def vision(random: Random) -> dict[str, Any]:
    """Some with pixels at the edge that are no whole patch."""
    patch = random.choice([4, 5, 8])
    return sizes(random) | {"patch_size": patch, "image_size": patch * random.choice([1, 2, 3]) + random.choice([0, 2])}


def stir(model: torch.nn.Module) -> None:
    """Random enough for pictures, words and places to count."""
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1 and len(weights) > 1:
                weights.normal_(std=weights[0].numel() ** -0.5)
            else:
                weights.normal_(mean=float("orm" in name and name.endswith("weight")), std=0.2)


def save(model: Any, folder: Path, random: Random, side: int, **processor: Any) -> None:
    stir(model)
    model.to(random.choice([torch.float32, torch.float16, torch.bfloat16])).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), bos_token="[DEC]").save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json", PREPROCESSOR | {"size": random.choice([side, [side, side]])} | processor
    )


def shown(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = AutoImageProcessor.from_pretrained(folder)(as_images(pixels), return_tensors="pt")[
        "pixel_values"
    ]
    return values


def blip(random: Random) -> BlipConfig:
    num_words = len(SPECIAL) + len(WORDS) + random.choice([0, 3])
    text = sizes(random) | {"vocab_size": num_words, "max_position_embeddings": random.choice([5, 24])}
    text |= {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": random.choice([3, 4]), "eos_token_id": 3}
    text |= {"tie_word_embeddings": random.random() < 0.7, "hidden_dropout_prob": 0.3}
    return BlipConfig(text_config=text, vision_config=vision(random), image_text_hidden_size=random.choice([4, 16]))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_blip_of_any_configuration_captions_as_generate_does(tmp_path: Path, seed: int) -> None:
    random, config = Random(seed), blip(Random(seed))
    torch.manual_seed(seed)
    side = config.vision_config.image_size
    save(BlipForConditionalGeneration(config), tmp_path, random, side)
    pixels, max_tokens = random_pixels(3, size=side), min(8, config.text_config.max_position_embeddings)
    reference = BlipForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    captioner = load_captioner(ModelConfig(family="blip_caption", path=str(tmp_path)), "cpu", "float32")
    for num_beams in (1, 3):
        tokens = reference.generate(shown(tmp_path, pixels), max_new_tokens=max_tokens, num_beams=num_beams)
        expected = AutoTokenizer.from_pretrained(tmp_path).batch_decode(tokens, skip_special_tokens=True)
        assert captioner.caption(pixels, 8, num_beams) == [text.strip() for text in expected]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_blip_of_any_configuration_matches_as_transformers_does(tmp_path: Path, seed: int) -> None:
    random, config = Random(seed), blip(Random(seed))
    torch.manual_seed(seed)
    side, most = config.vision_config.image_size, config.text_config.max_position_embeddings
    save(BlipForImageTextRetrieval(config), tmp_path, random, side)
    pixels = random_pixels(len(TEXTS), size=side)
    tokenizer, options = AutoTokenizer.from_pretrained(tmp_path), {"truncation": True, "max_length": most}
    words = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False, **options)
    reference = BlipForImageTextRetrieval.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        inputs = {"pixel_values": shown(tmp_path, pixels), **words}
        itm = reference(**inputs).itm_score.softmax(dim=1)[:, 1]
        itc = reference(**inputs, use_itm_head=False).itm_score.diagonal()
    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(tmp_path)), "cpu", "float32")
    images = matcher.encode_images(pixels)
    np.testing.assert_allclose(matcher.match_itm(images, TEXTS), itm, atol=1e-5)
    np.testing.assert_allclose(matcher.match_itc(images, TEXTS), itc, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_vilt_of_any_configuration_answers_as_transformers_does(tmp_path: Path, seed: int) -> None:
    random, config = Random(seed), ViltConfig(**vision(Random(seed)), vocab_size=50, max_position_embeddings=24)
    torch.manual_seed(seed)
    config.qkv_bias, config.num_labels = random.random() < 0.7, 7
    side = config.patch_size * random.choice([1, 2, 4])  # not always that of its positions
    processor = {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": side + 1}}
    model = ViltForQuestionAnswering(config)
    save(model, tmp_path, random, side, **processor, size_divisor=config.patch_size)
    pixels, asked = random_pixels(2, size=side), TEXTS[:2]
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(as_images(pixels), do_resize=False, return_tensors="pt")
    reference = ViltForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for question in asked:
        with torch.inference_mode():
            logits = reference(**tokenizer([question] * 2, return_tensors="pt"), **inputs).logits
        expected.append(logits.softmax(dim=-1).amax(dim=-1))
    answerer = load_answerer(ModelConfig(family="vilt", path=str(tmp_path)), "cpu", "float32")
    scores = [[answer.score for answer in answers] for answers in answerer.answer(pixels, [asked] * 2)]
    np.testing.assert_allclose(scores, torch.stack(expected, dim=1), atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_open_clip_of_any_configuration_embeds_as_open_clip_does(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    tower = {"layers": random.choice([0, 1, 3]), "width": 24, "head_width": random.choice([4, 12, 24])}
    further = [
        *({"pool_type": kind} for kind in ("avg", "tok")),
        *({"attentional_pool": True, "attn_pooler_heads": heads} for heads in (1, 2)),
        *({"ls_init_value": 0.3}, {"mlp_ratio": 1.5}, {"norm_kwargs": {"eps": 0.01}}, {"no_ln_pre": False}),
        *({"act_kwargs": {"approximate": "tanh"}}, {"pos_embed_type": "sin_cos_2d"}, {"final_ln_after_pool": True}),
        *({"qk_norm": True}, {"scale_heads": True}, {"scale_attn": True}, {"scale_fc": True}, {"patch_dropout": 0.5}),
    ]
    for values in random.sample(further, random.choice([1, 2, 3])):
        tower |= values
    folder = make_clip(tmp_path, seed=seed, half=random.random() < 0.3, vision=tower)
    pixels = random_pixels(3)
    reference = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    load_checkpoint(reference, str(folder / "open_clip_model.safetensors"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    with torch.inference_mode():
        expected = reference.encode_image((pixels / 255 - mean) / std, normalize=True)
    embedder = load_embedder(ModelConfig(family="open_clip", path=str(folder)), "cpu", "float32")
    np.testing.assert_allclose(embedder.embed_images(pixels), expected, atol=1e-5)
