"""Dual encoders against transformers' own use of the same folders, and CLIP against open_clip with the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from tests.dual_encoders import CONTEXT, KINDS, PACKED, make_dual_encoder
from tests.models import IMAGE_SIZE, WORDS, as_images, make_clip, random_pixels
from tests.unit.models.test_models_weights import edit_json
from vlmflow.config import ModelConfig
from vlmflow.models import ImageEmbedder, load_embedder, load_matcher
from vlmflow.models.packed import PackedTower

# The last is longer than a model's context: it is cut, and ends as the others do.
TEXTS = [*(" ".join(WORDS[i : i + 1 + i % 7]) for i in range(9)), "a red, car", "red car dog " * 20]


@pytest.fixture(scope="module")
def embedders(dual_encoders: dict[str, Path]) -> dict[str, ImageEmbedder]:
    return {kind: embedder_of(folder) for kind, folder in dual_encoders.items()}


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(family="dual_encoder", path=str(folder))


def embedder_of(folder: Path) -> ImageEmbedder:
    return load_embedder(config_of(folder), "cpu")


@torch.inference_mode()
def reference(folder: Path, texts: list[str], pixels: torch.Tensor) -> Any:
    """What transformers gives, used as its documentation says."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    kind = model.config.model_type
    padding = {"padding": "max_length" if kind in ("siglip", "siglip2") else True, "max_length": CONTEXT}
    if kind == "siglip2":  # for which its processor has numbers of its own, whatever the file says
        padding |= {"patch_size": 8, "max_num_patches": processor.image_processor.max_num_patches}
    return model(**processor(text=texts, images=as_images(pixels), truncation=True, return_tensors="pt", **padding))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_transformers(
    dual_encoders: dict[str, Path], embedders: dict[str, ImageEmbedder], kind: str
) -> None:
    pixels = random_pixels(len(TEXTS))
    expected = reference(dual_encoders[kind], TEXTS, pixels)
    embedder = embedders[kind]
    images, texts = embedder.embed_images(pixels), embedder.embed_texts(TEXTS)

    np.testing.assert_allclose(images, expected.image_embeds, atol=1e-5)
    np.testing.assert_allclose(texts, expected.text_embeds, atol=1e-5)
    assert embedder.dim == images.shape[1]
    for vectors in (images, texts):  # else all might be one vector, and nothing be compared
        assert np.median(vectors @ vectors.T) < 0.99
    matcher = load_matcher(config_of(dual_encoders[kind]), "cpu")
    encoded = matcher.encode_images(pixels)
    assert matcher.match_itm(encoded, TEXTS) is None
    cosines = matcher.match_itc(encoded, TEXTS)
    np.testing.assert_allclose(cosines, (expected.image_embeds * expected.text_embeds).sum(dim=1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_vector_that_it_has_alone(embedders: dict[str, ImageEmbedder], kind: str) -> None:
    embedder = embedders[kind]
    alone = np.concatenate([embedder.embed_texts([text]) for text in TEXTS])
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), alone, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("siglip")])
def test_padding_stands_behind_texts_whatever_the_tokenizer_says(
    dual_encoders: dict[str, Path], embedders: dict[str, ImageEmbedder], kind: str, tmp_path: Path
) -> None:
    """CLIP's padding is its end token, at the first of which it reads a text."""
    folder = shutil.copytree(dual_encoders[kind], tmp_path / kind)
    edit_json(folder / "tokenizer_config.json", {"padding_side": "left"})
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    expected = embedders[kind].embed_texts(TEXTS)
    np.testing.assert_allclose(embedder_of(folder).embed_texts(TEXTS), expected, atol=1e-6)


def test_siglip_has_a_mask_where_its_tokenizer_makes_one(
    dual_encoders: dict[str, Path], embedders: dict[str, ImageEmbedder], tmp_path: Path
) -> None:
    folder = shutil.copytree(dual_encoders["siglip"], tmp_path / "siglip")
    edit_json(folder / "tokenizer_config.json", {"model_input_names": ["input_ids", "attention_mask"]})
    expected = reference(folder, TEXTS, random_pixels(2)).text_embeds.numpy()
    np.testing.assert_allclose(embedder_of(folder).embed_texts(TEXTS), expected, atol=1e-5)
    assert np.abs(embedders["siglip"].embed_texts(TEXTS) - expected).max() > 0.01


def test_siglip_2_is_shown_small_letters_as_its_file_says(
    dual_encoders: dict[str, Path], embedders: dict[str, ImageEmbedder], tmp_path: Path
) -> None:
    """Its tokenizer, Gemma's, takes letters as they are, and transformers leaves it to who calls it."""
    texts = ["A RED Car", "Dog"]
    lower = embedders["siglip2"].embed_texts([text.lower() for text in texts])
    np.testing.assert_array_equal(embedders["siglip2"].embed_texts(texts), lower)
    folder = shutil.copytree(dual_encoders["siglip2"], tmp_path / "siglip2")
    edit_json(folder / "tokenizer_config.json", {"do_lower_case": False})
    expected = reference(folder, texts, random_pixels(2)).text_embeds.numpy()
    np.testing.assert_allclose(embedder_of(folder).embed_texts(texts), expected, atol=1e-5)
    assert np.abs(expected - lower).max() > 0.01


def test_siglip_by_its_sentence_pieces(dual_encoders: dict[str, Path], tmp_path: Path) -> None:
    """As google's folders of SigLIP name their tokenizer: transformers reads it with a package of its own."""
    folder = shutil.copytree(dual_encoders["siglip"], tmp_path / "siglip")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *WORDS] * 3),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer"})
    texts = [*TEXTS, "A RED, car!"]
    expected = reference(folder, texts, random_pixels(2)).text_embeds.numpy()
    found = embedder_of(folder).embed_texts(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[-1], embedder_of(folder).embed_texts(["a red car"])[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_bfloat16_is_near_float32(
    dual_encoders: dict[str, Path], embedders: dict[str, ImageEmbedder], kind: str
) -> None:
    pixels, exact = random_pixels(8), embedders[kind]
    rounded = load_embedder(config_of(dual_encoders[kind]), "cpu", "bfloat16")
    expected, found = exact.embed_images(pixels), rounded.embed_images(pixels)
    assert (expected * found).sum(axis=1).min() > 0.99
    assert np.abs(expected - found).max() > 1e-6  # it was rounded
    np.testing.assert_array_equal(rounded.embed_texts(TEXTS), exact.embed_texts(TEXTS))  # on a processor not at all


def test_images_pass_packed_layers_and_texts_fused_attention(embedders: dict[str, ImageEmbedder]) -> None:
    for kind, embedder in embedders.items():
        model = embedder._model  # type: ignore[attr-defined]
        if kind in PACKED:
            assert [type(layer) for layer in model.vision_model.encoder.layers] == [PackedTower], kind
        else:
            assert not any(isinstance(module, PackedTower) for module in model.modules()), kind
        assert model.text_model.config._attn_implementation == "sdpa", kind


@torch.inference_mode()
def test_products_alone_are_in_bfloat16(dual_encoders: dict[str, Path], embedders: dict[str, ImageEmbedder]) -> None:
    """What is added up from layer to layer would lose most: the vectors are nearer than those of a bfloat16 model."""
    pixels, folder = random_pixels(8), dual_encoders["siglip"]
    exact = embedders["siglip"].embed_images(pixels)
    values = AutoProcessor.from_pretrained(folder)(images=as_images(pixels), return_tensors="pt")["pixel_values"]
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs = torch.nn.functional.normalize(half.get_image_features(values.bfloat16()).pooler_output.float(), dim=-1)
    ours = load_embedder(config_of(folder), "cpu", "bfloat16").embed_images(pixels)
    assert np.abs(ours - exact).mean() < np.abs(theirs.numpy() - exact).mean()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_clip_gives_the_vectors_that_open_clip_gives(tmp_path: Path, quick_gelu: bool) -> None:
    """The same weights in both formats, with the same tokenizer and pixels."""
    theirs = make_clip(tmp_path / "open_clip")
    edit_json(
        theirs / "open_clip_config.json", {"model_cfg.quick_gelu": quick_gelu, "model_cfg.vision_cfg.no_ln_pre": False}
    )
    torch.manual_seed(0)
    built = open_clip.create_model(f"local-dir:{theirs}", load_weights=False)
    tensors = {name: value + 0.15 * torch.randn_like(value) for name, value in built.state_dict().items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, theirs / "open_clip_model.safetensors")
    ours = as_transformers(theirs, tmp_path / "transformers", "quick_gelu" if quick_gelu else "gelu")

    first, second = load_embedder(ModelConfig(family="open_clip", path=str(theirs)), "cpu"), embedder_of(ours)
    pixels = random_pixels(6)
    assert first.dim == second.dim
    images = first.embed_images(pixels)
    np.testing.assert_allclose(second.embed_images(pixels), images, atol=1e-5)
    np.testing.assert_allclose(second.embed_texts(TEXTS), first.embed_texts(TEXTS), atol=1e-5)
    assert np.median(images @ images.T) < 0.99


def test_siglip_reads_texts_as_open_clip_does(tmp_path: Path) -> None:
    """The same weights and tokenizer in both formats: all places are filled up, and the last of them is read."""
    theirs = make_clip(tmp_path / "open_clip", siglip=True)
    tensors = load_file(theirs / "open_clip_model.safetensors")
    ours = make_dual_encoder(tmp_path / "transformers", "siglip")
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    tokenizer.save_pretrained(ours)
    edit_json(ours / "tokenizer_config.json", {"model_input_names": ["input_ids"]})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    text = sizes | {"intermediate_size": 128, "hidden_act": "gelu", "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": 16, "projection_size": 64}
    vision = sizes | {"hidden_size": 64, "image_size": IMAGE_SIZE, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    named = {
        "embeddings.token_embedding.weight": tensors["text.token_embedding.weight"],
        "embeddings.position_embedding.weight": tensors["text.positional_embedding"],
        **layers(tensors, "text.transformer", "encoder"),
    }
    for kind in ("weight", "bias"):
        named[f"final_layer_norm.{kind}"] = tensors[f"text.ln_final.{kind}"]
        named[f"head.{kind}"] = tensors[f"text.text_projection.{kind}"]
    model.text_model.load_state_dict(named)
    model.save_pretrained(ours)
    texts = [text for text in TEXTS if "," not in text]
    expected = load_embedder(ModelConfig(family="open_clip", path=str(theirs)), "cpu").embed_texts(texts)
    np.testing.assert_allclose(embedder_of(ours).embed_texts(texts), expected, atol=1e-5)
    assert np.median(expected @ expected.T) < 0.99


def layers(tensors: dict[str, torch.Tensor], prefix: str, name: str) -> dict[str, torch.Tensor]:
    """Both layers of one of open_clip's transformers, by the names of transformers' conversion script."""
    found: dict[str, torch.Tensor] = {}
    for layer in range(2):
        block, of = f"{prefix}.resblocks.{layer}", f"{name}.layers.{layer}"
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", tensors[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                found[f"{of}.self_attn.{part}_proj.{kind}"] = value
            for theirs, ours in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                found[f"{of}.{ours}.{kind}"] = tensors[f"{block}.{theirs}.{kind}"]
    return found


def as_transformers(theirs: Path, folder: Path, activation: str) -> Path:
    """An open_clip folder of :func:`make_clip` in the format of transformers."""
    tensors = load_file(theirs / "open_clip_model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"hidden_act": activation}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = sizes | {"image_size": IMAGE_SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    named = {
        "logit_scale": tensors["logit_scale"],
        "text_projection.weight": tensors["text_projection"].T,
        "visual_projection.weight": tensors["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": tensors["positional_embedding"],
        "vision_model.embeddings.class_embedding": tensors["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": tensors["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": tensors["visual.positional_embedding"],
        **layers(tensors, "transformer", "text_model.encoder"),
        **layers(tensors, "visual.transformer", "vision_model.encoder"),
    }
    for kind in ("weight", "bias"):
        named |= {
            f"text_model.final_layer_norm.{kind}": tensors[f"ln_final.{kind}"],
            f"vision_model.pre_layrnorm.{kind}": tensors[f"visual.ln_pre.{kind}"],
            f"vision_model.post_layernorm.{kind}": tensors[f"visual.ln_post.{kind}"],
        }
    model.load_state_dict(named)  # all of them, and nothing else
    model.save_pretrained(folder)
    shutil.copy(make_dual_encoder(folder.parent / "files") / "preprocessor_config.json", folder)
    return folder
