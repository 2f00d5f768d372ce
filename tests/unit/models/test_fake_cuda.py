"""The ways that models take on a GPU, without one: nothing is left on the processor, and the host waits seldom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    ViltConfig,
    ViltForQuestionAnswering,
)

from tests.dual_encoders import make_dual_encoder
from tests.fake_cuda import HostReads, Operators, build, cast, fake_mode
from tests.models import IMAGE_SIZE, make_captioner, make_clip, make_vilt
from vlmflow.models import clip_packed, packed
from vlmflow.models.blip import BlipCaptioner, BlipMatcher
from vlmflow.models.blip_fast import VisionTower
from vlmflow.models.blip_fast.graph import FixedStep
from vlmflow.models.blip_vqa import BlipAnswerer
from vlmflow.models.clip import ClipEmbedder
from vlmflow.models.dual_encoder import DualEmbedder, DualMatcher, TextTokenizer, pack_layers
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.preprocessing import Preprocessing
from vlmflow.models.towers import SharedTower
from vlmflow.models.vilt import ViltAnswerer

HALF = torch.bfloat16
PREPROCESSING = Preprocessing(IMAGE_SIZE, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
QUESTIONS = [["a cat"], ["a red car"], [], ["two guns", "a"], ["a"]]


@dataclass
class Blip:
    """Makes adapters."""

    config: BlipConfig
    tokenizer: Any

    def adapter(self, adapter: Any, model_class: Any, dtype: torch.dtype = HALF) -> Any:
        """As it is loaded: ``dtype`` is that of all but the vision tower."""
        model = build(lambda: model_class(self.config), dtype)
        cast(model.vision_model, HALF)
        normalize = PixelNormalizer(PREPROCESSING, "cuda", HALF)
        return adapter(model, self.tokenizer, SharedTower(VisionTower(model.vision_model, normalize)))

    def step(self) -> tuple[FixedStep, torch.Tensor]:
        """Of 8 images; and features of 5."""
        captioner = self.adapter(BlipCaptioner, BlipForConditionalGeneration)
        images = captioner._vision(pixels())
        return FixedStep(captioner._decoder, captioner._special, images, 8, 20), images


def pixels() -> torch.Tensor:
    return torch.empty((5, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device="cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioner(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def blip(folder: Path) -> Iterator[Blip]:
    tokenizer, config = AutoTokenizer.from_pretrained(folder), BlipConfig.from_pretrained(folder)
    with fake_mode():
        yield Blip(config, tokenizer)


def operators(step: FixedStep) -> Operators:
    with torch.no_grad(), Operators() as found:
        step._step()
    return found


def test_the_step_that_cuda_records_stays_on_the_device_and_tells_the_host_nothing(blip: Blip) -> None:
    step, images = blip.step()
    found = operators(step)
    assert found.not_for_a_graph == []
    assert found.dtypes["aten.addmm.default"] == {HALF}
    assert found.dtypes["aten.native_layer_norm.default"] == {torch.float32}

    with torch.no_grad(), HostReads() as reads:
        tokens = step.decode(images)
    assert (tokens.shape, tokens.device.type) == ((5, 20), "cuda")
    assert reads.found == {"graph.py:answer": 8}, "whether all have ended: asked at every second step, read two later"


def test_what_a_recorded_step_must_not_do_is_seen(blip: Blip) -> None:
    step, _ = blip.step()
    on_device = step._tower._positions
    step._tower._positions = torch.empty(on_device.shape, dtype=on_device.dtype)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"two( different)? devices"):
        step._step()
    step._tower._positions = on_device

    step._special = type("", (), {"end": 3, "pad": torch.zeros((), dtype=torch.int64)})()
    assert operators(step).not_for_a_graph == [("aten.masked_fill.Tensor", ("cpu", "cuda"))]


def test_captions_wait_for_the_device_step_by_step_alone(blip: Blip) -> None:
    captioner = blip.adapter(BlipCaptioner, BlipForConditionalGeneration)
    with HostReads() as reads:
        assert captioner._vision(pixels()).dtype == HALF
        assert reads.found == {}
        assert len(captioner.caption(pixels(), 8)) == 5
        assert set(reads.found) == {"greedy.py:_decode", "blip.py:caption"}
        reads.found.clear()
        assert len(captioner.caption(pixels(), 8, num_beams=3)) == 5
        assert set(reads.found) == {"beams.py:decode_beams", "blip.py:caption"}


def test_a_match_waits_for_the_device_once(blip: Blip) -> None:
    matcher = blip.adapter(BlipMatcher, BlipForImageTextRetrieval, torch.float32)
    with HostReads() as reads:
        images = matcher.encode_images(pixels())
        assert images.embeds.dtype == HALF
        assert reads.found == {}
        texts = ["a cat", "a red car", "two guns", "a " * 30, "a"]  # of two lengths, which are two groups
        assert matcher.match_itm(images, texts).shape == (5,)
        assert matcher.match_itm(images.take([1, 3]), ["a cat", "a"]).shape == (2,)
        assert matcher.match_itc(images, ["a cat"] * 5).shape == (5,)
    assert reads.found == {"blip.py:match_itm": 2, "blip.py:match_itc": 1}


def test_answers_wait_for_the_device_step_by_step_alone(blip: Blip) -> None:
    answerer = blip.adapter(BlipAnswerer, BlipForQuestionAnswering)
    with HostReads() as reads:
        answers = answerer.answer(pixels(), QUESTIONS)
    assert [len(given) for given in answers] == [1, 1, 0, 2, 1]
    assert set(reads.found) == {"blip_vqa.py:_decode"}


def test_a_classifier_of_answers_waits_for_the_device_at_its_end(tmp_path: Path) -> None:
    folder = make_vilt(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), ViltConfig.from_pretrained(folder)
    with fake_mode(), HostReads() as reads:
        model = build(lambda: ViltForQuestionAnswering(config), HALF)
        answerer = ViltAnswerer(model, tokenizer, PixelNormalizer(PREPROCESSING, "cuda", HALF), IMAGE_SIZE)
        reads.found.clear()
        answers = answerer.answer(pixels(), QUESTIONS)
    assert [len(given) for given in answers] == [1, 1, 0, 2, 1]
    assert set(reads.found) == {"vilt.py:_choose"}


def clip_architecture(folder: Path) -> dict[str, Any]:
    architecture = json.loads((make_clip(folder) / "open_clip_config.json").read_text())["model_cfg"]
    text = {name: value for name, value in architecture["text_cfg"].items() if not name.startswith("hf_")}
    return architecture | {"text_cfg": text}


def attend_without_values(queries: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    """In the place of attention, which without values takes a way that no GPU does."""
    return queries.new_empty((len(queries), queries.shape[2], queries[0, :, 0].numel()))


def test_layers_of_clip_copy_nothing_to_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "attend", attend_without_values)
    architecture = clip_architecture(tmp_path)
    with fake_mode():
        model = build(lambda: open_clip.CLIP(**architecture), HALF)
        assert clip_packed.pack_image_tower(model)
        states = torch.empty((5, 17, model.visual.conv1.out_channels), dtype=HALF, device="cuda")
        with torch.no_grad(), Operators() as found:
            assert model.visual.transformer(states).dtype == HALF
    assert "aten.native_layer_norm.default" in found.dtypes
    assert not {"aten._to_copy.default", "aten.clone.default", "aten.copy_.default"} & set(found.dtypes)
    assert found.not_for_a_graph == []


def test_an_embedding_waits_for_the_device_once(tmp_path: Path) -> None:
    architecture = clip_architecture(tmp_path)
    with fake_mode(), HostReads() as reads:
        model = build(lambda: open_clip.CLIP(**architecture))
        assert clip_packed.pack_image_tower(model)
        tokenize = open_clip.SimpleTokenizer(context_length=16)
        embedder = ClipEmbedder(model, tokenize, PixelNormalizer(PREPROCESSING, "cuda", torch.float32), 24)
        reads.found.clear()
        assert embedder.embed_images(pixels()).shape == (5, 24)
        assert embedder.embed_texts(["a cat", "a dog"]).shape == (2, 24)
    assert reads.found == {"clip.py:_unit": 2}


@pytest.mark.parametrize("kind", ["clip", "laion", "siglip"])
def test_packed_layers_of_a_dual_encoder_copy_nothing_to_another_dtype(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "attend", attend_without_values)
    config = AutoConfig.from_pretrained(make_dual_encoder(tmp_path, kind))
    with fake_mode():
        model = build(lambda: AutoModel.from_config(config))
        pack_layers(model, HALF, HALF)
        encoder = cast(model, HALF).vision_model.encoder
        states = torch.empty((5, 17, 32), dtype=HALF, device="cuda")
        with torch.no_grad(), Operators() as found:
            given = encoder(inputs_embeds=states).last_hidden_state
    assert (given.dtype, given.device.type) == (HALF, "cuda")
    assert given.shape == (5, 17 if kind == "siglip" else 1, 32), "of the token alone that the vector is made of"
    assert {"aten.native_layer_norm.default", "aten.addmm.default"} <= set(found.dtypes)
    assert not {"aten._to_copy.default", "aten.clone.default", "aten.copy_.default"} & set(found.dtypes)
    assert found.not_for_a_graph == []


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_dual_encoder_waits_for_the_device_once(tmp_path: Path, kind: str) -> None:
    folder = make_dual_encoder(tmp_path, kind)
    config = AutoConfig.from_pretrained(folder)
    with fake_mode(), HostReads() as reads:
        model = build(lambda: AutoModel.from_config(config), HALF)
        normalize = PixelNormalizer(PREPROCESSING, "cuda", HALF)
        embedder = DualEmbedder(model, TextTokenizer(folder, model), normalize)
        reads.found.clear()
        assert embedder.embed_images(pixels()).shape == (5, embedder.dim)
        assert embedder.embed_texts(["a cat", "a red dog"]).shape == (2, embedder.dim)
        matcher = DualMatcher(embedder)
        assert matcher.match_itc(matcher.encode_images(pixels()), ["a cat"] * 5).shape == (5,)
    assert reads.found == {"vectors.py:to_unit": 2, "vectors.py:cosines": 1}


def test_a_matcher_finds_what_was_embedded_without_waiting_for_the_device(tmp_path: Path) -> None:
    """Of the very pixels; where it is shown some of them, it waits for what tells which they are."""
    folder = make_dual_encoder(tmp_path, "siglip")
    config = AutoConfig.from_pretrained(folder)
    with fake_mode(), HostReads() as reads:
        model = build(lambda: AutoModel.from_config(config), HALF)
        embedder = DualEmbedder(model, TextTokenizer(folder, model), PixelNormalizer(PREPROCESSING, "cuda", HALF))
        embedder.tower.num_users = 2
        shown = pixels()
        embedder.embed_images(shown)
        reads.found.clear()
        matcher = DualMatcher(embedder)
        matcher.encode_images(shown)
        assert embedder.tower.num_passes == 1
        assert reads.found == {}
        matcher.encode_images(shown[1:4])
    assert reads.found == {"kept.py:_samples": 2, "kept.py:_are_equal_on_device": 1}
