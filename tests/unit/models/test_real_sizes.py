"""Every architecture at its published size, on the meta device: no memory, no weights, all shapes.

Published sizes are those of the weight files that the hub lists, in float32 (4 bytes a value; three digits are given),
or the number of parameters where the card tells it. What differs from the parameters counted here is added by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import pytest
import torch
from transformers import (
    AlignConfig,
    AlignModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    FlavaConfig,
    FlavaForPreTraining,
    GitConfig,
    GitForCausalLM,
    SiglipConfig,
    SiglipModel,
    ViltConfig,
    ViltForQuestionAnswering,
)

from vlmflow.models.profiles import PROFILES

_GB = 1e9 / 4  # float32 values
_MB = 1e6 / 4

# What the published config.json files say apart from the defaults of transformers, which are those of the first
# checkpoint of each architecture.
_BLIP_TEXT = {"num_attention_heads": 12, "encoder_hidden_size": 768}
_BLIP_LARGE_TEXT = {"num_attention_heads": 12, "encoder_hidden_size": 1024}
_VIT_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_OPT = {"model_type": "opt", "vocab_size": 50304, "hidden_size": 2560, "ffn_dim": 10240, "eos_token_id": 50118}
_OPT |= {"num_hidden_layers": 32, "num_attention_heads": 32, "word_embed_proj_dim": 2560}
_FLAN_T5_XL = {"model_type": "t5", "vocab_size": 32128, "d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32}
_FLAN_T5_XL |= {"num_layers": 24, "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "bos_token_id": 1}
_FLAN_T5_XL |= {"tie_word_embeddings": False}
_ITM_FORMER = {"use_qformer_text_input": True, "vocab_size": 30523}

# The output layers of BLIP's decoders share the word embeddings, and are in the files beside them.
_BLIP_OUTPUT = 30524 * 768
# The output layer of Flan-T5 is one of its own, which transformers knows once it meets it in the weights.
_FLAN_OUTPUT = 32128 * 2048


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], Any]
    published: float  # values
    source: str  # of the hub, or a page
    stored_beside: int = 0


def clip(name: str) -> Callable[[], Any]:
    return lambda: open_clip.create_model(name, load_weights=False, device="meta")


def blip(model_class: Any, *, text: dict[str, Any] = _BLIP_TEXT, **vision: Any) -> Callable[[], Any]:
    return lambda: model_class(BlipConfig(text_config=text, vision_config={"image_size": 384, **vision}))


def blip2(model_class: Any, token: int, text: dict[str, Any], former: dict[str, Any]) -> Callable[[], Any]:
    return lambda: model_class(Blip2Config(text_config=text, qformer_config=former, image_token_index=token))


CASES = [
    Case("clip", clip("ViT-B-32"), 151.28e6, "open_clip: docs/model_profile.csv"),
    Case("clip-large", clip("ViT-L-14"), 427.62e6, "open_clip: docs/model_profile.csv"),
    Case(
        "blip-caption",
        blip(BlipForConditionalGeneration),
        990 * _MB,
        "Salesforce/blip-image-captioning-base",
        _BLIP_OUTPUT,
    ),
    Case("blip-itm", blip(BlipForImageTextRetrieval), 895 * _MB, "Salesforce/blip-itm-base-coco"),
    Case(
        "blip-itm-large",
        blip(BlipForImageTextRetrieval, text=_BLIP_LARGE_TEXT, **_VIT_LARGE),
        1.78 * _GB,
        "Salesforce/blip-itm-large-coco",
    ),
    Case("blip-vqa", blip(BlipForQuestionAnswering), 1.54 * _GB, "Salesforce/blip-vqa-base", _BLIP_OUTPUT),
    Case(
        "vilt-vqa",
        lambda: ViltForQuestionAnswering(ViltConfig(num_labels=3129)),
        470 * _MB,
        "dandelin/vilt-b32-finetuned-vqa",
    ),
    Case(
        "blip2-opt",
        blip2(Blip2ForConditionalGeneration, 50265, _OPT, {}),
        3.74e9,
        "Salesforce/blip2-opt-2.7b: 3.74B parameters",
    ),
    Case(
        "blip2-t5",
        blip2(Blip2ForConditionalGeneration, 32100, _FLAN_T5_XL, {}),
        (9.96 + 5.81) * _GB,
        "Salesforce/blip2-flan-t5-xl",
        _FLAN_OUTPUT,
    ),
    Case(
        "blip2-itm",
        blip2(Blip2ForImageTextRetrieval, 30523, {"model_type": "opt"}, _ITM_FORMER),
        4.69 * _GB,
        "Salesforce/blip2-itm-vit-g",
    ),
    Case("git", lambda: GitForCausalLM(GitConfig()), 707 * _MB, "microsoft/git-base-coco"),
    Case(
        "git-large",
        lambda: GitForCausalLM(GitConfig(vision_config=_VIT_LARGE | {"patch_size": 14})),
        394e6,
        "microsoft/git-large-coco: 394M parameters",
    ),
    Case("flava", lambda: FlavaForPreTraining(FlavaConfig()), 1.43 * _GB, "facebook/flava-full"),
    Case("align", lambda: AlignModel(AlignConfig()), 690 * _MB, "kakaobrain/align-base"),
    Case("dual-clip", lambda: CLIPModel(CLIPConfig()), 605 * _MB, "openai/clip-vit-base-patch32"),
    Case("dual-siglip", lambda: SiglipModel(SiglipConfig()), 813 * _MB, "google/siglip-base-patch16-224"),
]


def build(name: str) -> Any:
    (case,) = (case for case in CASES if case.name == name)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that nothing is loaded, and which defaults are taken
    try:
        with torch.device("meta"):
            return case.build().eval()
    finally:
        logging.disable(before)


def num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_number_of_parameters_is_the_published_one(case: Case) -> None:
    found = num_parameters(build(case.name)) + case.stored_beside
    assert found == pytest.approx(case.published, rel=0.01), case.source


@pytest.mark.parametrize(
    ("profile", "role", "case", "beside"),
    [
        ("base", "embed", "clip", 0),
        ("base", "caption", "blip-caption", 0),
        ("base", "match", "blip-itm", 0),
        ("large", "embed", "clip-large", 0),
        ("large", "match", "blip-itm-large", 0),
        ("blip2", "caption", "blip2-t5", _FLAN_OUTPUT),
        ("blip2", "match", "blip2-itm", 0),
        ("git", "caption", "git-large", 0),
        ("flava", "embed", "flava", 0),
        ("flava", "caption", "git", 0),
        ("align", "match", "align", 0),
    ],
)
def test_profiles_tell_the_number_of_parameters(profile: str, role: str, case: str, beside: int) -> None:
    model = PROFILES[profile].models[role]  # type: ignore[index]
    assert model.num_parameters == num_parameters(build(case)) + beside


def pictures(size: int) -> torch.Tensor:
    return torch.empty(2, 3, size, size, device="meta")


def words(length: int) -> torch.Tensor:
    return torch.zeros(2, length, dtype=torch.int64, device="meta")


@torch.inference_mode()
def test_shapes_of_blip2() -> None:
    captioner, matcher = build("blip2-opt"), build("blip2-itm")
    patches = captioner.vision_model(pictures(224)).last_hidden_state
    assert patches.shape == (2, 257, 1408)
    assert matcher.vision_model.state_dict().keys() == captioner.vision_model.state_dict().keys()
    queries = captioner.query_tokens.expand(2, -1, -1)
    seen = captioner.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
    assert captioner.language_projection(seen).shape == (2, 32, 2560)
    assert build("blip2-t5").language_projection(seen).shape == (2, 32, 2048)
    text = matcher.embeddings(words(12), query_embeds=queries)
    both = matcher.qformer(query_embeds=text, query_length=32, encoder_hidden_states=patches).last_hidden_state
    assert both.shape == (2, 32 + 12, 768)
    assert matcher.itm_head(both).shape == (2, 44, 2)
    assert matcher.vision_projection(seen).shape == (2, 32, 256)


@torch.inference_mode()
def test_shapes_of_git() -> None:
    for name, num_patches in (("git", 197), ("git-large", 257)):
        logits = build(name)(pixel_values=pictures(224), input_ids=words(5)).logits
        assert logits.shape == (2, num_patches + 5, 30522)


@torch.inference_mode()
def test_shapes_of_flava() -> None:
    model = build("flava")
    found = model.flava(pixel_values=pictures(224), input_ids=words(7))
    assert found.image_embeddings.shape == (2, 197, 768)
    assert found.multimodal_embeddings.shape == (2, 1 + 197 + 7, 768)
    assert model.itm_head(found.multimodal_embeddings).shape == (2, 2)
    assert model.flava.image_projection(found.image_embeddings[:, 0]).shape == (2, 768)


@torch.inference_mode()
def test_shapes_of_align() -> None:
    model = build("align")
    assert model.vision_model(pictures(289)).pooler_output.shape == (2, 640)
    states = model.text_model.encoder(model.text_model.embeddings(words(64))).last_hidden_state
    assert model.text_projection(states[:, 0]).shape == (2, 640)


@torch.inference_mode()
def test_shapes_of_the_first_families() -> None:
    assert build("clip").encode_image(pictures(224)).shape == (2, 512)
    assert build("clip-large").encode_image(pictures(224)).shape == (2, 768)
    for name, dim in (("blip-caption", 768), ("blip-itm", 768), ("blip-itm-large", 1024), ("blip-vqa", 768)):
        assert build(name).vision_model(pixel_values=pictures(384)).last_hidden_state.shape == (2, 577, dim)
    matcher = build("blip-itm")
    assert matcher.text_encoder.embeddings(words(9)).shape == (2, 9, 768)
    assert matcher.itm_head(torch.empty(2, 768, device="meta")).shape == (2, 2)
    vilt = build("vilt-vqa")
    assert vilt.classifier(torch.empty(2, 768, device="meta")).shape == (2, 3129)
    assert vilt.vilt.embeddings.patch_embeddings(pictures(384)).shape[-2:] == (12, 12)
