"""Policy files: what is refused and in what words, digests, bindings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmflow.errors import PolicyError, UnboundPolicyError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.policy import (
    Logistic,
    Policy,
    Thresholds,
    bind,
    check_binding,
    find_binding,
    load_policy,
    next_version,
    prompts_digest,
    shipped_policies,
    write_binding,
    write_version,
)

CLIP = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
OTHER = ModelIdentity("org/other", "local", "b" * 64, "[32]", 1)


def content(**changes: Any) -> dict[str, Any]:
    gun = {"name": "gun", "prompts": ["a gun", "two guns"], "review": 0.5, "block": 0.8}
    wine = {"name": "wine", "prompts": ["a bottle of wine"], "review": 0.6, "block": None}
    return {
        "name": "test",
        "version": "1",
        "neutral": ["a banana", "a car"],
        "categories": [{"name": "weapons", "labels": [gun]}, {"name": "alcohol", "labels": [wine]}],
        "logistic": {"scale": 40.0, "offset": 0.1},
        **changes,
    }


def write(folder: Path, data: object) -> str:
    path = folder / "policy.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return str(path)


def label(**changes: Any) -> dict[str, Any]:
    base = {"name": "gun", "prompts": ["a gun"], "review": 0.5, "block": 0.8}
    return content(categories=[{"name": "weapons", "labels": [{**base, **changes}]}])


def test_labels_keep_the_order_of_the_file(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, content()))
    assert policy.labels == (("weapons", "gun"), ("alcohol", "wine"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (content(surprise=1), "surprise: unknown key"),
        (content(version=1), "version: "),
        (content(categories=[]), "categories: "),
        (content(categories=[{"name": "weapons", "labels": []}]), "categories.0.labels: "),
        (content(neutral=[]), "neutral: "),
        (content(temperature=0), "temperature: "),
        (content(logistic={"scale": -1.0, "offset": 0.0}), "logistic.scale: "),
        (content(logistic={"scale": float("nan"), "offset": 0.0}), "logistic.scale: "),
        (label(prompts=[]), "categories.0.labels.0.prompts: "),
        (label(prompts=["  "]), "categories.0.labels.0.prompts.0: "),
        (label(review=0.9), "categories.0.labels.0: review 0.9 exceeds block 0.8"),
        (label(review=1.5), "categories.0.labels.0.review: "),
        (label(review="0.5"), "categories.0.labels.0.review: "),
        (label(name="Big Gun"), "categories.0.labels.0.name: "),
        (content(categories=[content()["categories"][0]] * 2), "categories: named twice: weapons"),
        ([1, 2], "policy.yaml: must hold keys of its own"),
        ("name: [", "is no YAML mapping"),
        ("name: a\nname: b", "key name twice"),
    ],
)
def test_a_policy_that_does_not_fit_is_one_line_with_file_and_key(tmp_path: Path, data: object, words: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert path in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_block_must_be_said_even_where_a_label_never_blocks(tmp_path: Path) -> None:
    data = content()
    del data["categories"][0]["labels"][0]["block"]
    with pytest.raises(PolicyError, match=r"labels\.0\.block: "):
        load_policy(write(tmp_path, data))


def test_an_unknown_name_lists_the_policies_that_ship() -> None:
    with pytest.raises(PolicyError, match="policy shop: no policy of this name ships") as caught:
        load_policy("shop")
    assert "marketplace" in caught.value.remedy
    with pytest.raises(PolicyError, match=r"policy nowhere\.yaml: No such file"):
        load_policy("nowhere.yaml")


@pytest.mark.parametrize("name", sorted(shipped_policies()))
def test_every_policy_that_ships_loads_by_its_name(name: str) -> None:
    assert load_policy(name).name == name


def test_the_digest_follows_content_not_layout(tmp_path: Path) -> None:
    digest = load_policy(write(tmp_path, content())).digest
    reordered = "# a comment\n" + yaml.safe_dump(content(), sort_keys=True, default_flow_style=True)
    assert load_policy(write(tmp_path, reordered)).digest == digest
    assert load_policy(write(tmp_path, label(review=0.51))).digest != load_policy(write(tmp_path, label())).digest


def test_thresholds_do_not_move_the_digest_of_prompts_and_prompts_do() -> None:
    digest = prompts_digest(Policy.model_validate(label()))
    assert prompts_digest(Policy.model_validate(label(review=0.1))) == digest
    changed = [label(prompts=["a gun!"]), {**label(), "neutral": ["a banana"]}, {**label(), "temperature": 0.5}]
    assert digest not in [prompts_digest(Policy.model_validate(data)) for data in changed]


def test_a_binding_is_found_for_its_weights_and_prompts_alone() -> None:
    policy = Policy.model_validate(content())
    binding = bind(policy, CLIP, thresholds={"gun": Thresholds(review=0.3, block=0.9)})
    bound = policy.model_copy(update={"bindings": (bind(policy, OTHER), binding)})
    assert find_binding(bound, CLIP) == binding
    reworded = Policy.model_validate({**content(neutral=["a dog"]), "bindings": [binding.model_dump()]})
    assert find_binding(reworded, CLIP) is None
    with pytest.raises(UnboundPolicyError, match="its prompts changed since it was bound to org/clip"):
        check_binding(reworded, CLIP)


def test_an_unbound_policy_is_refused_unless_accepted() -> None:
    policy = Policy.model_validate(content())
    with pytest.raises(UnboundPolicyError, match="no thresholds set for org/clip") as caught:
        check_binding(policy, CLIP)
    assert "--accept-unbound" in caught.value.remedy
    assert check_binding(policy, CLIP, accept_unbound=True) is None


def test_a_binding_that_names_an_unknown_label_is_refused() -> None:
    binding = {
        "model": "m",
        "weights": "a" * 64,
        "prompts": "b" * 64,
        "calibration": {"knife": {"scale": 1.0, "offset": 0.0}},
    }
    with pytest.raises(ValueError, match="names labels that the policy lacks: knife"):
        Policy.model_validate(content(bindings=[binding]))


def test_a_binding_is_written_into_the_file_in_place_of_the_model_s_old_one(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "# kept\n" + yaml.safe_dump(content(bindings=[]), sort_keys=False)))
    policy = load_policy(str(path))
    write_binding(path, bind(policy, OTHER))
    write_binding(path, bind(policy, CLIP, logistic=Logistic(scale=1.0, offset=0.0)))
    write_binding(path, bind(policy, CLIP, logistic=Logistic(scale=2.0, offset=0.0)))
    written = load_policy(str(path))
    assert path.read_text().startswith("# kept\n")
    assert [binding.model for binding in written.bindings] == ["org/other", "org/clip"]
    assert find_binding(written, CLIP) == bind(policy, CLIP, logistic=Logistic(scale=2.0, offset=0.0))
    assert prompts_digest(written) == prompts_digest(policy)


def test_models_are_told_apart_by_their_weights_whatever_they_are_called(tmp_path: Path) -> None:
    data = content(bindings=[])
    path, policy = Path(write(tmp_path, data)), Policy.model_validate(data)
    namesake, elsewhere = (
        dataclasses.replace(CLIP, **other) for other in ({"weights_digest": "c" * 64}, {"id": "clip-folder"})
    )

    def written(identity: ModelIdentity) -> list[tuple[str, str]]:
        write_binding(path, bind(policy, identity))
        return [(binding.model, binding.weights[0]) for binding in load_policy(str(path)).bindings]

    assert written(CLIP) == [("org/clip", "a")]
    assert written(elsewhere) == [("clip-folder", "a")]
    assert written(CLIP) == [("org/clip", "a")]
    assert written(namesake) == [("org/clip", "a"), ("org/clip", "c")]


def test_a_binding_is_not_written_where_it_would_cut_the_file(tmp_path: Path) -> None:
    data = content()
    path = Path(write(tmp_path, {"bindings": [], **data}))
    with pytest.raises(PolicyError, match="bindings is not its last key"):
        write_binding(path, bind(Policy.model_validate(data), CLIP))


@pytest.mark.parametrize(
    ("bindings", "told"),
    [(5, "bindings: must be a list"), ({"a": 1}, "bindings: must be a list"), (["a"], "bindings.0: must hold keys")],
)
def test_a_binding_is_not_written_beside_what_is_none(tmp_path: Path, bindings: object, told: str) -> None:
    path = Path(write(tmp_path, {**content(), "bindings": bindings}))
    with pytest.raises(PolicyError, match=told):
        write_binding(path, bind(Policy.model_validate(content()), CLIP))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("version: '1'", "version: 2026-03-01", "version: must be a text, in quotes where it looks like a number or a"),
        # Taken for a list, its order and the policy's digest with it were others in each process.
        ("neutral:", "neutral: !!set {a, b}\nwas:", "the tag !!set cannot be used"),
    ],
)
def test_what_yaml_makes_of_a_value_is_told(tmp_path: Path, before: str, after: str, told: str) -> None:
    path = Path(write(tmp_path, content()))
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(PolicyError, match=told):
        load_policy(str(path))


def test_the_digest_stays_when_the_software_learns_a_key_that_a_file_does_not_use() -> None:
    # Rows and archives hold digests: these must never move, whatever keys policies get.
    data = content(bindings=[{"model": "m", "weights": "a" * 64, "prompts": "b" * 64}])
    assert Policy.model_validate(data).digest == "f3fa07a20ced1a4e869fdb91165937af81c1dfa701bb558d4ddd5bc19f648c23"
    spelled = content(description="", temperature=1.0, bindings=data["bindings"])
    spelled["bindings"] = [{**data["bindings"][0], "thresholds": {}, "calibration": {}, "logistic": None}]
    spelled["categories"][0]["labels"][0] |= {"severity": None, "external": {}, "actions": {"review": [], "block": []}}
    assert Policy.model_validate(spelled).digest == Policy.model_validate(data).digest


def test_severity_actions_and_external_names_are_carried_and_move_the_digest_of_the_policy_alone() -> None:
    extra: dict[str, Any] = {"severity": "high", "actions": {"review": ["queue"], "block": ["hide", "report"]}}
    extra["external"] = {"rekognition": ["Weapons"]}
    policy, plain = Policy.model_validate(label(**extra)), Policy.model_validate(label())
    gun = policy.each_label()[0]
    assert (gun.severity, gun.actions.block, gun.external) == (
        "high",
        ("hide", "report"),
        {"rekognition": ("Weapons",)},
    )
    assert policy.digest != plain.digest
    assert prompts_digest(policy) == prompts_digest(plain)
    again = Policy.model_validate_json(policy.model_dump_json(), strict=False)
    assert again.digest == policy.digest
    wrongs: list[dict[str, Any]] = [{"severity": "huge"}, {"actions": {"review": ["Hide it"]}}]
    for wrong in [*wrongs, {"external": {"azure": []}}]:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Policy.model_validate(label(**wrong))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"review": "0.5"}, r"categories\.0\.labels\.0\.review: Input should be a valid number"),
        ({"prompts": [" "]}, r"categories\.0\.labels\.0\.prompts\.0: String should have at least 1 character"),
        ({"prompts": []}, r"categories\.0\.labels\.0\.prompts: Tuple should have at least 1 item[^;]*"),
    ],
)
def test_one_value_that_does_not_fit_is_one_key_that_is_told(
    tmp_path: Path, written: dict[str, Any], told: str
) -> None:
    """Not the lists around it too, as if they were empty."""
    data = content()
    data["categories"][0]["labels"][0] |= written
    with pytest.raises(PolicyError, match=rf"policy\.yaml: {told}$"):
        load_policy(write(tmp_path, data))


@pytest.mark.parametrize(
    ("version", "after"),
    [("1", "2"), ("2.9", "2.10"), ("v3-rc", "v4-rc"), ("2026-01-09", "2026-01-10"), ("beta", "beta.1"), ("1\n", "2\n")],
)
def test_the_last_number_of_a_version_counts_up(version: str, after: str) -> None:
    assert next_version(version) == after


@pytest.mark.parametrize("line", ['version: "1" # first', "version: '1'", 'version:   "1"'])
def test_a_new_version_is_another_file_with_the_same_comments(tmp_path: Path, line: str) -> None:
    text = yaml.safe_dump(content(bindings=[]), sort_keys=False).replace("version: '1'", line)
    path = Path(write(tmp_path, "# kept\n" + text))
    binding = bind(load_policy(str(path)), CLIP)
    policy = write_version(path, tmp_path / "next.yaml", binding)
    assert (policy.version, policy.bindings) == ("2", (binding,))
    assert load_policy(str(path)).version == "1"
    written = (tmp_path / "next.yaml").read_text()
    assert written.startswith("# kept\n")
    assert ("# first" in line) == ("# first" in written)
    with pytest.raises(PolicyError, match="is there already"):
        write_version(path, tmp_path / "next.yaml", binding)
    with pytest.raises(PolicyError, match="No such file"):
        write_version(path, tmp_path / "absent" / "next.yaml", binding)
