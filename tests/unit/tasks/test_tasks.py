"""Each task on a small table, with fake models of a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

import vlmflow.tasks
from vlmflow import schema
from vlmflow.config import TaskName
from vlmflow.imaging import PixelRequest
from vlmflow.models import EncodedImages, ModelIdentity
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import Policy, bind
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.tasks import Task, add_columns
from vlmflow.tasks.caption import CaptionTask
from vlmflow.tasks.embed import EmbedTask
from vlmflow.tasks.match import MatchTask
from vlmflow.tasks.moderate import ModerateTask
from vlmflow.tasks.pixels import all_views, first_views

REQUEST = PixelRequest(4, "bicubic", ("squash", "center"))


def image(value: int) -> bytes:
    """A 4 x 4 picture whose red is ``value``, green ``value + 1``, blue ``value + 2``."""
    return bytes([value, value + 1, value + 2] * 16)


def batch_of(*rows: Sequence[int], **columns: pa.Array) -> pa.Table:
    names = [["squash", "center"][: len(row)] for row in rows]
    pixels = pa.array([[image(value) for value in row] for row in rows], pa.list_(pa.binary()))
    return pa.table({"pixels_4_bicubic": pixels, "views_4_bicubic": pa.array(names, pa.list_(pa.string())), **columns})


def reds(pixels: torch.Tensor) -> list[int]:
    return [int(value) for value in pixels[:, 0, 0, 0]]


def unit(angle: int) -> list[float]:
    return [np.cos(angle), np.sin(angle)]


class FakeEmbedder:
    dim = 2

    def __init__(self) -> None:
        self.batches: list[int] = []

    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        self.batches.append(len(pixels))
        return np.array([unit(red) if red != 99 else [np.nan, 1] for red in reds(pixels)], np.float32)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise NotImplementedError


class FakeCaptioner:
    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        return [f"image {red} in {max_tokens} by {num_beams}" for red in reds(pixels)]


class FakeMatcher:
    """Scores a text by its length and the image; counts the passes of the vision tower."""

    def __init__(self) -> None:
        self.passes = 0

    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        self.passes += 1
        return EncodedImages(torch.tensor(reds(pixels)))

    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([int(i) + len(t) for i, t in zip(images.embeds, texts, strict=True)], np.float32)

    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        return -self.match_itm(images, texts)


def run(task: Task, batch: pa.Table) -> pa.Table:
    assert set(task.reads) <= set(batch.column_names)
    return add_columns(batch, task.writes, task(batch))


def strings(*values: str | None) -> pa.Array:
    return pa.array(values, pa.string())


def test_pixels_keep_their_channels_and_rows() -> None:
    pixels, offsets = all_views(batch_of([10, 20], [30]), REQUEST)
    assert pixels.shape == (3, 3, 4, 4)
    assert pixels[:, :, 1, 2].tolist() == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert offsets.tolist() == [0, 2, 3]


def test_a_slice_of_a_batch_has_its_own_pixels() -> None:
    batch = batch_of([10, 20], [30], [40, 50])
    assert reds(first_views(batch.slice(1, 2), REQUEST)) == [30, 40]
    assert reds(first_views(pa.concat_tables([batch.slice(2), batch.slice(0, 1)]), REQUEST)) == [40, 10]
    assert reds(first_views(batch.slice(3), REQUEST)) == []


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        ([[image(1)], None], "row 1 of the batch has no pixels"),
        ([[image(1)[:-1]]], "pixels of 47 bytes"),
        ([[None]], "pixels of"),
    ],
)
def test_rows_without_the_pixels_requested_are_refused(pixels: list[list[bytes] | None], words: str) -> None:
    batch = pa.table({"pixels_4_bicubic": pa.array(pixels, pa.list_(pa.binary()))})
    with pytest.raises(ValueError, match=words):
        all_views(batch, REQUEST)


def test_embed_runs_all_views_of_all_rows_in_one_batch() -> None:
    embedder = FakeEmbedder()
    out = run(EmbedTask(embedder, REQUEST), batch_of([10, 20], [30]))
    assert embedder.batches == [3]
    first, second = out["vectors"].to_pylist()
    np.testing.assert_allclose([*first, *second], [unit(10), unit(20), unit(30)], rtol=1e-6)
    assert len(first) == 2
    assert out["vector_views"].to_pylist() == [["squash", "center"], ["squash"]]


def test_embed_refuses_a_vector_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        run(EmbedTask(FakeEmbedder(), REQUEST), batch_of([10], [99]))


def test_caption_describes_the_whole_image() -> None:
    out = run(CaptionTask(FakeCaptioner(), REQUEST, 7), batch_of([10, 20], [30]))
    assert out["caption"].to_pylist() == ["image 10 in 7 by 1", "image 30 in 7 by 1"]
    out = run(CaptionTask(FakeCaptioner(), REQUEST, 7, 3), batch_of([10]))
    assert out["caption"].to_pylist() == ["image 10 in 7 by 3"]


def test_match_scores_caption_and_text_after_one_pass_of_the_vision_tower() -> None:
    matcher = FakeMatcher()
    batch = batch_of(
        [10, 20],
        [30],
        [40],
        caption=strings("ab", "abc", "a"),
        previous_caption=strings(None, None, "old"),
        text=strings(None, "xxxx", " "),
    )
    out = run(MatchTask(matcher, REQUEST), batch)
    assert matcher.passes == 1
    assert out["caption_itm"].to_pylist() == [12, 33, 41]
    assert out["caption_itc"].to_pylist() == [-12, -33, -41]
    assert out["text_itm"].to_pylist() == [None, 34, None]
    assert out["text_itc"].to_pylist() == [None, -34, None]


class FakeContrastiveMatcher(FakeMatcher):
    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> None:  # type: ignore[override]
        return None

    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        return -super().match_itm(images, texts)


def test_scores_of_a_head_that_the_model_lacks_are_null() -> None:
    captions, texts = pa.array(["abc", None]), pa.array(["a", "ab"])
    batch = batch_of([1], [2], caption=captions, previous_caption=captions, text=texts)
    out = run(MatchTask(FakeContrastiveMatcher(), REQUEST), batch)
    assert out["caption_itm"].to_pylist() == out["text_itm"].to_pylist() == [None, None]
    full = run(MatchTask(FakeMatcher(), REQUEST), batch)
    assert out["caption_itc"].to_pylist() == full["caption_itc"].to_pylist()
    assert out["caption_itc"].null_count == 1
    assert out["text_itc"].to_pylist() == full["text_itc"].to_pylist()
    assert out["text_itc"].null_count == 0


def test_match_reads_the_stored_caption_where_none_was_written() -> None:
    stored = {"previous_caption": strings("old one", None), "text": strings(None, None)}
    alone = run(MatchTask(FakeMatcher(), REQUEST), batch_of([10], [20], **stored))
    beside = run(MatchTask(FakeMatcher(), REQUEST), batch_of([10], [20], caption=strings(None, "new"), **stored))
    assert alone["caption_itm"].to_pylist() == [17, None]
    assert beside["caption_itm"].to_pylist() == [17, 23]


def test_moderate_decides_rows_with_and_without_vectors() -> None:
    label = {"name": "gun", "prompts": ["a gun"], "review": 0.5, "block": 0.9}
    policy = Policy.model_validate(
        {
            "name": "test",
            "version": "1",
            "neutral": ["a car"],
            "categories": [{"name": "weapons", "labels": [label]}],
            "logistic": {"scale": 10.0, "offset": 0.0},
        }
    )
    prompts = PromptVectors(np.eye(1, 2, dtype=np.float32), np.eye(1, 2, 1, dtype=np.float32), 1.0, "digest")
    binding = bind(policy, ModelIdentity("m", "local", "a" * 64, "[]", 1))
    vectors = pa.array([[[0, 1]], None, [[0, 1], [1, 0]], []], pa.list_(pa.list_(pa.float32())))
    views = pa.array([["squash"], None, ["squash", "center"], []], pa.list_(pa.string()))
    batch = pa.table({"vectors": vectors, "vector_views": views})
    task = ModerateTask(Moderator(policy, binding, prompts))
    assert run(task, batch)["decision"].to_pylist() == ["allow", "review", "block", "review"]
    out = run(task, batch.slice(1, 2))
    assert out["decision_reason"].to_pylist() == ["unscored", "weapons/gun"]
    assert out["labels"].to_pylist()[1][0]["view"] == "center"
    assert run(task, batch.slice(1, 1))["labels"].to_pylist() == [None]


WRITES = pa.schema([("caption", pa.string())])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"caption": strings("a")}, "1 values for 2 rows"),
        ({"caption": pa.array([1, 2])}, "int64, not string"),
        ({"title": strings("a", "b")}, r"wrote \['title'\], not \['caption'\]"),
        ({"caption": strings("a", "b"), "more": strings("a", "b")}, "wrote"),
    ],
)
def test_columns_that_are_not_those_announced_are_refused(columns: dict[str, pa.Array], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        add_columns(pa.table({"id": [1, 2]}), WRITES, columns)


def test_a_column_that_is_there_already_is_refused() -> None:
    with pytest.raises(ValueError, match="has this column already"):
        add_columns(pa.table({"caption": ["x"]}), WRITES, {"caption": strings("a")})


@pytest.mark.parametrize("name", get_args(TaskName))
def test_a_task_s_columns_stand_in_the_schema(name: TaskName) -> None:
    """Those that do not are kept nowhere, and images of equal bytes get none of them, marked as done."""
    (task,) = (made for made in task_classes() if made.name == name)
    assert task.writes.equals(schema.TASK_OUTPUTS[name]), "schema.TASK_OUTPUTS says what a task writes"
    for field in task.writes:
        if name != "embed":  # its vectors lie in a table of their own
            assert schema.IMAGES.field(field.name).type == field.type, "schema.TASK_COLUMNS says what rows hold"


def task_classes() -> list[type[Task]]:
    modules = [import_module(f"vlmflow.tasks.{module.name}") for module in iter_modules(vlmflow.tasks.__path__)]
    found = [made for module in modules for made in vars(module).values() if isinstance(made, type)]
    return [made for made in found if made.__name__.endswith("Task") and hasattr(made, "writes")]
