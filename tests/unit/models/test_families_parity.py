"""BLIP-2, GIT, FLAVA and ALIGN against transformers, with the same weights, in float32 on the CPU.

The references are given the pictures by the processors of their folders, as users of transformers would; pictures are
squares of the model's size, because others are squashed here where some processors crop.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AlignModel,
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    FlavaForPreTraining,
    GitForCausalLM,
)

from tests.dual_encoders import make_dual_encoder
from tests.families import make_align, make_blip2_captioner, make_blip2_matcher, make_flava, make_git
from tests.models import WORDS, as_images, random_pixels
from tests.unit.models.test_models_weights import edit_json
from vlmflow.config import ModelConfig
from vlmflow.models import EncodedImages, load_captioner, load_embedder, load_matcher
from vlmflow.models.towers import VisionTowers

TEXTS = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(9)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        "opt": make_blip2_captioner(root / "opt"),
        "t5": make_blip2_captioner(root / "t5", t5=True),
        "itm": make_blip2_matcher(root / "itm", vision_of=root / "opt"),
        "git": make_git(root / "git"),
        "flava": make_flava(root / "flava"),
        "headless": make_flava(root / "headless", with_head=False),
        "align": make_align(root / "align"),
        "clip": make_dual_encoder(root / "clip"),
    }


def config_of(family: str, folder: Path) -> ModelConfig:
    return ModelConfig(family=family, path=str(folder))


def processed(folder: Path, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(folder)
    values: torch.Tensor = processor(images=as_images(pixels), return_tensors="pt", **options)["pixel_values"]
    return values


def generated(model: Any, folder: Path, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
    with torch.inference_mode():
        tokens = model.generate(
            pixel_values=processed(folder, pixels), do_sample=False, num_beams=num_beams, max_new_tokens=max_tokens
        )
    texts = AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


@pytest.mark.parametrize("name", ["opt", "t5"])
@pytest.mark.parametrize(("num_images", "max_tokens"), [(1, 20), (33, 12), (5, 1)])
def test_captions_of_blip2_are_those_of_generate(
    folders: dict[str, Path], name: str, num_images: int, max_tokens: int
) -> None:
    pixels = random_pixels(num_images, seed=num_images)
    reference = Blip2ForConditionalGeneration.from_pretrained(folders[name]).eval()
    expected = generated(reference, folders[name], pixels, max_tokens)

    captions = load_captioner(config_of("blip2_caption", folders[name]), "cpu").caption(pixels, max_tokens)

    assert captions == expected
    if num_images == 33:
        assert len(set(captions)) > 10  # they tell the pictures apart
        assert len({len(caption.split()) for caption in captions}) > 1


def test_captions_of_git_are_those_of_generate(folders: dict[str, Path]) -> None:
    reference = GitForCausalLM.from_pretrained(folders["git"]).eval()
    captioner = load_captioner(config_of("git", folders["git"]), "cpu")
    for num_images, max_tokens in ((1, 20), (33, 12), (5, 1)):
        pixels = random_pixels(num_images, seed=num_images)
        captions = captioner.caption(pixels, max_tokens)
        assert captions == generated(reference, folders["git"], pixels, max_tokens)
    captions = captioner.caption(random_pixels(33, seed=33), 12)
    assert len(set(captions)) > 10
    assert len({len(caption.split()) for caption in captions}) > 1


@pytest.mark.parametrize(
    ("family", "name", "model_class"),
    [
        ("blip2_caption", "opt", Blip2ForConditionalGeneration),
        ("blip2_caption", "t5", Blip2ForConditionalGeneration),
        ("git", "git", GitForCausalLM),
    ],
)
def test_beams_are_those_of_generate(folders: dict[str, Path], family: str, name: str, model_class: Any) -> None:
    pixels = random_pixels(17, seed=17)
    captioner = load_captioner(config_of(family, folders[name]), "cpu")
    captions = captioner.caption(pixels, 8, 3)
    assert captions == generated(model_class.from_pretrained(folders[name]).eval(), folders[name], pixels, 8, 3)
    assert captions != captioner.caption(pixels, 8)
    with pytest.raises(ValueError, match="captions of 8 tokens by 0 beams"):
        captioner.caption(pixels, 8, 0)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    ("family", "name", "broken"),
    [
        ("blip2_caption", "opt", "_projection"),
        ("blip2_caption", "opt", "_language"),
        ("blip2_caption", "t5", "_language"),
        ("git", "git", "_model"),
    ],
)
def test_what_is_no_number_gets_no_caption(
    folders: dict[str, Path], family: str, name: str, broken: str, num_beams: int
) -> None:
    captioner = load_captioner(config_of(family, folders[name]), "cpu")
    with torch.no_grad():
        list(getattr(captioner, broken).parameters())[-1].fill_(torch.nan)
    with pytest.raises(ValueError, match="logits that are not numbers"):
        captioner.caption(random_pixels(2), 5, num_beams)


@pytest.mark.parametrize(("family", "name"), [("blip2_caption", "opt"), ("blip2_caption", "t5"), ("git", "git")])
def test_a_caption_does_not_depend_on_its_batch(folders: dict[str, Path], family: str, name: str) -> None:
    captioner = load_captioner(config_of(family, folders[name]), "cpu")
    pixels = random_pixels(6)
    assert captioner.caption(pixels, 8) == [captioner.caption(pixels[i : i + 1], 8)[0] for i in range(6)]
    assert captioner.caption(pixels[:0], 8) == []
    with pytest.raises(ValueError, match="captions of 0 tokens"):
        captioner.caption(pixels, 0)


def test_matches_of_blip2_equal_those_of_transformers(folders: dict[str, Path]) -> None:
    pixels = random_pixels(len(TEXTS))
    model = Blip2ForImageTextRetrieval.from_pretrained(folders["itm"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["itm"])
    pixel_values = processed(folders["itm"], pixels)
    itm, itc = [], []
    for image, text in zip(pixel_values, TEXTS, strict=True):  # one by one: no padding in the reference
        # Its processor puts a place for each query before the text, which the model takes away again.
        words = tokenizer("<image>" * 4, add_special_tokens=False)["input_ids"] + tokenizer(text)["input_ids"]
        inputs = {"pixel_values": image[None], "input_ids": torch.tensor([words])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = model(**inputs, use_image_text_matching_head=True).logits_per_image
            itm.append(logits.softmax(dim=1)[0, 1].item())
            itc.append(model(**inputs, use_image_text_matching_head=False).logits_per_image[0, 0].item())

    matcher = load_matcher(config_of("blip2_itm", folders["itm"]), "cpu")
    images = matcher.encode_images(pixels)

    np.testing.assert_allclose(matcher.match_itm(images, TEXTS), itm, atol=1e-4)
    np.testing.assert_allclose(matcher.match_itc(images, TEXTS), itc, atol=1e-4)
    assert np.ptp(itm) > 0.1
    assert np.ptp(itc) > 0.1


def test_captioner_and_matcher_of_blip2_share_one_pass_of_equal_towers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    towers, pixels, texts = VisionTowers(), random_pixels(6), ["a red apple"] * 6
    captions = config_of("blip2_caption", folders["opt"])
    matches = config_of("blip2_itm", folders["itm"])
    captioner = load_captioner(captions, "cpu", "auto", towers)
    matcher = load_matcher(matches, "cpu", "auto", towers)
    (shared,) = towers._towers.values()
    passes = shared.num_passes  # of the image that the captioner was tried with
    words = captioner.caption(pixels, 8)
    scores = matcher.match_itm(matcher.encode_images(pixels.clone()), texts)
    assert shared.num_passes == passes + 1

    assert load_captioner(captions, "cpu").caption(pixels, 8) == words
    alone = load_matcher(matches, "cpu")
    np.testing.assert_array_equal(alone.match_itm(alone.encode_images(pixels), texts), scores)

    load_matcher(config_of("blip2_itm", make_blip2_matcher(tmp_path, seed=5)), "cpu", "auto", towers)
    assert len(towers._towers) == 2  # other weights: a tower of its own
    for part in (captioner._language, captioner._qformer, matcher._qformer):  # type: ignore[attr-defined]
        assert part.config._attn_implementation == "sdpa"


def flava_reference(folder: Path, pixels: torch.Tensor) -> Any:
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        model = FlavaForPreTraining.from_pretrained(folder).eval()
        return model(pixel_values=processed(folder, pixels), **inputs, return_loss=False), model.flava


def test_flava_equals_that_of_transformers(folders: dict[str, Path]) -> None:
    pixels = random_pixels(len(TEXTS))
    found, flava = flava_reference(folders["flava"], pixels)
    with torch.inference_mode():
        image = torch.nn.functional.normalize(flava.image_projection(found.image_embeddings[:, 0]), dim=-1).numpy()
        text = torch.nn.functional.normalize(flava.text_projection(found.text_embeddings[:, 0]), dim=-1).numpy()

    embedder = load_embedder(config_of("flava", folders["flava"]), "cpu")
    assert embedder.dim == image.shape[1]
    np.testing.assert_allclose(embedder.embed_images(pixels), image, atol=1e-4)
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), text, atol=1e-4)

    matcher = load_matcher(config_of("flava", folders["flava"]), "cpu")
    images = matcher.encode_images(pixels)
    itm = found.itm_logits.softmax(dim=1)[:, 1].numpy()
    np.testing.assert_allclose(matcher.match_itm(images, TEXTS), itm, atol=1e-4)
    np.testing.assert_allclose(matcher.match_itc(images, TEXTS), (image * text).sum(axis=1), atol=1e-4)
    assert np.ptp(itm) > 0.1
    assert np.ptp((image * text).sum(axis=1)) > 0.1


def test_align_equals_that_of_transformers(folders: dict[str, Path]) -> None:
    pixels = random_pixels(len(TEXTS))
    model = AlignModel.from_pretrained(folders["align"]).eval()
    # What the processor does to a square before that (346 pixels, the middle 289) is what differs here.
    pixel_values = processed(folders["align"], pixels, do_resize=False, do_center_crop=False)
    tokenizer = AutoTokenizer.from_pretrained(folders["align"])
    tokens = tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt")  # as its processor pads
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        found = model(pixel_values=pixel_values, **inputs)
        expected = (found.logits_per_image * model.temperature).diagonal().numpy()

    embedder = load_embedder(config_of("align", folders["align"]), "cpu")
    assert embedder.dim == found.image_embeds.shape[1]
    np.testing.assert_allclose(embedder.embed_images(pixels), found.image_embeds, atol=1e-4)
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), found.text_embeds, atol=1e-4)

    matcher = load_matcher(config_of("align", folders["align"]), "cpu")
    cosines = matcher.match_itc(matcher.encode_images(pixels), TEXTS)
    np.testing.assert_allclose(cosines, expected, atol=1e-4)
    assert np.ptp(cosines) > 0.1


@pytest.mark.parametrize(("family", "name"), [("align", "align"), ("dual_encoder", "clip"), ("flava", "headless")])
def test_a_model_without_matching_head_says_so(
    folders: dict[str, Path], family: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vlmflow")
    matcher = load_matcher(config_of(family, folders[name]), "cpu")
    assert "has no matching head: caption_itm and text_itm stay null" in caplog.text
    images = matcher.encode_images(random_pixels(2))
    assert matcher.match_itm(images, ["a cat", "a dog"]) is None
    cosines = matcher.match_itc(images, ["a cat", "a dog"])
    assert cosines is not None
    assert np.isfinite(cosines).all()


@pytest.mark.parametrize(
    ("family", "name"),
    [("blip2_itm", "itm"), ("flava", "flava"), ("flava", "headless"), ("align", "align"), ("dual_encoder", "clip")],
)
def test_texts_and_images_pair_up(folders: dict[str, Path], family: str, name: str) -> None:
    matcher = load_matcher(config_of(family, folders[name]), "cpu")
    images = matcher.encode_images(random_pixels(4))
    for match in (matcher.match_itm, matcher.match_itc):
        with pytest.raises(ValueError, match="4 images but 1 texts"):
            match(images, ["a cat"])
        scores = match(images, TEXTS[:4])
        if scores is not None:
            part = match(images.take([3, 1]), [TEXTS[3], TEXTS[1]])
            np.testing.assert_allclose(part, scores[[3, 1]], atol=1e-5)
            assert match(images, ["red car " * 500] * 4) is not None  # longer than the model reads: cut
    assert len(EncodedImages(images.embeds[:0])) == 0


@pytest.mark.parametrize(("family", "name"), [("blip2_itm", "itm"), ("flava", "flava"), ("align", "align")])
def test_a_text_scores_as_it_does_alone_where_its_tokenizer_pads_on_the_left(
    folders: dict[str, Path], family: str, name: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / name)
    edit_json(folder / "tokenizer_config.json", {"padding_side": "left"})
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    matcher = load_matcher(config_of(family, folder), "cpu")
    images = matcher.encode_images(random_pixels(len(TEXTS)))
    for match in (matcher.match_itm, matcher.match_itc):
        scores = match(images, TEXTS)
        if scores is not None:
            alone = [match(images.take([row]), [text]) for row, text in enumerate(TEXTS)]
            np.testing.assert_allclose(scores, np.ravel(alone), atol=1e-5)
            assert np.ptp(scores) > 0.1


@pytest.mark.parametrize(
    ("family", "name"), [("flava", "flava"), ("flava", "headless"), ("align", "align"), ("dual_encoder", "clip")]
)
def test_many_texts_are_embedded_as_few_are(folders: dict[str, Path], family: str, name: str) -> None:
    embedder = load_embedder(config_of(family, folders[name]), "cpu")
    many = embedder.embed_texts(TEXTS * 40)  # more than are embedded at once
    assert many.shape == (360, embedder.dim)
    np.testing.assert_allclose(many[351:], embedder.embed_texts(TEXTS), atol=1e-5)
    assert embedder.embed_texts([]).shape == (0, embedder.dim)


@pytest.mark.parametrize(("family", "name"), [("blip2_caption", "opt"), ("blip2_caption", "t5"), ("git", "git")])
def test_bfloat16_captions(folders: dict[str, Path], family: str, name: str) -> None:
    captions = load_captioner(config_of(family, folders[name]), "cpu", "bfloat16").caption(random_pixels(4), 6)
    assert len(captions) == 4
    assert any(captions)


@pytest.mark.parametrize(("family", "name"), [("blip2_itm", "itm"), ("flava", "flava"), ("align", "align")])
def test_bfloat16_scores_are_near_those_of_float32(folders: dict[str, Path], family: str, name: str) -> None:
    pixels, scores = random_pixels(len(TEXTS)), {}
    for dtype in ("float32", "bfloat16"):
        matcher = load_matcher(config_of(family, folders[name]), "cpu", dtype)  # type: ignore[arg-type]
        images = matcher.encode_images(pixels)
        scores[dtype] = matcher.match_itc(images, TEXTS), matcher.match_itm(images, TEXTS)
    for exact, rounded in zip(scores["float32"], scores["bfloat16"], strict=True):
        assert (exact is None) == (rounded is None)
        if exact is not None:
            np.testing.assert_allclose(rounded, exact, atol=0.06)
