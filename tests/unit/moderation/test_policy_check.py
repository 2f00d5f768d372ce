"""What a check of a policy finds, in its text and with a model's text tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from vlmflow.models import ModelIdentity
from vlmflow.moderation.check import Finding, PolicyCheck, check_policy
from vlmflow.moderation.policy import Thresholds, bind, load_policy, shipped_policies, write_binding

CLIP = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
NEUTRAL = [f"harmless thing {number}" for number in range(12)]
EXTERNAL = {"rekognition": ["Weapons"]}


class Places:
    """A text tower that puts texts where a test says, all others on axes of their own."""

    dim = 64

    def __init__(self, **places: NDArray[np.float32]) -> None:
        self._places = {name.replace("_", " "): place for name, place in places.items()}

    def embed_images(self, pixels: Any) -> NDArray[np.float32]:
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = [self._places.get(text, axis(number + 8)) for number, text in enumerate(texts)]
        return np.stack(rows)


def axis(first: int, second: int | None = None, share: float = 0.0) -> NDArray[np.float32]:
    """A unit vector along one axis, or between two: ``share`` is its cosine with the second."""
    vector = np.zeros(Places.dim, np.float32)
    vector[first] = np.sqrt(1 - share**2)
    if second is not None:
        vector[second] = share
    return vector


def label(name: str, prompts: Sequence[str], **changes: Any) -> dict[str, Any]:
    return {"name": name, "prompts": list(prompts), "review": 0.5, "block": 0.8, "external": EXTERNAL, **changes}


GUN = label("gun", ["a gun", "two guns"])
WINE = label("wine", ["wine", "a bottle"])


def write(folder: Path, *labels: dict[str, Any], **changes: Any) -> str:
    categories = [{"name": f"category-{number}", "labels": [item]} for number, item in enumerate(labels)]
    data = {"name": "test", "version": "1", "neutral": NEUTRAL, "categories": categories}
    data |= {"logistic": {"scale": 40.0, "offset": 0.0}} | changes | {"bindings": []}
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(path)


def found(report: PolicyCheck, level: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.level == level]


def test_a_policy_without_fault_has_but_the_note_that_it_is_unbound(tmp_path: Path) -> None:
    report = check_policy(write(tmp_path, GUN, WINE))
    assert [(finding.level, finding.where) for finding in report.findings] == [("note", "bindings")]


def test_what_the_schema_refuses_is_an_error_that_names_key_and_remedy(tmp_path: Path) -> None:
    report = check_policy(write(tmp_path, label("gun", [" "])))
    assert report.policy is None
    assert [finding.level for finding in report.findings] == ["error"]
    assert "prompts.0" in report.findings[0].text
    assert report.findings[0].remedy


@pytest.mark.parametrize(
    ("labels", "changes", "level", "words"),
    [
        ((label("gun", ["a gun", " A  Gun"]),), {}, "warning", ["'a gun'", "2 times"]),
        ((GUN, label("rifle", ["A GUN"])), {}, "error", ["category-0/gun and category-1/rifle"]),
        ((GUN,), {"neutral": [*NEUTRAL, "a gun"]}, "error", ["category-0/gun and neutral"]),
        ((GUN,), {"neutral": [*NEUTRAL, NEUTRAL[3]]}, "warning", [NEUTRAL[3]]),
        ((label("gun", ["a gun"]),), {}, "note", ["one prompt", "category-0/gun"]),
        ((label("gun", GUN["prompts"], external={}),), {}, "note", ["other services", "category-0/gun"]),
        ((label("gun", GUN["prompts"], review=0.0),), {}, "warning", ["every image to review"]),
        ((label("gun", GUN["prompts"], review=0.0, block=0.0),), {}, "warning", ["blocks every image"]),
        ((label("gun", GUN["prompts"], review=0.8),), {}, "note", ["nothing is left to review"]),
    ],
)
def test_faults_of_the_text(
    tmp_path: Path, labels: Sequence[dict[str, Any]], changes: dict[str, Any], level: str, words: list[str]
) -> None:
    findings = found(check_policy(write(tmp_path, *labels, **changes)), level)
    findings = [finding for finding in findings if finding.where != "bindings"]
    assert len(findings) == 1
    assert all(word in findings[0].text for word in words)


def test_a_binding_for_other_prompts_or_another_model_is_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path, GUN, WINE)
    write_binding(Path(path), bind(load_policy(path), CLIP))
    assert found(check_policy(path, identity=CLIP), "warning") == []
    other = ModelIdentity("org/other", "local", "b" * 64, "[32]", 1)
    assert "not set for org/other" in found(check_policy(path, identity=other), "warning")[0].text
    Path(path).write_text(Path(path).read_text().replace("two guns", "three guns"))
    assert "set for other prompts" in found(check_policy(path), "warning")[0].text


def test_thresholds_of_bindings_and_detectors_are_looked_at_as_the_labels_own(tmp_path: Path) -> None:
    output = {"category": "category-0", "label": "gun", "review": 0.0, "block": 0.9}
    detector = {"name": "arms", "family": "image_classification", "path": "x", "outputs": {"rifle": output}}
    confirms = detector | {"name": "more", "outputs": {"rifle": output | {"combine": "confirm"}}}
    path = write(tmp_path, GUN, WINE, detectors=[detector, confirms])
    write_binding(Path(path), bind(load_policy(path), CLIP, thresholds={"wine": Thresholds(review=0.0, block=0.0)}))

    said = {finding.where: finding.text for finding in found(check_policy(path), "warning")}

    assert said == {
        "category-1/wine": "binding of org/clip: block 0.0 blocks every image",
        "category-0/gun": "detector arms, output rifle: review 0.0 sends every image to review",
    }
    Path(path).write_text(Path(path).read_text().replace("two guns", "three guns"))  # the binding does not count now
    assert "category-1/wine" not in {finding.where for finding in check_policy(path).findings}


def test_prompts_apart_from_each_other_are_found_apart(tmp_path: Path) -> None:
    places = Places(a_gun=axis(0), two_guns=axis(0, 1, 0.3), wine=axis(2), a_bottle=axis(2, 3, 0.3))
    report = check_policy(write(tmp_path, GUN, WINE), embedder=places, identity=CLIP)
    assert (report.limit, report.model) == (0.0, "org/clip")
    assert found(report, "warning") == []


def test_labels_whose_means_coincide_are_found_and_their_prompts_not_listed_again(tmp_path: Path) -> None:
    places = Places(a_gun=axis(0), two_guns=axis(1), wine=axis(0, 2, 0.1), a_bottle=axis(1, 3, 0.1))
    findings = found(check_policy(write(tmp_path, GUN, WINE), embedder=places), "warning")
    assert [finding.where for finding in findings] == ["category-0/gun"]
    assert "nearly coincides with category-1/wine" in findings[0].text


def test_one_close_pair_of_prompts_is_named(tmp_path: Path) -> None:
    opposite = -axis(0)
    # The means are orthogonal or worse, the prompts `two guns` and `a bottle` are alike.
    places = Places(a_gun=axis(0), two_guns=axis(1), wine=opposite, a_bottle=axis(1, 3, 0.9))
    findings = found(check_policy(write(tmp_path, GUN, WINE), embedder=places), "warning")
    assert len(findings) == 1
    assert "'two guns' is close to 'a bottle' of category-1/wine" in findings[0].text


def test_a_prompt_nearer_to_a_neutral_one_than_to_its_own_label_is_found(tmp_path: Path) -> None:
    lone = label("gun", ["a gun", "two guns"])
    near = Places(a_gun=axis(0), two_guns=axis(1), **{NEUTRAL[4].replace(" ", "_"): axis(1, 2, 0.2)})
    findings = found(check_policy(write(tmp_path, lone), embedder=near), "warning")
    assert len(findings) == 1
    assert (
        f"'two guns' is nearer to the neutral {NEUTRAL[4]!r} (0.980) than the label's own mean is" in findings[0].text
    )


def test_the_limit_is_what_all_but_one_in_a_hundred_pairs_of_neutral_prompts_stay_below(tmp_path: Path) -> None:
    alike = {text.replace(" ", "_"): axis(20 + number, 0, 0.9**0.5) for number, text in enumerate(NEUTRAL)}
    alike[NEUTRAL[4].replace(" ", "_")] = axis(2, 3, 0.6)
    # The mean of the label is 0.71 from each of its prompts, the odd neutral prompt 0.8 from one: below the limit.
    near = Places(a_gun=axis(1), two_guns=axis(2), **alike)
    report = check_policy(write(tmp_path, GUN), embedder=near)
    assert report.limit == 0.9
    findings = found(report, "warning")
    assert [finding.text for finding in findings] == [
        f"prompt 'two guns' is nearer to the neutral {NEUTRAL[4]!r} (0.800) than the label's own mean is"
    ]


def test_too_few_neutral_prompts_judge_nothing(tmp_path: Path) -> None:
    same = Places(a_gun=axis(0), two_guns=axis(0), wine=axis(0), a_bottle=axis(0))
    report = check_policy(write(tmp_path, GUN, WINE, neutral=NEUTRAL[:9]), embedder=same)
    assert report.limit is None
    assert found(report, "warning") == []
    assert any("too few" in finding.text for finding in found(report, "note"))


@pytest.mark.parametrize("name", sorted(shipped_policies()))
def test_no_policy_that_ships_has_errors_or_warnings_of_the_text(name: str) -> None:
    assert [finding for finding in check_policy(name).findings if finding.level != "note"] == []
