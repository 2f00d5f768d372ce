"""Profiles: what they resolve to, and what is said of models that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.models import make_captioner, make_clip, make_matcher, write_json
from vlmflow.checks import _weights
from vlmflow.config import CatalogConfig, Job, ModelConfig, SourceConfig
from vlmflow.errors import ConfigError, WeightsError
from vlmflow.families import FAMILIES, Role, families_of
from vlmflow.models import (
    describe_profiles,
    identify,
    load_answerer,
    load_captioner,
    load_embedder,
    load_matcher,
    resolve_models,
)
from vlmflow.models.profiles import PROFILES, Profile
from vlmflow.models.weights import locate
from vlmflow.views import print_profiles

NAMES = {
    "embed": "CLIP-ViT-B-32-laion2B-s34B-b79K",
    "caption": "blip-image-captioning-base",
    "match": "blip-itm-base-coco",
}


def job(profile: str, models_dir: Path, **changes: object) -> Job:
    values = {"source": SourceConfig(uri="in"), "catalog": CatalogConfig(uri="out"), "profile": profile}
    return Job.model_validate({**values, "models_dir": models_dir, **changes})


def test_an_unknown_profile_names_those_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile huge: unknown") as caught:
        resolve_models(job("huge", tmp_path))
    assert "starter, base, large" in caught.value.remedy


def test_absent_weights_name_folder_repository_and_licence(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=str(tmp_path / NAMES["embed"])) as caught:
        resolve_models(job("base", tmp_path))
    assert "laion/CLIP-ViT-B-32-laion2B-s34B-b79K (MIT)" in caught.value.remedy


def test_a_profile_resolves_to_its_folders_for_the_tasks_of_the_job(tmp_path: Path) -> None:
    make_clip(tmp_path / NAMES["embed"])
    make_captioner(tmp_path / NAMES["caption"])
    models = resolve_models(job("base", tmp_path, tasks=["embed", "caption"]))
    assert {role: Path(config.path or "").name for role, config in models.items()} == {
        role: NAMES[role] for role in ("embed", "caption")
    }
    assert identify("embed", models["embed"]).id == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


def test_a_model_of_the_job_replaces_that_of_the_profile(tmp_path: Path) -> None:
    mine = ModelConfig(family="blip_itm", path=str(make_matcher(tmp_path / "mine")))
    models = resolve_models(
        job("base", tmp_path, tasks=["match", "caption"], models={"match": mine, "caption": _cap(tmp_path)})
    )
    assert models["match"] == mine
    with pytest.raises(ConfigError, match=r"models\.caption: family blip_itm"):
        resolve_models(job("base", tmp_path, tasks=["caption"], models={"caption": mine}))


def _cap(tmp_path: Path) -> ModelConfig:
    return ModelConfig(family="blip_caption", path=str(make_captioner(tmp_path / "captioner")))


def test_profiles_say_what_is_present(tmp_path: Path) -> None:
    make_captioner(tmp_path / NAMES["caption"])
    (base,) = (profile for profile in describe_profiles(tmp_path) if profile.name == "base")
    present = {model.role: model.present for model in base.models}
    assert present == {"embed": False, "caption": True, "match": False, "answer": False}
    assert all(model.licence and model.num_parameters > 0 and model.size_bytes > 0 for model in base.models)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ('{"weight_map": ["a.safetensors"]}', "weight_map is no JSON object"),
        ('{"weight_map": "a.safetensors"}', "weight_map is no JSON object"),
        ('{"weight_map": {"a": 1}}', "weight_map names no files"),
    ],
)
def test_a_damaged_folder_is_told_of_and_ends_nothing(
    tmp_path: Path, index: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_captioner(tmp_path / NAMES["caption"])
    folder = tmp_path / NAMES["match"]
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=told):
        locate(ModelConfig(family="blip_itm", path=str(folder)))
    profiles = describe_profiles(tmp_path)
    (base,) = (profile for profile in profiles if profile.name == "base")
    models = {model.role: model for model in base.models}
    assert models["caption"].present
    assert not models["match"].present
    assert told in models["match"].problem
    (check,) = (check for check in _weights(tmp_path) if check.name == "profile base")
    assert check.verdict == "warn"
    assert told in check.found
    print_profiles(profiles, Console(width=200))
    shown = capsys.readouterr().out
    assert "damaged" in shown
    assert told in shown


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_an_index_of_nothing_is_no_weights(tmp_path: Path, weight_map: object) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(WeightsError, match="weight_map names no files"):
        locate(ModelConfig(family="blip_itm", path=str(tmp_path)))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_a_model_for_each_task_of_a_job(profile: str, tmp_path: Path) -> None:
    for role in ("embed", "caption", "match"):
        model = PROFILES[profile].models[role]
        assert model.family_as(role) in families_of(role)
        config = ModelConfig(family=model.family_as(role), path=str(tmp_path))
        with pytest.raises(WeightsError, match="no safetensors file"):  # it is known which files those are
            locate(config)


def test_a_profile_without_a_model_for_a_task_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROFILES, "half", Profile("for a test", {"embed": PROFILES["base"].models["embed"]}))
    with pytest.raises(ConfigError, match="profile half: no model for caption"):
        resolve_models(job("half", tmp_path, tasks=["caption"]))


def test_the_profile_without_matching_head_says_so() -> None:
    assert "no caption_itm, no text_itm" in PROFILES["align"].purpose


def test_the_starter_is_not_said_to_be_for_photographs() -> None:
    (starter,) = (profile for profile in describe_profiles() if profile.name == "starter")
    assert "NOT for photographs" in starter.purpose


LOADERS = {"embed": load_embedder, "caption": load_captioner, "match": load_matcher, "answer": load_answerer}
PLAYED = [(role, family) for role in LOADERS for family in families_of(role) if family != "endpoint"]


@pytest.mark.parametrize(("role", "family"), PLAYED)
def test_a_family_that_can_play_a_role_has_an_adapter(role: Role, family: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no safetensors file"):  # an adapter went and looked for them
        LOADERS[role](ModelConfig(family=family, path=str(tmp_path)), "cpu")


def test_the_first_family_of_a_role_is_the_one_that_profiles_leave_out() -> None:
    first = {role: families_of(role)[0] for role in LOADERS}
    assert first == {"embed": "open_clip", "caption": "blip_caption", "match": "blip_itm", "answer": "vilt"}


@pytest.mark.parametrize("role", LOADERS)
def test_a_family_without_an_adapter_is_never_loaded_by_that_of_another(role: Role, tmp_path: Path) -> None:
    for family in set(FAMILIES) - {*families_of(role), "endpoint", "opennsfw"}:
        with pytest.raises(ConfigError, match=rf"models\.{role}: no adapter is loaded for the family {family}"):
            LOADERS[role](ModelConfig(family=family, path=str(tmp_path)), "cpu")
