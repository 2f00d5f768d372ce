"""The profiles of BLIP-2, GIT, FLAVA and ALIGN through the whole job: tiny weights where the real ones belong.

And a SigLIP as transformers saves it, in the place of ALIGN.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import vlmflow
from tests.dual_encoders import make_dual_encoder
from tests.families import make_align, make_blip2_captioner, make_blip2_matcher, make_flava, make_git
from tests.integration.conftest import POLICY
from tests.models import make_clip, make_matcher
from tests.pictures import write_broken, write_pictures
from vlmflow import Catalog, Job, enrich
from vlmflow.engine import plan
from vlmflow.engine.report import RunReport
from vlmflow.errors import UnboundPolicyError
from vlmflow.models.profiles import PROFILES
from vlmflow.tasks.setup import prepare_tasks

pytestmark = pytest.mark.usefixtures("ray_session")

# What each computes is held by unit tests, which compare every output with the reference.
_FLAVA, _BLIP2, _SIGLIP, _ALIGN = (
    pytest.param(name, marks=pytest.mark.slow) for name in ("flava", "blip2", "siglip", "align")
)
NUM_IMAGES = 48


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in the folders where the profiles expect theirs."""
    root = tmp_path_factory.mktemp("models")

    def folder(profile: str, role: str) -> Path:
        return root / PROFILES[profile].models[role].folder  # type: ignore[index]

    make_clip(folder("blip2", "embed"))
    make_matcher(folder("git", "match"))
    captioner = make_blip2_captioner(folder("blip2", "caption"), t5=True)
    make_blip2_matcher(folder("blip2", "match"), vision_of=captioner)
    make_git(folder("git", "caption"))
    make_git(folder("flava", "caption"), seed=1)
    make_flava(folder("flava", "embed"))
    make_align(folder("align", "embed"))
    make_dual_encoder(root / "siglip", "siglip")
    return root


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is bound to no model."""
    path = tmp_path_factory.mktemp("policy") / "unbound.yaml"
    path.write_text(POLICY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and broken files; every second has a text of the caller's."""
    root = tmp_path_factory.mktemp("images")
    names = [path.name for path in write_pictures(root, NUM_IMAGES)] + list(write_broken(root))
    path = root / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "title"])
        writer.writerows([name, "a red car" if number % 2 else ""] for number, name in enumerate(names))
    return path


@pytest.fixture(scope="module")
def done(
    models_dir: Path, policy: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Job, RunReport]]:
    """Runs a profile once, whoever asks for it."""

    @cache
    def run(profile: str) -> tuple[Job, RunReport]:
        job = Job.model_validate(
            {
                "source": {"uri": str(manifest), "text_column": "title"},
                "catalog": {"uri": str(tmp_path_factory.mktemp(profile) / "catalog")},
                "profile": "align" if profile == "siglip" else profile,
                "models": _siglip(models_dir) if profile == "siglip" else {},
                "models_dir": models_dir,
                "policy": str(policy),
                "accept_unbound": True,
                "max_caption_tokens": 6,
                "pools": [{"tasks": ["embed", "moderate", "caption", "match"], "cpus": 0.5, "batch_size": 16}],
            }
        )
        return job, enrich(job)

    return run


@pytest.mark.parametrize("profile", [_BLIP2, _FLAVA, _SIGLIP, _ALIGN])
def test_a_profile_fills_the_tables(done: Callable[[str], tuple[Job, RunReport]], profile: str) -> None:
    job, report = done(profile)
    assert report.statuses == {"ok": NUM_IMAGES, "unreadable": 4}
    good = [row for row in Catalog.open(job.catalog).images().to_pylist() if row["status"] == "ok"]
    assert len({row["caption"] for row in good}) > 5
    assert {(row["decision"], row["decision_reason"]) for row in good} == {("review", "unbound")}
    assert all(len(row["labels"]) == 2 for row in good)
    for row in good:
        given = {"caption": bool(row["caption"]), "text": row["source"]["title"] == "a red car"}
        for kind, has_words in given.items():
            cosine, probability = row[f"{kind}_itc"], row[f"{kind}_itm"]
            assert (cosine is not None) == has_words
            assert cosine is None or -1 <= cosine <= 1
            assert (probability is not None) == (has_words and profile not in ("align", "siglip"))  # without a head
            assert probability is None or 0 <= probability <= 1
    assert len({row["text_itc"] for row in good}) > 5


@pytest.mark.slow
def test_scores_that_a_model_cannot_give_are_no_reason_to_run_again(
    done: Callable[[str], tuple[Job, RunReport]],
) -> None:
    job, _ = done("align")
    assert plan(job).num_due == 0


def _siglip(models_dir: Path) -> dict[str, object]:
    model = {"family": "dual_encoder", "path": str(models_dir / "siglip")}
    return {"embed": model, "match": model}


def write_verdicts(job: Job, path: Path) -> None:
    """A person's verdicts that agree with the margins, on all images."""
    rows = [row for row in Catalog.open(job.catalog).images(["image_id", "labels"]).to_pylist() if row["labels"]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "label", "value"])
        for number, name in enumerate(label["label"] for label in rows[0]["labels"]):
            margins = sorted(row["labels"][number]["margin"] for row in rows)
            middle = margins[len(margins) // 2]
            writer.writerows([row["image_id"], name, row["labels"][number]["margin"] >= middle] for row in rows)


@pytest.mark.parametrize("profile", [_FLAVA, _SIGLIP, _ALIGN])
def test_a_policy_is_calibrated_for_embedders_of_these_families(
    done: Callable[[str], tuple[Job, RunReport]], profile: str, tmp_path: Path
) -> None:
    job, _ = done(profile)
    with pytest.raises(UnboundPolicyError):
        prepare_tasks(job.model_copy(update={"accept_unbound": False}))
    write_verdicts(job, tmp_path / "verdicts.csv")

    vlmflow.calibrate(job, tmp_path / "verdicts.csv", output=tmp_path / "bound.yaml")

    bound = job.model_copy(update={"policy": str(tmp_path / "bound.yaml"), "accept_unbound": False})
    assert prepare_tasks(bound).binding is not None
    other = {"profile": "flava" if profile == "align" else "align", "models": {}}
    with pytest.raises(UnboundPolicyError):  # thresholds are those of one model
        prepare_tasks(bound.model_copy(update=other))
    if profile == "flava":
        vlmflow.remoderate(bound)
        decisions = Catalog.open(job.catalog).images(["decision"])["decision"].to_pylist()
        assert len(set(decisions)) > 1
