"""The job file: strict, checked at load, and never repeating a value that may be secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vlmflow.config import TASKS_TO_ASK_FOR, Job, default_models_dir, load_job
from vlmflow.errors import ConfigError

PLACES: dict[str, Any] = {"source": {"uri": "photos"}, "catalog": {"uri": "catalog"}, "profile": "starter"}


def load(tmp_path: Path, text: str, **overrides: Any) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_job(path, overrides)


def test_the_command_line_wins_and_leaves_the_rest(tmp_path: Path) -> None:
    text = "source: {uri: a, text_column: title}\ncatalog: {uri: b}\nprofile: base\n"
    job = load(tmp_path, text, source={"uri": "c", "text_column": None}, profile="large")
    assert (job.source.uri, job.source.text_column, job.profile) == ("c", "title", "large")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("ray: auto", "ray: must hold keys of its own, {key: value}"),
        ("ray: []", "ray: must hold keys"),
        ("catalog: /photos", "catalog: must hold keys"),
        ("source: {uri: a, storage: local}", "source.storage: must hold keys"),
    ],
)
@pytest.mark.parametrize("given", [None, "c"])
def test_a_part_without_keys_is_named_whatever_the_command_line_says(
    tmp_path: Path, line: str, named: str, given: str | None
) -> None:
    over = {
        "source": {"storage": {"endpoint": given and f"http://{given}"}},
        "catalog": {"uri": given},
        "ray": {"address": given},
    }
    text = "source: {uri: a}\ncatalog: {uri: b}\nprofile: base\nray:\n"
    key = line.partition(":")[0]
    kept = "\n".join(row for row in text.splitlines() if not row.startswith(key))
    assert load(tmp_path, text, **over).catalog.uri == (given or "b")
    with pytest.raises(ConfigError, match=re.escape(f"job.yaml: {named}")):
        load(tmp_path, f"{kept}\n{line}\n", **over)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": "red"}, "colour: unknown key"),
        ({"source": {"uri": "a", "secret": "hunter2"}}, "source.secret: unknown key"),
        ({"tasks": ["embed", "embed"]}, "tasks name one twice"),
        ({"tasks": ["moderate"]}, "add embed to tasks"),
        ({"tasks": ["match"]}, "match has nothing to score"),
        ({"tasks": []}, "tasks: names none; there are embed,"),
        (
            {"tasks": ["capt"]},
            f"job: tasks: no task is called capt; there are {TASKS_TO_ASK_FOR}",
        ),
        ({"tasks": [3]}, "tasks.0: Input should be"),
        ({"pools": [{"tasks": ["embed", "paint"]}]}, "pools.0.tasks: no task is called paint;"),
        (
            {"source": {"uri": "a", "storage": {"timeout_s": float("inf")}}},
            "source.storage.timeout_s: Input should be less",
        ),
        ({"limits": {"max_seconds": 1e10}}, "limits.max_seconds: Input should be less"),
        ({"models": {"embed": {"family": "clip"}}}, "models.embed.family: no family is called clip; there are open_"),
        ({"models": {"embed": {"family": "opennsfw"}}}, "no family is called opennsfw"),  # it has no folder to name
        ({"models": {"embed": {"family": "git", "prompt": "x"}}}, "a prompt is for vlm, vllm, endpoint, and must"),
        ({"views": ["center"]}, "views must include squash"),
        ({"ray": {"address": ""}}, "ray.address: String should have at least 1 character"),
        ({"limit": 0}, "limit"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 17}, "num_beams: Input should be less than or equal to 16"),
        ({"retry": ["gone"]}, "'failed', 'partial', 'missing' or 'unreadable'"),
        ({"pools": [{"tasks": ["embed"]}]}, "in none: caption, match, moderate"),
        ({"tasks": ["embed"], "pools": [{"tasks": ["embed"]}, {"tasks": ["embed"]}]}, "in two: embed"),
        ({"pools": [{"tasks": ["match", "caption"]}, {"tasks": ["embed", "moderate"]}]}, "list caption first"),
        ({"pools": [{"tasks": ["embed"], "min_actors": 3, "max_actors": 2}]}, "min_actors 3 exceeds"),
        ({"profile": None}, "profile"),
        (
            {"source": {"uri": "a", "storage": {"endpoint": "http://key:hunter2@minio:9000"}}},
            "source.storage.endpoint: must hold no user, password or query",
        ),
        (
            {"catalog": {"uri": "a", "storage": {"endpoint": "http://h/?x=hunter2"}}},
            "catalog.storage.endpoint: must hold",
        ),
        ({"catalog": {"uri": "a", "storage": {"endpoint": "minio:9000"}}}, "endpoint: must begin with http://"),
        ({"catalog": {"uri": "a", "storage": {"endpoint": "http://[hunter2"}}}, "endpoint: is not a url"),
        ({"catalog": {"uri": "a", "storage": {"endpoint": "http://minio:99999"}}}, "endpoint: is not a url"),
        ({"catalog": {"uri": "a", "storage": {"endpoint": "http://mi nio:9000"}}}, "endpoint: is not a url"),
        ({"catalog": {"uri": "a", "storage": {"region": "eu-west-1\n"}}}, "region: "),
        ({"source": {"uri": "a", "http": {"timeout_s": 500}}}, "http.timeout_s: Input should be less"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(None, {**PLACES, **change})
    assert named in str(caught.value)
    assert "Tuple" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a list"):
        load(tmp_path, "- a\n- b\n")


@pytest.mark.parametrize("text", ["date: 2026-02-30\n", "limit: " + "9" * 5000 + "\n", "a: " + "[" * 5000])
def test_values_that_yaml_cannot_make_are_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml is not YAML"):
        load(tmp_path, text)


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = {"family": "open_clip", "path": "~/clip"}
    over = {"models_dir": "~/models", "policy": "~/policy.yaml", "models": {"embed": model}}
    job = load_job(None, PLACES | over)
    assert job.models_dir == tmp_path / "models"
    assert job.policy == str(tmp_path / "policy.yaml")
    assert job.models["embed"].path == str(tmp_path / "clip")
    assert load_job(None, PLACES | {"models_dir": "~nobody-here/m"}).models_dir == Path("~nobody-here/m")
    monkeypatch.setenv("VLMFLOW_MODELS", "~/m")
    assert default_models_dir() == tmp_path / "m"


def test_a_file_alone_is_a_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("source: {uri: a}\ncatalog: {uri: b}\nprofile: base\n")
    assert load_job(tmp_path / "job.yaml") == load_job(tmp_path / "job.yaml", {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_job(tmp_path / "none.yaml", {})


def test_a_job_cannot_be_changed() -> None:
    job = load_job(None, PLACES)
    with pytest.raises(ValueError, match="frozen"):
        job.profile = "base"  # type: ignore[misc]
