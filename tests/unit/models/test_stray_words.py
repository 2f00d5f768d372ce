"""Tokenizers that know words which their models have no row for: a few are taken for unknown ones, many are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.families import make_blip2_matcher, make_flava
from tests.models import make_blip_vqa, make_clip, make_judge, make_matcher, make_vilt, random_pixels
from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import load_answerer, load_embedder, load_matcher, pretrained

# By family: its maker, and what is made of a text, with two images where it takes any.
Scores = Callable[[ModelConfig, str], Any]


def vectors(config: ModelConfig, text: str) -> Any:
    return load_embedder(config, "cpu").embed_texts([text])


def matches(config: ModelConfig, text: str) -> Any:
    matcher = load_matcher(config, "cpu")
    return matcher.match_itm(matcher.encode_images(random_pixels(2)), [text, text])


def answers(config: ModelConfig, text: str) -> Any:
    found = load_answerer(config, "cpu").answer(random_pixels(2), [[text], [text]])
    return [answer.score for one in found for answer in one]


FAMILIES: dict[str, tuple[Callable[[Path], Path], Scores]] = {
    "open_clip": (make_clip, vectors),
    "flava": (make_flava, vectors),
    "blip_itm": (make_matcher, matches),
    "blip2_itm": (make_blip2_matcher, matches),
    "blip_vqa": (make_blip_vqa, answers),
    "vilt": (make_vilt, answers),
}


def make(family: str, folder: Path, num_stray: int) -> ModelConfig:
    """A folder whose tokenizer has some words more than its model, and another word for each row that it left over."""
    FAMILIES[family][0](folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_rows = _num_rows(folder, family)
    spare = [f"spare{number}" for number in range(num_rows - len(tokenizer))]
    tokenizer.add_tokens([*spare, *(f"stray{number}" for number in range(num_stray))])
    tokenizer.save_pretrained(folder)
    return ModelConfig(family=family, path=str(folder))


def _num_rows(folder: Path, family: str) -> int:
    seen: list[int] = []
    check = pretrained.check_of_model

    def noted(folder: Path, tokenizer: Any, num_words: int, **options: Any) -> int:
        seen.append(num_words)
        return check(folder, tokenizer, num_words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "check_of_model", noted)
        FAMILIES[family][1](ModelConfig(family=family, path=str(folder)), "red")
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_are_unknown_to_the_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_MAX_STRAY", 0.1)  # these tokenizers have a few dozen words
    config = make(family, tmp_path / family, num_stray=1)
    scores = FAMILIES[family][1]
    stray, unknown, other = (scores(config, text) for text in ("red stray0", "red [UNK]", "red red"))
    np.testing.assert_array_equal(stray, unknown)
    assert not np.array_equal(stray, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_are_those_of_another_model(family: str, tmp_path: Path) -> None:
    config = make(family, tmp_path / family, num_stray=20)
    with pytest.raises(
        WeightsError, match=r"20 of the \d+ words of the tokenizer of .* are none of its model's"
    ) as told:
        FAMILIES[family][1](config, "red")
    assert "of one model" in told.value.remedy


def test_those_of_a_vision_language_model_are_told_of_too(tmp_path: Path) -> None:
    folder = make_judge(tmp_path / "vlm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"stray{number}" for number in range(1000)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(WeightsError, match="are none of its model's"):
        load_answerer(ModelConfig(family="vlm", path=str(folder)), "cpu")


def test_the_tokenizer_of_open_clip_itself_must_be_the_models_too(tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "clip")
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    del content["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"has \d+ words, and open_clip's own tokenizer 49408"):
        load_embedder(ModelConfig(family="open_clip", path=str(folder)), "cpu")
