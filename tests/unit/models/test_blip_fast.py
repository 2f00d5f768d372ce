"""Our own execution of BLIP against transformers, and against itself where it chooses between ways."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from tests.models import make_captioner, make_matcher, random_pixels
from vlmflow.config import Dtype, ModelConfig
from vlmflow.models import EncodedImages, attention, linear, load_captioner, load_matcher
from vlmflow.models import pixels as pixels_module
from vlmflow.models.blip_fast import (
    GreedyDecoder,
    SpecialTokens,
    TextTower,
    VisionTower,
    decode_beams,
    greedy,
    text,
    vision,
)
from vlmflow.models.blip_fast.graph import DecodeGraphs, FixedStep
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import Preprocessing, read_preprocessing
from vlmflow.models.towers import VisionTowers

STARTER = Path(__file__).parents[3] / "vlmflow" / "starter"
PREPROCESSING = Preprocessing(32, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Loaded:
    """The reference and the parts of our execution, on the same weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.text_config
        self.special = SpecialTokens(config.bos_token_id, config.sep_token_id, config.pad_token_id)
        self.decoder = TextTower(model.text_decoder.bert, model.text_decoder.cls)

    def features(self, num_images: int, seed: int = 0) -> torch.Tensor:
        """(N, T, D) of random pictures, by the reference."""
        size = self.model.config.vision_config.image_size
        pixels = random_pixels(num_images, size=size, seed=seed).float().div(64).sub(2)
        features: torch.Tensor = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return features

    def generated(self, images: torch.Tensor, max_tokens: int, num_beams: int) -> list[list[int]]:
        """What the decoder of transformers makes of the images, up to the end of each caption."""
        tokens = self.model.text_decoder.generate(
            input_ids=torch.full((len(images), 1), self.special.begin),
            encoder_hidden_states=images,
            eos_token_id=self.special.end,
            pad_token_id=self.special.pad,
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=max_tokens,
        )
        return self.cut(tokens[:, 1:])

    def cut(self, tokens: torch.Tensor) -> list[list[int]]:
        """Token ids up to the end of each caption."""
        rows = tokens.tolist()
        return [row[: row.index(self.special.end)] if self.special.end in row else row for row in rows]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=["random", "starter"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    if request.param == "starter":
        folder = STARTER / "captioner"
    else:
        folder = make_captioner(tmp_path_factory.mktemp("captioner"))
    return Loaded(BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize("num_images", [1, 5, 33])
def test_greedy_tokens_are_those_of_generate(loaded: Loaded, num_images: int) -> None:
    images = loaded.features(num_images, seed=num_images)
    tokens = GreedyDecoder(loaded.decoder, loaded.special)(images, 20)
    expected = loaded.generated(images, 20, num_beams=1)
    if loaded.model.config.vision_config.image_size == 32:
        assert len({len(row) for row in expected}) > 1 or num_images < 33  # rows end at different steps
    assert loaded.cut(tokens) == expected


@pytest.mark.parametrize(("num_beams", "max_tokens"), [(2, 20), (3, 20), (5, 6), (4, 1)])
def test_beams_are_those_of_generate(loaded: Loaded, num_beams: int, max_tokens: int) -> None:
    images = loaded.features(17, seed=num_beams)
    tokens = decode_beams(loaded.decoder, loaded.special, images, max_tokens, num_beams)
    expected = loaded.generated(images, max_tokens, num_beams)
    assert len({tuple(row) for row in expected}) > 1
    assert loaded.cut(tokens) == expected


def test_beams_find_other_captions_than_greed_does(tmp_path: Path) -> None:
    captioner = load_captioner(ModelConfig(family="blip_caption", path=str(make_captioner(tmp_path))), "cpu")
    pixels = random_pixels(33, seed=33)
    assert captioner.caption(pixels, 20, num_beams=3) != captioner.caption(pixels, 20)
    with pytest.raises(ValueError, match="20 tokens by 0 beams"):
        captioner.caption(pixels, 20, num_beams=0)


@pytest.mark.parametrize("share", [0.01, 0.5, 2.0], ids=["at once", "half", "never"])
def test_dropping_ended_rows_changes_no_token(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    images = loaded.features(33, seed=33)
    expected = loaded.generated(images, 20, num_beams=1)
    monkeypatch.setattr(greedy, "_ENDED_SHARE", share)
    assert loaded.cut(GreedyDecoder(loaded.decoder, loaded.special)(images, 20)) == expected


def test_the_step_that_cuda_records_decodes_the_same_tokens(loaded: Loaded) -> None:
    images = loaded.features(5)
    step = FixedStep(loaded.decoder, loaded.special, images, 8, 20)
    assert loaded.cut(step.decode(images)) == loaded.generated(images, 20, num_beams=1)
    fewer = loaded.features(3, seed=9)  # in the memory of the batch before
    assert loaded.cut(step.decode(fewer)) == loaded.generated(fewer, 20, num_beams=1)


@pytest.mark.parametrize(("code", "goes_on"), [(901, True), (None, False), (2, False)])
def test_what_cannot_be_captured_runs_without_a_graph(
    loaded: Loaded, code: int | None, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.AcceleratorError("CUDA error")
    if code is not None:
        error.error_code = code  # as torch sets it: 901 is a capture that was invalidated, 2 a lack of memory

    def fail(self: FixedStep) -> None:
        raise error

    monkeypatch.setattr(FixedStep, "capture", fail)
    graphs = DecodeGraphs(loaded.decoder, loaded.special)
    images = loaded.features(2)
    with torch.inference_mode():
        if goes_on:
            assert graphs.decode(images, 4) is None
            monkeypatch.undo()
            assert graphs.decode(images, 4) is None, "it is not tried again"
        else:
            with pytest.raises(torch.AcceleratorError):
                graphs.decode(images, 4)


def test_a_smaller_batch_replays_a_graph_of_at_most_twice_its_rows(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []
    monkeypatch.setattr(FixedStep, "capture", lambda step: captured.append(len(step._tokens)))
    graphs = DecodeGraphs(loaded.decoder, loaded.special)
    for num_images in (7, 3, 8, 2, 1, 5):
        images = loaded.features(num_images, seed=num_images)
        tokens = graphs.decode(images, 20)
        assert tokens is not None
        assert loaded.cut(tokens) == loaded.generated(images, 20, num_beams=1)
    assert captured == [8, 2]
    graphs.decode(loaded.features(5), 10)  # of another length
    assert captured == [8, 2, 8]


def test_words_that_are_added_for_alignment_change_no_logit() -> None:
    words = torch.nn.Linear(16, 29)
    padded, states = text._aligned(words), torch.randn(3, 16)
    assert padded.out_features == 32
    with torch.inference_mode():
        torch.testing.assert_close(padded(states)[:, :29], words(states))


def test_two_threads_decode_one_batch_each(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shape, and so by one step, whose memory holds one batch."""
    monkeypatch.setattr(FixedStep, "capture", lambda step: None)
    graphs = DecodeGraphs(loaded.decoder, loaded.special)
    batches = [loaded.features(5, seed=seed) for seed in range(6)]
    expected = [loaded.generated(images, 20, num_beams=1) for images in batches]
    assert len({str(tokens) for tokens in expected}) > 1

    def decode(images: torch.Tensor) -> Any:
        with torch.inference_mode():
            tokens = graphs.decode(images, 20)
        assert tokens is not None
        return loaded.cut(tokens)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(decode, batches)) == expected
    assert len(graphs._steps) == 1


def test_a_caption_ends_where_the_model_has_no_more_positions(loaded: Loaded) -> None:
    images = loaded.features(2)
    assert loaded.decoder.max_tokens == 40
    assert GreedyDecoder(loaded.decoder, loaded.special)(images, 500).shape[1] <= 40
    assert decode_beams(loaded.decoder, loaded.special, images, 500, 2).shape[1] <= 40


@pytest.mark.parametrize("at_once", [1, 1024])
def test_features_are_those_of_transformers(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(vision, "TOKENS_AT_ONCE", at_once)
    size = loaded.model.config.vision_config.image_size
    preprocessing = Preprocessing(size, "bicubic", PREPROCESSING.mean, PREPROCESSING.std)
    tower = VisionTower(loaded.model.vision_model, PixelNormalizer(preprocessing, "cpu", torch.float32))
    pixels = random_pixels(5, size=size)
    expected = loaded.model.vision_model(pixel_values=(pixels / 255 - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(tower(pixels), expected, atol=1e-4, rtol=1e-4)


def test_every_way_of_attending_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, length, 8, generator=generator) for length in (4, 9, 9))
    mask = torch.arange(9).view(1, 1, 1, 9) < torch.tensor([9, 5]).view(2, 1, 1, 1)
    by_products = attention.attend(queries, keys, values, mask)
    monkeypatch.setattr(attention, "_FEW_QUERIES", 0)
    torch.testing.assert_close(attention.attend(queries, keys, values, mask), by_products, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(attention.attend(queries, keys, values), by_products, atol=1e-2)


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_packed_weights_give_what_ordinary_ones_do(monkeypatch: pytest.MonkeyPatch, activation: str | None) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 8), torch.nn.Linear(16, 24, bias=False)]
    x = torch.randn(3, 5, 16)
    packed = linear.PackedLinear(layers, activation)(x)
    monkeypatch.setattr(linear, "_pack", lambda _: None)
    assert packed.shape == (3, 5, 32)
    torch.testing.assert_close(packed, linear.PackedLinear(layers, activation)(x), atol=1e-5, rtol=1e-5)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    functions: dict[str | None, Any] = {None: lambda y: y, "gelu": torch.nn.functional.gelu, "relu": torch.relu}
    torch.testing.assert_close(packed, functions[activation](expected), atol=1e-5, rtol=1e-5)


def test_a_text_scores_an_image_as_it_does_among_others(tmp_path: Path) -> None:
    matcher = load_matcher(ModelConfig(family="blip_itm", path=str(make_matcher(tmp_path))), "cpu")
    images = matcher.encode_images(random_pixels(4))
    first = matcher.match_itm(images, ["a cat", "a red car", "two guns", "a"])
    some = images.take([3, 1, 2])
    second = matcher.match_itm(some, ["two cats", "a dog", "a red car"])
    third = matcher.match_itm(some.take([1]), ["a dog"])
    assert first is not None
    assert second is not None
    assert third is not None
    fresh = matcher.match_itm(EncodedImages(some.embeds), ["two cats", "a dog", "a red car"])
    np.testing.assert_allclose(second, fresh, atol=1e-6)
    np.testing.assert_allclose(third, second[1:2], atol=1e-5)
    assert np.ptp(np.concatenate([first, second])) > 0.01


def test_towers_with_equal_weights_run_once_and_change_nothing() -> None:
    captions = ModelConfig(family="blip_caption", path=str(STARTER / "captioner"))
    matches = ModelConfig(family="blip_itm", path=str(STARTER / "matcher"))
    pixels, others = (random_pixels(6, size=64, seed=seed) for seed in (1, 2))
    texts = ["a red apple"] * 6

    towers = VisionTowers()
    captioner = load_captioner(captions, "cpu", "auto", towers)
    matcher = load_matcher(matches, "cpu", "auto", towers)
    (shared,) = towers._towers.values()
    found = []
    for batch in (pixels, others, pixels[:3]):
        words = captioner.caption(batch, 20)
        images = matcher.encode_images(batch.clone())  # as a worker does: equal, and elsewhere in memory
        found.append((words, matcher.match_itm(images, texts[: len(batch)])))
    assert shared.num_passes == 3

    captioner, matcher = load_captioner(captions, "cpu"), load_matcher(matches, "cpu")
    for batch, (words, scores) in zip((pixels, others, pixels[:3]), found, strict=True):
        assert captioner.caption(batch, 20) == words
        alone = matcher.match_itm(matcher.encode_images(batch), texts[: len(batch)])
        assert alone.tobytes() == scores.tobytes()


def test_towers_that_differ_in_one_weight_are_not_shared(tmp_path: Path) -> None:
    towers = VisionTowers()
    model = BlipForConditionalGeneration.from_pretrained(make_captioner(tmp_path)).eval()
    normalize = PixelNormalizer(PREPROCESSING, "cpu", torch.float32)
    first = towers.share(model.vision_model, normalize)
    assert towers.share(model.vision_model, normalize) is first
    other = Preprocessing(32, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.26))
    assert towers.share(model.vision_model, PixelNormalizer(other, "cpu", torch.float32)) is not first
    model.vision_model.post_layernorm.bias[0] += 1e-6
    assert towers.share(model.vision_model, normalize) is not first


@pytest.mark.slow
def test_captions_of_the_real_size_are_those_of_generate() -> None:
    """BLIP-base, 384 px, random weights."""
    text = {"num_attention_heads": 12, "encoder_hidden_size": 768}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={"image_size": 384, "initializer_range": 0.02})
    loaded = Loaded(BlipForConditionalGeneration(config).eval())
    preprocessing = Preprocessing(384, "bicubic", PREPROCESSING.mean, PREPROCESSING.std)
    tower = VisionTower(loaded.model.vision_model, PixelNormalizer(preprocessing, "cpu", torch.float32))
    pixels = random_pixels(2, size=384)
    expected = loaded.model.vision_model(pixel_values=(pixels / 255 - 0.5) / 0.25).last_hidden_state
    images = tower(pixels)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=1e-3)
    tokens = GreedyDecoder(loaded.decoder, loaded.special)(images, 8)
    assert loaded.cut(tokens) == loaded.generated(expected, 8, num_beams=1)
    beams = decode_beams(loaded.decoder, loaded.special, images, 4, 3)
    assert loaded.cut(beams) == loaded.generated(expected, 4, num_beams=3)


def demo_pixels(num_images: int) -> torch.Tensor:
    """(N, 3, 64, 64) uint8: so many of the pictures of the demo catalog that can be opened."""
    pictures = []
    for path in sorted((STARTER / "demo").glob("sku-*"))[:num_images]:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def itm_of_transformers(pixels: torch.Tensor, texts: list[str], dtype: Dtype) -> np.ndarray[Any, Any]:
    """(N,) scores of the starter matcher, all of it in the dtype."""
    folder, kind = STARTER / "matcher", model_dtype("cpu", dtype)
    model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=kind).eval()
    normalize = PixelNormalizer(read_preprocessing(folder, ModelConfig(family="blip_itm")), "cpu", kind)
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    logits = model(
        pixel_values=normalize(pixels), input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).itm_score
    scores: np.ndarray[Any, Any] = logits.float().softmax(dim=1)[:, 1].numpy()
    return scores


@pytest.mark.parametrize("num_images", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_bfloat16_says_and_scores_what_float32_does(num_images: int) -> None:
    pixels = demo_pixels(num_images)
    captions: dict[Dtype, list[str]] = {}
    scores: dict[Dtype, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    dtypes: tuple[Dtype, Dtype] = ("float32", "bfloat16")
    for dtype in dtypes:
        captioner = load_captioner(ModelConfig(family="blip_caption", path=str(STARTER / "captioner")), "cpu", dtype)
        matcher = load_matcher(ModelConfig(family="blip_itm", path=str(STARTER / "matcher")), "cpu", dtype)
        captions[dtype] = captioner.caption(pixels, 28)
        images = matcher.encode_images(pixels)
        assert str(images.embeds.dtype) == f"torch.{dtype}"
        texts = captions["float32"]
        scores[dtype] = matcher.match_itm(images, texts), matcher.match_itc(images, texts)
    equal = np.array(captions["float32"]) == np.array(captions["bfloat16"])
    assert len(equal) == num_images
    assert equal.mean() >= 0.99
    itm, itc = (np.abs(a - b) for a, b in zip(scores["float32"], scores["bfloat16"], strict=True))
    assert itc.max() <= 0.01
    # One of the 200 pairs, in the steep middle of the sigmoid, is 0.011 off: what lies between the layers, the cross
    # attention and the head may all be in float32, and the products of the vision tower alone still move it by 0.008.
    # In transformers' own bfloat16 two pairs are further off than 0.01, by up to 0.019.
    assert (itm <= 0.01).mean() >= 0.99
    assert itm.max() <= 0.02
    theirs = np.abs(np.subtract(*(itm_of_transformers(pixels, texts, dtype) for dtype in dtypes)))
    assert itm.mean() < theirs.mean()


@pytest.mark.parametrize("was_on", [True, False])
def test_attention_to_what_grows_is_without_cudnn_until_the_last_thread_is_done(was_on: bool) -> None:
    is_on = torch.backends.cuda.cudnn_sdp_enabled  # works without CUDA, as does the switch
    before = is_on()
    torch.backends.cuda.enable_cudnn_sdp(was_on)
    entered, done = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def decode(number: int) -> bool:
        with attention.growing(torch.device("cuda")):
            entered[number].set()
            assert done[number].wait(20.0)
            return is_on()

    try:
        with ThreadPoolExecutor(2) as threads:
            decoding = [threads.submit(decode, number) for number in (0, 1)]
            assert all(event.wait(20.0) for event in entered)
            for number in (0, 1):
                assert not is_on()
                done[number].set()
                assert not decoding[number].result(20.0)
        assert is_on() == was_on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_lacking_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pixels_module, "has_bfloat16", lambda: False)
    caplog.set_level("WARNING", logger="vlmflow")  # tests before this one may have raised it
    assert model_dtype("cpu", "bfloat16") == torch.bfloat16
    assert "no bfloat16 instructions" in caplog.text
    caplog.clear()
    assert model_dtype("cpu") == torch.float32
    assert not caplog.text
