"""Operations counted against the arithmetic of the models, and a ceiling that is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import WORDS, make_captioner, make_vilt, random_pixels
from vlmflow.config import ModelConfig
from vlmflow.engine.flops import Ceilings, CountedTask, _count, _formulas, matmul_ceiling
from vlmflow.models import load_answerer, load_captioner
from vlmflow.models.blip import BlipCaptioner
from vlmflow.models.linear import PackedLinear

LINEAR = torch.nn.Linear(64, 128)
ATTENTION = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
X = torch.randn(5, 7, 64)
HEADS = torch.randn(2, 4, 50, 16)
IMAGES, KERNELS = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: LINEAR(X), 2 * 35 * 64 * 128),
        (lambda: PackedLinear([LINEAR])(X), 2 * 35 * 64 * 128),
        (lambda: torch.bmm(X, X.transpose(1, 2)), 2 * 5 * 7 * 7 * 64),
        (lambda: torch._addmm_activation(LINEAR.bias, X[0], LINEAR.weight.t(), use_gelu=True), 2 * 7 * 64 * 128),
        (lambda: torch.nn.functional.scaled_dot_product_attention(HEADS, HEADS, HEADS), 2 * 2 * 8 * 50 * 50 * 16),
        (lambda: ATTENTION(X, X, X, need_weights=False)[0], 5 * (2 * 7 * 4 * 64 * 64 + 2 * 2 * 7 * 7 * 64)),
        (
            lambda: torch.nn.functional.conv2d(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 2, 2), stride=2),
            2 * 2 * 16 * 48,
        ),
    ],
    ids=["linear", "packed", "batch", "with an activation", "fused attention", "attention of open_clip", "convolution"],
)
def test_operations_are_those_of_the_arithmetic(call: Callable[[], torch.Tensor], expected: int) -> None:
    with torch.inference_mode():
        _, counted = _count(lambda: {"x": pa.array([float(call().sum())])})
    assert counted == expected


class Squaring:
    """Squares numbers, and refuses negative ones."""

    name = "embed"
    reads = ("number",)
    writes = pa.schema([("square", pa.float64())])

    def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
        numbers = batch["number"].to_pylist()
        if min(numbers) < 0:
            raise ValueError("negative")
        return {"square": pa.array([number * number for number in numbers])}


def test_later_rows_count_as_much_as_an_average_one_of_the_first_batch() -> None:
    class Product(Squaring):
        def __call__(self, batch: pa.Table) -> dict[str, pa.Array]:
            out = torch.ones(batch.num_rows, 8) @ torch.ones(8, 16)
            return {"square": pa.array(out.sum(dim=1).double().tolist())}

    task = CountedTask(Product())
    batch = pa.table({"number": [1.0, 2.0, 3.0]})
    assert task(batch)["square"].to_pylist() == [128.0] * 3
    assert task.flops == 3 * 2 * 8 * 16
    task(batch.slice(0, 2))
    assert task.flops == 5 * 2 * 8 * 16


def test_a_batch_that_fails_raises_as_it_would_uncounted() -> None:
    task = CountedTask(Squaring())
    with pytest.raises(ValueError, match="negative"):
        task(pa.table({"number": [-1.0]}))


def test_what_is_counted_runs_as_ever_and_counts_as_with_torch_s_counter(tmp_path: Path) -> None:
    folder = make_captioner(tmp_path)
    captioner = load_captioner(ModelConfig(family="blip_caption", path=str(folder)), "cpu")
    pixels = random_pixels(6)
    expected = captioner.caption(pixels, 12)
    captions, counted = _count(lambda: {"caption": pa.array(captioner.caption(pixels, 12))})
    assert captions["caption"].to_pylist() == expected
    counter = FlopCounterMode(display=False)
    counter.flop_registry = _formulas()
    with counter:
        captioner.caption(pixels, 12)
    assert counted == counter.get_total_flops() > 0


def test_answers_cost_what_their_arithmetic_says(tmp_path: Path) -> None:
    answerer = load_answerer(ModelConfig(family="vilt", path=str(make_vilt(tmp_path))), "cpu")
    pixels, questions = random_pixels(3), [["a red car", "two dogs"], [], ["a cat on the table"]]
    _, counted = _count(lambda: {"answers": pa.array([len(of) for of in answerer.answer(pixels, questions)])})
    width, patches = 32, 16
    layer = 4 * width * width + 2 * width * 64  # of weights
    expected = 3 * patches * 3 * 8 * 8 * width  # once an image, asked or not
    for tokens in [7 + 1 + patches] * 3:  # the longest question has 5 words and 2 tokens around them
        expected += tokens * layer + 2 * tokens * tokens * width
        # Of the last layer keys and values of all tokens, and the first token's rest.
        expected += tokens * 2 * width * width + layer - 2 * width * width + 2 * tokens * width
        expected += width * width + width * 2 * width + 2 * width * len(WORDS)
    assert counted == 2 * expected


def test_each_beam_counts_as_much_as_a_greedy_caption(tmp_path: Path) -> None:
    captioner = load_captioner(ModelConfig(family="blip_caption", path=str(make_captioner(tmp_path))), "cpu")
    assert isinstance(captioner, BlipCaptioner)
    pixels = random_pixels(4)

    def counted(call: Callable[[], object]) -> float:
        return _count(lambda: {"x": pa.array([str(call())])})[1]

    with torch.inference_mode():
        image = counted(lambda: captioner._vision(pixels))
    greedy = counted(lambda: captioner.caption(pixels, 1)) - image
    assert greedy > 0
    assert counted(lambda: captioner.caption(pixels, 1, 3)) - image == 3 * greedy
    # At the second step each beam sees one key and one value more in each of the 2 layers of 32 dimensions.
    second = counted(lambda: captioner.caption(pixels, 2, 3)) - image - 3 * greedy
    assert second == 3 * (greedy + 2 * 2 * len(pixels) * 32 * 2)


def test_the_ceiling_is_measured_once_the_worker_has_settled() -> None:
    counted = CountedTask(Squaring())
    counted._per_row = 1.0
    ceilings = Ceilings("cpu", "auto")
    assert [ceilings.are_due() for _ in range(5)] == [False, False, True, False, False]
    assert ceilings.of("embed") is None
    ceilings.measure({"embed": counted})
    found = ceilings.of("embed")
    assert found is not None
    assert 1e8 < found < 1e14
    assert matmul_ceiling("cpu", torch.float32) > 1e8
