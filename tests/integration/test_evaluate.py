"""`vlmflow evaluate` over the real engine with tiny models: every task, a kept catalog, broken images, bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from tests.pictures import picture
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job, ModelConfig
from vlmflow.evaluation.metrics.captions import bleu
from vlmflow.evaluation.metrics.ptb import tokenize
from vlmflow.models import load_embedder

NUM = 6
TEXTS = ("a red car", "two apples", "a dog on a table", "a house", "a white cup", "four guns")


@pytest.fixture
def job_file(make_job: Callable[..., Job], tmp_path: Path) -> Path:
    """Light models, in one actor for whichever tasks run."""
    job = make_job("ignored").model_dump(mode="json", exclude_defaults=True)
    path = tmp_path / "job.yaml"
    named = ("profile", "models", "policy", "max_caption_tokens", "pools")
    path.write_text(yaml.safe_dump({name: job[name] for name in named}))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six images with truth of every kind, and one that is no image."""
    rows = []
    for number, text in enumerate(TEXTS):
        picture(number).save(tmp_path / f"{number}.png")
        truth = {"text": text, "match": number % 2 == 0, "class": ("car", "dog")[number % 2]}
        truth |= {"labels": ("gun", "bottle;gun", "")[number % 3], "flag": number % 3 != 2}
        rows.append({"uri": f"{number}.png", "captions": json.dumps([text, f"{text} here"]), **truth})
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows.append({**rows[0], "uri": "broken.png"})
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def evaluate(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert run("evaluate", *arguments, "--json") == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return report


def vectors_of(catalog: Path) -> dict[str, NDArray[np.float32]]:
    """By image, of the newest run, the whole image's."""
    opened = Catalog.open(CatalogConfig(uri=str(catalog)))
    uris = {row["image_id"]: row["uri"] for row in opened.images(["image_id", "uri"]).to_pylist()}
    rows = opened.embeddings(["image_id", "view", "vector"]).to_pylist()
    return {
        Path(uris[row["image_id"]]).name: np.array(row["vector"], np.float32) for row in rows if row["view"] == "squash"
    }


@pytest.mark.usefixtures("ray_session")
def test_zeroshot_from_the_catalogs_vectors_and_once_more_from_what_is_kept(
    job_file: Path, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], models: dict[str, Any]
) -> None:
    kept = tmp_path / "kept"
    command = ("zeroshot", table, "--config", job_file, "--catalog", kept)
    command += ("--template", "a photo of a {}", "--template", "a {}")

    report = evaluate(capfd, *command)

    embedder = load_embedder(ModelConfig(**models["embed"]), "cpu")
    prompts = embedder.embed_texts(["a photo of a car", "a car", "a photo of a dog", "a dog"]).reshape(2, 2, -1)
    classes = prompts.mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    found = vectors_of(kept)
    hits = [int((classes @ found[f"{number}.png"]).argmax()) == number % 2 for number in range(NUM)]
    assert "broken.png" not in found
    assert report["num_images"] == NUM + 1
    assert report["num_missing"] == 1
    assert report["figures"]["top-1"]["value"] == pytest.approx(sum(hits) / (NUM + 1))
    assert report["groups"]["class"]["car"]["top-1"]["num"] == 4
    assert report["models"]["embed"] == "tests.light:LightEmbedder(embed)@local"
    assert report["catalog"] == str(kept)

    # The same again: the models have nothing to do, and say the same.
    version = Catalog.open(CatalogConfig(uri=str(kept))).version
    again = evaluate(capfd, *command)
    assert again["figures"] == report["figures"]
    assert Catalog.open(CatalogConfig(uri=str(kept))).version == version


@pytest.mark.usefixtures("ray_session")
def test_match_scores_each_pair_and_the_scratch_catalog_is_gone(
    job_file: Path, table: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    report = evaluate(capfd, "match", table, "--config", job_file)
    assert set(report["figures"]) == {"ITM AUC", "ITC AUC", "ITM accuracy"}
    assert report["figures"]["ITM AUC"]["num"] == NUM + 1
    assert report["num_missing"] == 1
    assert report["catalog"] is None
    assert not list((tmp_path / "scratch").iterdir())

    assert run("evaluate", "match", table, "--config", job_file, "--catalog", tmp_path / "kept") == 0
    shown = capfd.readouterr().out
    assert "ITM AUC" in shown
    assert "1 without a result count as wrong" in shown
    rows = Catalog.open(CatalogConfig(uri=str(tmp_path / "kept"))).images(["uri", "text_itm"]).to_pylist()
    scores = {Path(row["uri"]).name: row["text_itm"] for row in rows}
    order = [f"{number}.png" for number in range(NUM)] + ["broken.png"]
    values = [-1.0 if scores[name] is None else scores[name] for name in order]
    expected = roc_auc_score([number % 2 == 0 for number in range(NUM)] + [True], values)
    assert report["figures"]["ITM AUC"]["value"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_captions_retrieval_and_moderation_in_one_kept_catalog(
    job_file: Path, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], models: dict[str, Any]
) -> None:
    kept, options = tmp_path / "kept", ("--config", job_file, "--catalog", tmp_path / "kept")

    report = evaluate(capfd, "caption", table, *options)
    opened = Catalog.open(CatalogConfig(uri=str(kept)))
    said = {Path(row["uri"]).name: row["caption"] for row in opened.images(["uri", "caption"]).to_pylist()}
    order = [f"{number}.png" for number in range(NUM)] + ["broken.png"]
    texts = [*TEXTS, TEXTS[0]]
    expected = bleu(
        [tokenize(said[name] or "") for name in order], [[tokenize(t), tokenize(f"{t} here")] for t in texts]
    )
    assert report["figures"]["BLEU-1"]["value"] == pytest.approx(expected[0])
    assert report["num_missing"] == 1

    report = evaluate(capfd, "retrieval", table, *options)
    embedder, found = load_embedder(ModelConfig(**models["embed"]), "cpu"), vectors_of(kept)
    captions = embedder.embed_texts([text for one in texts for text in (one, f"{one} here")])
    images = np.stack([found[name] for name in order[:-1]])
    right = [at < 2 * NUM and int((images @ caption).argmax()) == at // 2 for at, caption in enumerate(captions)]
    assert report["figures"]["text-to-image R@1"]["value"] == pytest.approx(np.mean(right))
    assert report["figures"]["image-to-text R@1"]["num"] == NUM + 1

    report = evaluate(capfd, "moderate", table, *options)
    rows = opened.images(["uri", "decision"]).to_pylist()
    decided = {Path(row["uri"]).name: row["decision"] for row in rows}
    flagged = np.array([decided[name] != "allow" for name in order])
    truth = np.array([number % 3 != 2 for number in range(NUM)] + [True])
    assert report["figures"]["recall, flagged"]["value"] == pytest.approx((flagged & truth).sum() / truth.sum())
    assert set(report["groups"]["label"]) == {"gun", "bottle"}
    assert report["num_missing"] == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["paint", "{table}"], ["no task paint", "retrieval, caption"]),
        (["caption", "{tmp}/none.json"], ["none.json does not exist"]),
        (["zeroshot", "{table}", "--template", "a photo"], ["has no {}"]),
        (["match", "{table}", "--column", "text"], ["--column text", "WHAT=NAME"]),
        (["match", "{table}", "--profile", "huge"], ["huge"]),
        (["caption", "{table}", "--predictions", "{table}"], ["--config is not for --predictions, with which no"]),
        (["caption", "{table}", "--template", "a {}"], ["--template is not for caption"]),
        (["match", "{table}", "--policy", "demo"], ["--policy is not for match"]),
        (
            ["caption", "{table}", "--catalog", "{tmp}/kept", "--scratch", "{tmp}"],
            ["--scratch is not for", "--catalog"],
        ),
        (["zeroshot", "{table}", "--ray-address", "10.0.0.1:6379"], ["no place for a catalog", "--catalog"]),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    named: list[str],
    job_file: Path,
    table: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [argument.replace("{table}", str(table)).replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert run("evaluate", *given, "--config", job_file) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlmflow:")]
    assert len(errors) == 1
    for word in named:
        assert word in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_kept_catalog_goes_on_with_what_is_missing(
    job_file: Path, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("caption", table, "--config", job_file, "--catalog", tmp_path / "kept")
    limited = tmp_path / "limited.yaml"
    limited.write_text(f"{job_file.read_text()}\nlimit: 3\n")
    part = evaluate(capfd, *command[:3], limited, *command[4:])
    assert part["num_images"] == 3
    opened = Catalog.open(CatalogConfig(uri=str(tmp_path / "kept")))
    first = set(opened.images(["run_id"])["run_id"].to_pylist())

    whole = evaluate(capfd, *command)

    rows = opened.images(["uri", "run_id"]).to_pylist()
    assert sorted(Path(row["uri"]).name for row in rows if row["run_id"] in first) == ["0.png", "1.png", "2.png"]
    assert len(rows) == whole["num_images"] == NUM + 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_images_that_are_elsewhere_are_an_error_and_no_figure(
    job_file: Path, table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", "caption", table, "--images", tmp_path / "elsewhere", "--config", job_file) == 2
    told = capfd.readouterr().err
    assert "none of the 7 images of data.csv has a result" in told
    assert "missing" in told
    assert "--images" in told


def test_predictions_need_no_models(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # Java's scorers load for seconds; what they say is held against them elsewhere
    data = [{"image": "a.jpg", "caption": ["a cat on a mat"]}, {"image": "b.jpg", "caption": ["two dogs"]}]
    (tmp_path / "captions.json").write_text(json.dumps(data))
    said = [{"image_id": "a.jpg", "caption": "A cat on a mat."}, {"image_id": "b.jpg", "caption": "two dogs"}]
    (tmp_path / "results.json").write_text(json.dumps(said))
    command = ("caption", tmp_path / "captions.json", "--predictions", tmp_path / "results.json")
    report = evaluate(capfd, *command)
    assert report["figures"]["BLEU-2"]["value"] == pytest.approx(1.0)
    assert report["models"] == {}
    assert evaluate(capfd, *command, "--limit", "1")["num_images"] == 1
    assert run("evaluate", "retrieval", *command[1:]) == 2
    assert "no format of predictions" in capfd.readouterr().err
