"""Why an image was decided as it was: its evidence, and a map of the regions that count."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.terminal import run
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.engine import enrich
from vlmflow.errors import ExplainError
from vlmflow.explain import find_evidence, write_heatmap
from vlmflow.models import resolve_models
from vlmflow.moderation.heatmap import occlusion_map

DEMO = Path(str(resources.files("vlmflow"))) / "starter" / "demo"


def test_a_map_shows_where_the_score_comes_from() -> None:
    pixels = np.full((60, 60, 3), 255, np.uint8)
    pixels[5:20, 35:55] = (255, 0, 0)

    def redness(images: object) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        values = np.asarray(images, np.float32)
        return (values[:, 0] - values[:, 1]).mean(axis=(1, 2))

    heat = occlusion_map(pixels, redness)
    assert heat.shape == (60, 60)
    assert np.unravel_index(heat.argmax(), heat.shape)[0] < 30
    assert np.unravel_index(heat.argmax(), heat.shape)[1] > 30
    assert heat[5:20, 35:55].mean() > 10 * max(0.0, float(heat[40:, :20].mean()))


@pytest.fixture(scope="module")
def job(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Bombs on the right of a picture and a fish on its left, moderated by the starter models."""
    folder = tmp_path_factory.mktemp("explain")
    (folder / "images").mkdir()
    both = Image.new("RGB", (400, 200), "white")
    both.paste(Image.open(DEMO / "sku-0007.jpg").convert("RGB").resize((200, 200)), (0, 0))
    both.paste(Image.open(DEMO / "sku-0133.jpg").convert("RGB").resize((200, 200)), (200, 0))
    both.save(folder / "images" / "both.png")
    Image.open(DEMO / "sku-0007.jpg").convert("RGB").save(folder / "images" / "fish.png")
    made = Job(
        source=SourceConfig(uri=str(folder / "images")),
        catalog=CatalogConfig(uri=str(folder / "catalog")),
        profile="starter",
        policy="demo",
        tasks=("embed", "moderate"),
    )
    enrich(made)
    return made


def address(job: Job, name: str) -> str:
    return f"{job.source.uri}/{name}"


def test_evidence_and_map_of_a_flagged_image(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = find_evidence(job.catalog, address(job, "both.png"))
    assert evidence.decision in ("review", "block")
    bomb = next(label for label in evidence.labels if label["label"] == "bomb")
    assert bomb["decision"] != "allow"
    assert [label["decision"] for label in evidence.labels] == sorted(
        (label["decision"] for label in evidence.labels), key=["block", "review", "allow"].index
    )

    chosen = write_heatmap(job, evidence, tmp_path / "why.png", label="bomb")
    assert chosen == bomb
    clear = write_heatmap(job, evidence, tmp_path / "clear.png", label="bomb", show_flagged=True)
    assert clear == bomb

    def redness(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        pixels = np.asarray(Image.open(path), np.float64)
        return pixels[..., 0] - pixels[..., 1]

    red = redness(tmp_path / "why.png")
    if bomb["view"] == "squash":
        assert red[:, 224:].mean() > red[:, :224].mean(), "the bombs are on the right"
    np.testing.assert_allclose(redness(tmp_path / "clear.png") > 60, red > 60, atol=1)
    blurred, shown = (np.asarray(Image.open(tmp_path / name).convert("L"), float) for name in ("why.png", "clear.png"))
    assert np.abs(np.diff(blurred, axis=1)).mean() < 0.7 * np.abs(np.diff(shown, axis=1)).mean(), "a flagged image"

    assert run("explain", job.catalog.uri, address(job, "both.png"), "--heatmap", str(tmp_path / "cli.png")) == 0
    shown_text = capsys.readouterr().out
    assert "weapon/bomb" in shown_text
    assert "policy demo 1" in shown_text
    assert (tmp_path / "cli.png").is_file()
    run("explain", job.catalog.uri, evidence.image_id, "--json")
    assert json.loads(capsys.readouterr().out)["decision"] == evidence.decision


def test_other_weights_of_the_same_name_explain_nothing(job: Job, tmp_path: Path) -> None:
    config = resolve_models(job)["embed"]
    folder = Path(shutil.copytree(str(config.path), tmp_path / Path(str(config.path)).name))
    weights = next(folder.glob("*.safetensors"))
    save_file(load_file(weights), weights, metadata={"format": "pt", "trained": "once more"})
    other = job.model_copy(update={"models": {"embed": config.model_copy(update={"path": str(folder)})}})
    evidence = find_evidence(job.catalog, address(job, "both.png"))
    with pytest.raises(ExplainError, match=f"was scored by other weights or code of {evidence.embed_model}, not by"):
        write_heatmap(other, evidence, tmp_path / "x.png", label="bomb")
    fewer = job.model_copy(update={"views": ("squash", "tiles")})
    assert write_heatmap(fewer, evidence, tmp_path / "x.png", label="bomb")["label"] == "bomb"


def test_what_cannot_be_explained_is_said(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ExplainError, match=r"no image nowhere\.png"):
        find_evidence(job.catalog, "nowhere.png")
    evidence = find_evidence(job.catalog, address(job, "fish.png"))
    with pytest.raises(ExplainError, match="has no label unicorn"):
        write_heatmap(job, evidence, tmp_path / "x.png", label="unicorn")
    with pytest.raises(ExplainError, match="No such file"):
        write_heatmap(job, evidence, tmp_path / "no" / "x.png")
    Image.new("RGB", (9, 9)).save(address(job, "fish.png"))
    with pytest.raises(ExplainError, match="has changed since"):
        write_heatmap(job, evidence, tmp_path / "x.png")
    Path(address(job, "fish.png")).unlink()
    with pytest.raises(ExplainError, match=r"gone when read|image itself"):
        write_heatmap(job, evidence, tmp_path / "x.png")
