"""cuDNN, which plans attention anew for every shape, is given few of them: attention is without it, or rows are added.

Its switch is there without CUDA too, and so can be watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    ViltConfig,
    ViltForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
)

from tests.fake_cuda import HostReads, build, fake_mode
from tests.families import make_blip2_captioner
from tests.models import IMAGE_SIZE, make_captioner, make_classifier, make_judge, make_vilt, random_pixels
from tests.unit.models.test_fake_cuda import HALF, PREPROCESSING, QUESTIONS, Blip, clip_architecture, pixels
from tests.unit.models.vilbert.test_vilbert_roles import COLUMNS, make_vilbert, regions
from vlmflow.config import ModelConfig
from vlmflow.models import attention, blip2, clip_packed, judge, load_captioner, load_matcher, sizes, vlm
from vlmflow.models.blip import BlipCaptioner, BlipMatcher
from vlmflow.models.blip_vqa import BlipAnswerer
from vlmflow.models.classifier import ImageClassifier
from vlmflow.models.clip import ClipEmbedder
from vlmflow.models.judge import VlmJudge
from vlmflow.models.pixels import PixelNormalizer
from vlmflow.models.sizes import in_few_sizes, round_up
from vlmflow.models.vilbert import load as vilbert_load
from vlmflow.models.vilt import ViltAnswerer
from vlmflow.models.vlm import TransformersChat


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.dtype, int | None]]]:
    """Of each attention that torch did, its dtype, and the rows that cuDNN would have been given; None: it is off."""
    found: list[tuple[torch.dtype, int | None]] = []
    attend = torch.nn.functional.scaled_dot_product_attention
    before = torch.backends.cuda.cudnn_sdp_enabled()

    def seen(queries: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        found.append((queries.dtype, len(queries) if torch.backends.cuda.cudnn_sdp_enabled() else None))
        return attend(queries, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(sizes, "is_watched", lambda: False)  # fake tensors do watch
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield found
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_sizes_are_few() -> None:
    assert [round_up(n, 64) for n in (1, 2, 3, 33, 64, 65, 128, 250)] == [1, 2, 4, 64, 64, 128, 128, 256]
    assert [round_up(n, 32) for n in (1, 3, 31, 33, 64, 65, 250)] == [1, 4, 32, 64, 64, 96, 256]


@pytest.mark.parametrize(
    ("device", "dtype", "is_watched", "num_computed"),
    [
        ("cuda", HALF, False, 8),
        ("cuda", torch.float16, False, 8),
        ("cuda", torch.float32, False, 5),
        ("cpu", HALF, False, 5),
        ("cuda", HALF, True, 5),
    ],
)
def test_rows_are_added_where_cudnn_would_plan_and_nobody_counts(
    device: str, dtype: torch.dtype, is_watched: bool, num_computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "is_watched", lambda: is_watched)
    given, computed = random_pixels(5), []

    def compute(some: torch.Tensor) -> torch.Tensor:
        computed.append(len(some))
        return some.sum(dim=(1, 2, 3))

    normalize: Any = SimpleNamespace(device=device, dtype=dtype)
    assert torch.equal(in_few_sizes(compute, given, normalize), given.sum(dim=(1, 2, 3)))
    assert computed == [num_computed]
    assert in_few_sizes(compute, given[:0], normalize).shape == (0,)


BlipCall = Callable[[Blip], Any]


def match_long_texts(blip: Blip) -> None:
    matcher = blip.adapter(BlipMatcher, BlipForImageTextRetrieval, torch.float32)
    matcher.match_itm(matcher.encode_images(pixels()), ["a red car and " * 7] * 5)


CALLS: dict[str, BlipCall] = {
    "greedy": lambda blip: blip.adapter(BlipCaptioner, BlipForConditionalGeneration).caption(pixels(), 4),
    "beams": lambda blip: blip.adapter(BlipCaptioner, BlipForConditionalGeneration).caption(pixels(), 4, 3),
    "match": match_long_texts,
    "answer": lambda blip: blip.adapter(BlipAnswerer, BlipForQuestionAnswering).answer(pixels(), QUESTIONS),
}


@pytest.mark.parametrize("name", CALLS)
def test_blip_plans_for_few_sizes(name: str, tmp_path: Path, attended: list[tuple[torch.dtype, int | None]]) -> None:
    folder = make_captioner(tmp_path / "blip")
    tokenizer, config = AutoTokenizer.from_pretrained(folder), BlipConfig.from_pretrained(folder)
    with fake_mode(), HostReads():
        CALLS[name](Blip(config, tokenizer))
    assert {rows for dtype, rows in attended if dtype == HALF} == {8, None}


def test_other_models_plan_for_few_sizes(tmp_path: Path, attended: list[tuple[torch.dtype, int | None]]) -> None:
    architecture = clip_architecture(tmp_path / "clip")
    vilt = make_vilt(tmp_path / "vilt")
    answers, config = AutoTokenizer.from_pretrained(vilt), ViltConfig.from_pretrained(vilt)
    vit = ViTConfig.from_pretrained(make_classifier(tmp_path / "vit"))
    with fake_mode(), HostReads():
        normalize = PixelNormalizer(PREPROCESSING, "cuda", HALF)
        model = build(lambda: open_clip.CLIP(**architecture), HALF)
        assert clip_packed.pack_image_tower(model)
        embedder = ClipEmbedder(model, open_clip.SimpleTokenizer(context_length=16), normalize, 24)
        embedder.embed_images(pixels())
        assert {rows for _, rows in attended} == {8}
        attended.clear()
        embedder.embed_texts(["a cat", "a dog", "a car"])
        assert {rows for _, rows in attended} == {None}
        attended.clear()
        ViltAnswerer(build(lambda: ViltForQuestionAnswering(config), HALF), answers, normalize, IMAGE_SIZE).answer(
            pixels(), QUESTIONS
        )
        assert {rows for _, rows in attended} == {None}
        attended.clear()
        classifier = ImageClassifier(build(lambda: ViTForImageClassification(vit), HALF), normalize, ["hentai"])
        classifier._columns = slice(1, 2)  # type: ignore[assignment]  # fake tensors take no list beside a slice
        assert classifier.score(pixels()).shape == (5, 1)
        assert {rows for _, rows in attended} == {8}


@pytest.mark.parametrize("name", ["vlm", "judge", "blip2", "vilbert"])
def test_what_transformers_runs_does_without_cudnn(
    name: str, tmp_path: Path, attended: list[tuple[torch.dtype, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor, with the switch turned as on CUDA."""
    for module in (vlm, judge, blip2, vilbert_load):
        monkeypatch.setattr(module, "growing", lambda _: attention.growing(torch.device("cuda")))
    given = random_pixels(3)
    if name == "vlm":
        TransformersChat.load(make_judge(tmp_path / name), "cpu").write(given, ["the car"] * 3, 3)
    elif name == "judge":
        VlmJudge.load(make_judge(tmp_path / name), ["the car"], "cpu").score(given)
    elif name == "blip2":
        folder = make_blip2_captioner(tmp_path / name)
        captioner = load_captioner(ModelConfig(family="blip2_caption", path=str(folder)), "cpu")
        assert isinstance(captioner, blip2.Blip2Captioner)
        features = captioner._vision(given)
        captioner._vision = lambda _: features  # type: ignore[assignment]
        attended.clear()
        captioner.caption(given, 3)
    else:
        folder = make_vilbert(tmp_path / name, COLUMNS)
        matcher = load_matcher(ModelConfig(family="vilbert", path=str(folder)), "cpu")
        matcher.match_itm(matcher.encode_images(regions()), ["a car"] * 3)  # type: ignore[arg-type]
    assert attended
    assert {rows for _, rows in attended} == {None}
