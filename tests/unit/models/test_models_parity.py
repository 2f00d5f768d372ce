"""The adapters against the libraries they stand on, with the same weights, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipImageProcessor

from tests.models import IMAGE_SIZE, WORDS, as_images, make_captioner, make_clip, make_matcher, random_pixels
from vlmflow.config import ModelConfig
from vlmflow.models import Captioner, load_captioner, load_embedder, load_matcher, load_text_embedder
from vlmflow.models.blip import BlipCaptioner, BlipMatcher

TEXTS = ["a red car", "", "four yellow apples and a house on the table", "a zebra"]


@pytest.fixture(scope="module", params=["clip", "siglip", "half"])
def clip_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / request.param
    return make_clip(folder, siglip=request.param == "siglip", half=request.param == "half")


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def matcher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_matcher(tmp_path_factory.mktemp("matcher"))


def load_captioner_from(folder: Path) -> Captioner:
    return load_captioner(ModelConfig(family="blip_caption", path=str(folder)), "cpu")


def test_image_embeddings_equal_those_of_open_clip(clip_folder: Path) -> None:
    pixels = random_pixels(5)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    with torch.inference_mode():
        batch = torch.stack([preprocess(image) for image in as_images(pixels)])
        expected = model.eval().encode_image(batch, normalize=True).numpy()

    embedder = load_embedder(ModelConfig(family="open_clip", path=str(clip_folder)), "cpu")
    vectors = embedder.embed_images(pixels)

    assert vectors.dtype == np.float32
    assert vectors.shape == (5, embedder.dim)
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_text_embeddings_equal_those_of_open_clip(clip_folder: Path) -> None:
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(TEXTS)
    with torch.inference_mode():
        expected = model.encode_text(tokens, normalize=True).numpy()

    embedder = load_embedder(ModelConfig(family="open_clip", path=str(clip_folder)), "cpu")

    np.testing.assert_allclose(embedder.embed_texts(TEXTS), expected, atol=1e-4)
    assert embedder.embed_texts([]).shape == (0, embedder.dim)
    of_texts = load_text_embedder(ModelConfig(family="open_clip", path=str(clip_folder)))
    np.testing.assert_array_equal(of_texts.embed_texts(TEXTS), embedder.embed_texts(TEXTS))
    images = random_pixels(3)
    np.testing.assert_allclose(of_texts.embed_images(images), embedder.embed_images(images), atol=1e-5)


@pytest.mark.parametrize(("num_images", "max_tokens"), [(1, 20), (7, 5), (33, 1), (33, 20)])
def test_captions_are_those_of_generate_token_for_token(
    captioner_folder: Path, num_images: int, max_tokens: int
) -> None:
    pixels = random_pixels(num_images, seed=num_images)
    tokenizer = AutoTokenizer.from_pretrained(captioner_folder)
    model = BlipForConditionalGeneration.from_pretrained(captioner_folder).eval()
    inputs = BlipImageProcessor.from_pretrained(captioner_folder)(images=as_images(pixels), return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_tokens)
    expected = tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)

    captions = load_captioner_from(captioner_folder).caption(pixels, max_tokens)

    assert captions == expected


def test_a_batch_holds_captions_of_different_lengths(captioner_folder: Path) -> None:
    captions = load_captioner_from(captioner_folder).caption(random_pixels(33, seed=33), 20)
    assert len({len(caption.split()) for caption in captions}) >= 3


def test_a_caption_does_not_depend_on_its_batch(captioner_folder: Path) -> None:
    captioner = load_captioner_from(captioner_folder)
    pixels = random_pixels(12)
    assert captioner.caption(pixels, 20) == [captioner.caption(pixels[i : i + 1], 20)[0] for i in range(12)]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_is_no_number_gets_no_caption(
    captioner_folder: Path, monkeypatch: pytest.MonkeyPatch, num_beams: int
) -> None:
    captioner = load_captioner_from(captioner_folder)
    assert isinstance(captioner, BlipCaptioner)
    features = captioner._vision(random_pixels(3))
    features[1, 2, 3] = torch.nan
    monkeypatch.setattr(captioner, "_vision", lambda _: features)
    with pytest.raises(ValueError, match="features that are not finite"):
        captioner.caption(random_pixels(3), 20, num_beams)


def test_matches_equal_those_of_transformers(matcher_folder: Path) -> None:
    texts = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(9)]
    pixels = random_pixels(len(texts))
    model = BlipForImageTextRetrieval.from_pretrained(matcher_folder).eval()
    processor = BlipImageProcessor.from_pretrained(matcher_folder)
    tokenizer = AutoTokenizer.from_pretrained(matcher_folder)
    itm, itc = [], []
    with torch.inference_mode():
        for image, text in zip(as_images(pixels), texts, strict=True):  # one by one: no padding in the reference
            inputs = processor(images=image, return_tensors="pt") | tokenizer(text, return_tensors="pt")
            inputs = {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}
            itm.append(model(**inputs).itm_score.softmax(dim=1)[0, 1].item())
            itc.append(model(**inputs, use_itm_head=False).itm_score[0, 0].item())

    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(matcher_folder)), "cpu")
    images = matcher.encode_images(pixels)

    np.testing.assert_allclose(matcher.match_itm(images, texts), itm, atol=1e-4)
    np.testing.assert_allclose(matcher.match_itc(images, texts), itc, atol=1e-4)
    assert np.ptp(itm) > 0.1  # the head tells these pairs apart


def test_a_long_text_pads_no_short_ones(matcher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(matcher_folder)), "cpu")
    assert isinstance(matcher, BlipMatcher)
    images, texts = matcher.encode_images(random_pixels(6)), [" ".join(WORDS[:n]) for n in (3, 31, 5, 16, 30, 4)]
    each = [(images.take([row]), [text]) for row, text in enumerate(texts)]
    alone = [np.concatenate([score(*pair) for pair in each]) for score in (matcher.match_itm, matcher.match_itc)]
    encode, shapes = matcher._encoder.encode, []

    def seen(ids: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return encode(ids, *others)

    monkeypatch.setattr(matcher._encoder, "encode", seen)
    np.testing.assert_allclose(matcher.match_itm(images, texts), alone[0], atol=1e-5)
    np.testing.assert_allclose(matcher.match_itc(images, texts), alone[1], atol=1e-5)
    assert shapes == 2 * [(3, 7), (1, 33), (2, 32)], "two special ones each"
    assert np.ptp(alone[0]) > 0.1


def test_a_part_of_encoded_images_scores_as_before(matcher_folder: Path) -> None:
    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(matcher_folder)), "cpu")
    images = matcher.encode_images(random_pixels(4))
    all_scores = matcher.match_itm(images, ["a cat"] * 4)
    np.testing.assert_allclose(matcher.match_itm(images.take([3, 1]), ["a cat"] * 2), all_scores[[3, 1]], atol=1e-5)


def test_texts_that_do_not_pair_with_images_are_refused(matcher_folder: Path) -> None:
    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(matcher_folder)), "cpu")
    images = matcher.encode_images(random_pixels(2))
    with pytest.raises(ValueError, match="2 images but 1 texts"):
        matcher.match_itm(images, ["a cat"])


def test_a_text_longer_than_the_model_reads_is_cut(matcher_folder: Path) -> None:
    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(matcher_folder)), "cpu")
    scores = matcher.match_itm(matcher.encode_images(random_pixels(1)), ["red car " * 500])
    assert 0 <= scores[0] <= 1


@pytest.mark.parametrize(
    "pixels", [random_pixels(2, size=IMAGE_SIZE + 1), random_pixels(2).float()], ids=["size", "dtype"]
)
def test_pixels_of_another_size_or_type_are_refused(captioner_folder: Path, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pixels of"):
        load_captioner_from(captioner_folder).caption(pixels, 5)
