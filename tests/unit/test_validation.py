"""What users write: a key stands once in YAML, and what does not fit is told with what to do about it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from vlmflow.config import CatalogConfig, Job, StorageConfig, load_job
from vlmflow.errors import ConfigError
from vlmflow.validation import describe_validation, read_yaml

PLACES: dict[str, Any] = {"source": {"uri": "photos"}, "catalog": {"uri": "catalog"}, "profile": "starter"}


@pytest.mark.parametrize(
    "text",
    [
        "profile: base\npolicy: a\nprofile: large\n",
        "profile: base\nsource: {uri: a, uri: b}\n",
        "pools: [{a: 1, a: 2}]",
    ],
)
def test_a_key_of_a_job_file_stands_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml .*key \w+ twice in .*line \d"):
        load_job(path, PLACES)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tasks: !!set {embed, caption}", r"the tag !!set cannot be used: write texts, .*line 1, column 8"),
        ("tasks: !!omap [a: 1]", "the tag !!omap cannot be used"),
        ("profile: !!binary aGVsbG8=", "the tag !!binary cannot be used"),
        ("profile: !!python/name:os.system", "the tag !!python/name:os.system cannot be used"),
        ("profile: !!python/object/apply:os.system ['true']", "the tag !!python/object/apply:os.system cannot"),
        ("profile: !mine a", "the tag !mine cannot be used"),
        ("accept_unbound: !!bool maybe", r"this is no !!bool in .*line 1, column 17"),
        ("date: !!timestamp now", "this is no !!timestamp"),
        ("limit: !!int ''", "this is no !!int"),
        ("date: !!timestamp {=: now}", "this is no !!timestamp"),
        ("source: !!map [1]", "expected a mapping node, but found sequence"),
        ("source: !!map x", "expected a mapping node, but found scalar"),
        ("tasks: !!seq {}", "expected a sequence node, but found mapping"),
        ("date: 2026-13-45", "month must be in 1..12"),
        ("limit: " + "9" * 5000, "Exceeds the limit"),
        ("[" * 100_000, "more than 100 brackets in each other"),
        ("{a: " * 3000 + "1" + "}" * 3000, "more than 100 brackets in each other"),
        ("- " * 20_000, "it is nested too deep"),
        ("{[a]: 1}", "found unhashable key"),
    ],
)
def test_a_job_file_of_strange_yaml_is_refused_at_once(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    began = time.thread_time()
    with pytest.raises(ConfigError, match=rf"job\.yaml is not YAML: .*{told}"):
        load_job(path, PLACES)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize("place", ["{}", "a: {}", "- {}", "? {}\n: 1", "{{<<: {}}}", "&a {}"])
@pytest.mark.parametrize(
    "value",
    ["x", "''", "~", "1:", ".", "=", "[]", "[1]", "[[1, 2]]", "[{a: 1, b: 2}]", "{}", "{a: 1}", "{[1]: 2}", "{=: 1}"],
)
def test_no_tag_on_any_value_ends_in_anything_but_an_error_that_is_told(value: str, place: str) -> None:
    for tag in filter(None, yaml.SafeLoader.yaml_constructors):
        with contextlib.suppress(yaml.YAMLError, ValueError):  # what a file that is no YAML is told with
            read_yaml(place.format(f"!<{tag}> {value}"))


def test_anchors_that_explode_and_files_of_many_keys_are_told_in_one_line(tmp_path: Path) -> None:
    laughs = ["l0: &l0 [x, x]", *(f"l{at}: &l{at} [{', '.join([f'*l{at - 1}'] * 9)}]" for at in range(1, 30))]
    path = tmp_path / "job.yaml"
    for lines in ([*laughs, "profile: *l29", "tasks: *l29"], [f"key{at}: 1" for at in range(10_000)]):
        path.write_text("\n".join(lines))
        began = time.thread_time()
        with pytest.raises(ConfigError, match=r"job\.yaml: .*unknown key"):
            load_job(path, PLACES)
        assert time.thread_time() - began < 10


def test_a_key_beside_those_of_an_anchor_replaces_them() -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, a: 3}\n"
    assert read_yaml(text)["other"] == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"polcy": "demo"}, "polcy: unknown key, did you mean policy?"),
        ({"source": {"uri": "a", "storage": {"endpont": "x"}}}, "source.storage.endpont: unknown key, did you mean e"),
        ({"pools": [{"tasks": ["embed"], "batchsize": 3}]}, "batchsize: unknown key, did you mean batch_size?"),
        ({"models": {"embed": {"family": "git", "pth": "x"}}}, "models.embed.pth: unknown key, did you mean path?"),
        ({"hue": 1}, "job: hue: unknown key"),
        ({"tasks": "embed"}, "tasks: must be a list, such as [a, b]"),
        ({"models": 3}, "models: must hold keys of its own"),
        ({"profile": 3}, "profile: must be a text"),
    ],
)
def test_what_does_not_fit_is_told_in_words_of_the_file(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Job.model_validate({**PLACES, **change})
    assert told in describe_validation(caught.value, what="job", of=Job)


@pytest.mark.parametrize(
    ("left_out", "remedy"),
    [("profile", "`vlmflow profiles` lists them"), ("source", "Name SOURCE, or"), ("catalog", "Name CATALOG, or")],
)
def test_a_key_that_is_missing_is_told_with_a_remedy(left_out: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"{left_out}: is missing") as caught:
        load_job(None, {name: value for name, value in PLACES.items() if name != left_out})
    assert remedy in caught.value.remedy


def test_a_value_that_does_not_fit_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as caught:
        CatalogConfig(uri="a", storage=StorageConfig(endpoint="http://key:hunter2@minio:9000"))
    assert "hunter2" not in str(caught.value)
