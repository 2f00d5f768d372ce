"""The job file that is printed, and the schema for editors: true to what a job takes, each key told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.processes import ROOT
from tests.terminal import run
from vlmflow.config import Job, ModelConfig, PoolConfig, load_job
from vlmflow.errors import ConfigError
from vlmflow.families import FAMILIES
from vlmflow.job_file import job_schema, job_template
from vlmflow.tasks.setup import with_policy


def uncommented(text: str) -> str:
    """With every key that stands behind a ``#``."""
    return re.sub(r"^( *)#(?=\S)", r"\1", text, flags=re.MULTILINE)


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, part in {"Job": schema, **schema["$defs"]}.items():
        for key, said in part["properties"].items():
            of = next((one["$ref"] for one in [said, *said.get("anyOf", ())] if "$ref" in one), "")
            yield f"{name}.{key}", said, schema["$defs"].get(of.rpartition("/")[2], {})


def test_the_file_as_it_is_printed_is_a_job_of_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(job_template())
    assert load_job(file) == Job.model_validate(
        {"source": {"uri": "photos/"}, "catalog": {"uri": "catalog/"}, "profile": "base"}
    )


def test_what_is_behind_a_hash_is_the_default_but_for_examples(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(uncommented(job_template()))
    held = load_job(file)
    assert held.model_dump(exclude={"models", "pools"}) == Job.model_validate(
        {"source": {"uri": "photos/"}, "catalog": {"uri": "catalog/"}, "profile": "base"}
    ).model_dump(exclude={"models", "pools"})
    assert held.models["caption"] == ModelConfig(family="blip_caption", path="models/blip")
    assert held.models["answer"].endpoint is not None
    assert held.pools[1] == PoolConfig(tasks=("caption", "match"), gpus=0.5)
    names = {key.partition(".")[2] for key, _, _ in properties(job_schema())}
    text = file.read_text()
    assert {name for name in names if not re.search(rf"^ *(- |# )?{name}( \(.*\))?:", text, re.MULTILINE)} == set()


def test_an_editor_that_takes_a_comment_sign_away_with_its_blank_leaves_the_key_where_it_belongs(
    tmp_path: Path,
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(re.sub(r"^(\s*)# ?(\s*(kind|limits|max_bytes):.*)$", r"\1\2", job_template(), flags=re.MULTILINE))
    assert load_job(file).model_fields_set == {"source", "catalog", "profile", "limits"}
    assert load_job(file).source.model_fields_set == {"uri", "kind"}


def test_every_key_has_a_description() -> None:
    silent = [key for key, said, part in properties(job_schema()) if not (said.get("description") or part)]
    assert silent == []


@pytest.mark.parametrize("file", sorted((ROOT / "deploy" / "jobs").glob("*.yaml")), ids=lambda file: file.name)
def test_the_schema_takes_the_files_that_ship(file: Path) -> None:
    jsonschema.validate(json.loads(json.dumps(yaml.safe_load(file.read_text()), default=str)), job_schema())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"profil": "base"}, "profil"), ({"tasks": ["paint"]}, "paint"), ({"num_beams": 0}, "minimum of 1")],
)
def test_the_schema_refuses_what_a_job_does(change: dict[str, Any], message: str) -> None:
    job = {"source": {"uri": "photos/"}, "catalog": {"uri": "catalog/"}, "profile": "base"}
    jsonschema.validate(job, job_schema())
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(job | change, job_schema())
    with pytest.raises(ConfigError):
        load_job(None, job | change)


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("job") == 0
    assert capsys.readouterr().out == job_template()
    assert run("job", "--schema") == 0
    assert json.loads(capsys.readouterr().out) == job_schema()


def test_who_names_a_key_that_there_is_not_is_told_where_all_are(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("source: {uri: photos/, kin: prefix}\ncatalog: {uri: c}\nprofile: base\n")
    with pytest.raises(ConfigError, match="kin") as refused:
        load_job(file)
    assert "`vlmflow job`" in refused.value.remedy


def test_what_a_job_without_a_policy_moderates_under_is_told_as_it_is() -> None:
    said = job_schema()["properties"]["policy"]["description"]
    for profile in ("base", "starter"):
        job = with_policy(Job.model_validate({"source": {"uri": "p"}, "catalog": {"uri": "c"}, "profile": profile}))
        assert str(job.policy) in said


def test_only_families_that_a_task_can_have_are_named_and_those_without_beams() -> None:
    schema = job_schema()
    assert all(FAMILIES[name].roles for name in schema["$defs"]["ModelConfig"]["properties"]["family"]["examples"])
    greedy = [name for name, family in FAMILIES.items() if "caption" in family.roles and not family.has_beams]
    assert f"{' and '.join(greedy)} take 1 alone" in schema["properties"]["num_beams"]["description"]
