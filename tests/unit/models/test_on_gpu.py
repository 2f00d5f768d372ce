"""The models on CUDA: what graphs decode, and that captions, scores and vectors are those of a processor.

In float32 captions are equal and scores within 1e-4; in bfloat16 99% of the captions, and of the scores within 0.01.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.clip_cpu import demo_pixels, moderated
from tests.dual_encoders import KINDS, make_dual_encoder
from tests.models import random_pixels
from vlmflow.config import Dtype, ModelConfig, PoolConfig
from vlmflow.device_errors import release_memory
from vlmflow.engine.loading import set_up_torch
from vlmflow.models import fused, load_answerer, load_captioner, load_embedder, load_matcher, norm
from vlmflow.models.blip import BlipCaptioner
from vlmflow.models.blip_fast import cross
from vlmflow.models.blip_fast.graph import DecodeGraphs
from vlmflow.models.dual_encoder import DualEmbedder
from vlmflow.models.towers import VisionTowers
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import load_policy
from vlmflow.moderation.prompts import encode_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STARTER = Path(__file__).parents[3] / "vlmflow" / "starter"
CAPTIONER = ModelConfig(family="blip_caption", path=str(STARTER / "captioner"))
MATCHER = ModelConfig(family="blip_itm", path=str(STARTER / "matcher"))
VQA = ModelConfig(family="vilt", path=str(STARTER / "vqa"))
CLIP = ModelConfig(family="open_clip", path=str(STARTER / "clip"))
# How far scores may be off, and the share that must be no further.
TOLERANCES = pytest.mark.parametrize(("dtype", "most", "share"), [("float32", 1e-4, 1.0), ("bfloat16", 0.01, 0.99)])


def as_in_a_worker(dtype: Dtype) -> None:
    """TF32 off for float32; on for what stays in float32 beside bfloat16."""
    set_up_torch(PoolConfig(tasks=("caption",), gpus=1), dtype)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (dtype != "float32")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return demo_pixels(64)


@pytest.fixture(scope="module")
def expected(pixels: torch.Tensor) -> list[str]:
    as_in_a_worker("float32")
    return load_captioner(CAPTIONER, "cpu").caption(pixels, 20)


@pytest.mark.parametrize("carried", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_sum_and_its_norm_in_one_pass_are_those_of_two(carried: torch.dtype, given: torch.dtype) -> None:
    assert fused.why_not() is None
    plain = torch.nn.LayerNorm(768, device="cuda").requires_grad_(False)
    plain.weight.uniform_(0.5, 2.0)
    states = torch.randn(5, 33, 768, device="cuda").to(carried)
    added = torch.randn(5, 33, 768, device="cuda", dtype=torch.bfloat16)
    summed, normed = norm.Norm(plain, given).add(states, added)
    assert torch.equal(summed, states + added)
    tolerance = 1e-5 if given == torch.float32 else 2**-7
    torch.testing.assert_close(normed.float(), plain((states + added).float()), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(("texts", "width"), [(1, 768), (3, 768), (12, 768), (1, 1024), (3, 1024), (2, 64)])
def test_texts_attend_to_features_as_by_products(texts: int, width: int) -> None:
    queries = torch.randn(12, 5 * texts, width, device="cuda") * 3 / width**0.5
    features = torch.randn(5, 577, width, device="cuda")
    expected = cross.attend_to_features(queries, features)  # in float32: no kernel
    found = cross.attend_to_features(queries.bfloat16(), features.bfloat16())
    assert not fused._unfit
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.02)


def test_a_graph_decodes_what_a_processor_does(pixels: torch.Tensor, expected: list[str]) -> None:
    as_in_a_worker("float32")
    captioner = load_captioner(CAPTIONER, "cuda", "float32")
    assert isinstance(captioner, BlipCaptioner)
    graphs = captioner._decode_greedily._graphs
    # Batches that share a graph, that fill it in part, and more sizes than are kept.
    found = [text for part in pixels.split([64, 40, 3, 1, 64, 33, 4]) for text in captioner.caption(part, 20)]
    assert graphs._works, "no graph could be captured"
    assert 1 <= len(graphs._steps) <= 2
    assert found == expected


def test_beams_find_what_they_find_on_a_processor(pixels: torch.Tensor) -> None:
    as_in_a_worker("float32")
    on_gpu, exact = (load_captioner(CAPTIONER, device, "float32") for device in ("cuda", "cpu"))
    assert on_gpu.caption(pixels[:64], 20, 3) == exact.caption(pixels[:64], 20, 3)


def test_a_graph_decodes_what_the_steps_alone_do(pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    as_in_a_worker("bfloat16")
    captioner = load_captioner(CAPTIONER, "cuda")
    with_graphs = captioner.caption(pixels, 20)
    monkeypatch.setattr(DecodeGraphs, "decode", lambda *_: None)
    assert np.mean([a == b for a, b in zip(with_graphs, captioner.caption(pixels, 20), strict=True)]) >= 0.99


def test_captions_in_bfloat16_are_those_of_a_processor(pixels: torch.Tensor, expected: list[str]) -> None:
    as_in_a_worker("bfloat16")
    found = load_captioner(CAPTIONER, "cuda").caption(pixels, 20)
    assert np.mean([one == other for one, other in zip(found, expected, strict=True)]) >= 0.99


def test_graphs_are_let_go_when_memory_runs_out(pixels: torch.Tensor) -> None:
    captioner = load_captioner(CAPTIONER, "cuda")
    assert isinstance(captioner, BlipCaptioner)
    first = captioner.caption(pixels[:8], 20)
    held = torch.cuda.memory_allocated()
    release_memory()
    assert torch.cuda.memory_allocated() < held
    assert captioner.caption(pixels[:8], 20) == first


def test_memory_is_given_back_beside_captures(pixels: torch.Tensor) -> None:
    as_in_a_worker("bfloat16")
    captioner = load_captioner(CAPTIONER, "cuda")
    assert isinstance(captioner, BlipCaptioner)
    expected = captioner.caption(pixels[:8], 20)
    with ThreadPoolExecutor(1) as threads:
        is_done = threading.Event()

        def give_back() -> None:
            while not is_done.is_set():
                release_memory()

        giving = threads.submit(give_back)
        found = [captioner.caption(pixels[:8], 20) for _ in range(5)]
        is_done.set()
        giving.result(60.0)
    assert found == [expected] * 5
    assert captioner._decode_greedily._graphs._works


@TOLERANCES
def test_match_scores_are_those_of_a_processor(
    pixels: torch.Tensor, expected: list[str], dtype: Dtype, most: float, share: float
) -> None:
    as_in_a_worker(dtype)
    scores = []
    for matcher in (load_matcher(MATCHER, "cpu"), load_matcher(MATCHER, "cuda", dtype)):
        images = matcher.encode_images(pixels)
        found = matcher.match_itm(images, expected), matcher.match_itc(images, expected)
        assert found[0] is not None
        assert found[1] is not None
        scores.append(np.stack([found[0], found[1]]))
    assert np.mean(np.abs(scores[0] - scores[1]) <= most) >= share


@TOLERANCES
def test_texts_of_all_lengths_match_as_on_a_processor(
    pixels: torch.Tensor, dtype: Dtype, most: float, share: float
) -> None:
    """Short ones attend to the features themselves, and long ones to keys."""
    as_in_a_worker(dtype)
    texts = ["a red car beside a house " * (1 + row % 16) for row in range(len(pixels))]
    found = []
    for matcher in (load_matcher(MATCHER, "cpu"), load_matcher(MATCHER, "cuda", dtype)):
        scores = matcher.match_itm(matcher.encode_images(pixels), texts)
        assert scores is not None
        found.append(scores)
    assert np.mean(np.abs(found[0] - found[1]) <= most) >= share


def test_a_batch_of_another_size_scores_as_before(pixels: torch.Tensor) -> None:
    """Rows that are added for cuDNN are read by nobody."""
    as_in_a_worker("bfloat16")
    embedder = load_embedder(CLIP, "cuda")
    together = embedder.embed_images(pixels)
    assert np.abs(embedder.embed_images(pixels[:37]) - together[:37]).max() < 0.01


def test_answers_are_those_of_a_processor(pixels: torch.Tensor) -> None:
    as_in_a_worker("auto")
    questions = [["what color is the background?", "how many dogs are there?", "is it a cat?"]] * len(pixels)
    exact, found = (
        [answer for of in load_answerer(VQA, device).answer(pixels, questions) for answer in of]
        for device in ("cpu", "cuda")
    )
    assert np.mean([one.text == other.text for one, other in zip(exact, found, strict=True)]) >= 0.99
    assert np.mean([abs(one.score - other.score) <= 0.01 for one, other in zip(exact, found, strict=True)]) >= 0.99


@TOLERANCES
def test_vectors_are_judged_as_those_of_a_processor(
    pixels: torch.Tensor, dtype: Dtype, most: float, share: float
) -> None:
    as_in_a_worker(dtype)
    exact, on_gpu = load_embedder(CLIP, "cpu"), load_embedder(CLIP, "cuda", dtype)
    policy = load_policy("demo")
    moderator = Moderator(policy, policy.bindings[0], encode_prompts(policy, exact))
    (scores, decisions), (others, decided) = (
        moderated(moderator, embedder.embed_images(pixels)) for embedder in (exact, on_gpu)
    )
    assert np.mean(np.abs(scores - others) <= most) >= share
    assert np.mean([one == other for one, other in zip(decisions, decided, strict=True)]) >= 0.99


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.99)])
def test_dual_encoders_embed_as_on_a_processor(
    tmp_path: Path, kind: str, dtype: Dtype, least: float, packs: bool
) -> None:
    as_in_a_worker(dtype)
    folder = make_dual_encoder(tmp_path, kind)
    config = ModelConfig(family="dual_encoder", path=str(folder))
    exact, on_gpu = load_embedder(config, "cpu"), DualEmbedder.load(folder, config, "cuda", dtype, packs=packs)
    pictures, texts = random_pixels(37), ["a red car", "two dogs on a table", "a"]
    assert (exact.embed_images(pictures) * on_gpu.embed_images(pictures)).sum(axis=1).min() > least
    assert (exact.embed_texts(texts) * on_gpu.embed_texts(texts)).sum(axis=1).min() > least


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_was_embedded_is_matched_without_another_pass_on_a_gpu(tmp_path: Path, kind: str) -> None:
    as_in_a_worker("auto")
    config = ModelConfig(family="dual_encoder", path=str(make_dual_encoder(tmp_path, kind)))
    towers = VisionTowers()
    embedder, matcher = load_embedder(config, "cuda", "auto", towers), load_matcher(config, "cuda", "auto", towers)
    views, first = random_pixels(37).to("cuda"), torch.arange(0, 37, 2, device="cuda")
    tower: Any = embedder.tower  # type: ignore[attr-defined]
    passes = tower.num_passes
    with torch.inference_mode(), towers.of_batch():
        vectors = embedder.embed_images(views)
        found = matcher.encode_images(views[first]).embeds.float()
    assert tower.num_passes == passes + 1
    expected = torch.nn.functional.normalize(found, dim=-1).cpu().numpy()
    np.testing.assert_allclose(vectors[::2], expected, atol=1e-6)
