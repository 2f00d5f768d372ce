"""Search with real models over a catalog that `enrich` made, and the commands as a user meets them."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.images import png_bomb
from tests.terminal import run
from vlmflow import Catalog, CatalogConfig, Job, Query, SearchResult, describe_image, enrich, search_images
from vlmflow.errors import ImageError, RowErrorClass, SearchError
from vlmflow.search.duplicates import THRESHOLD
from vlmflow.search.query import QueryEncoder, search_job
from vlmflow.search.thumbnails import make_thumbnails
from vlmflow.views_search import printable

DEMO = Path(str(resources.files("vlmflow"))) / "starter" / "demo"
NUM_IMAGES = 40


@pytest.fixture(scope="module")
def place(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images and a catalog of them, by the starter models."""
    root = tmp_path_factory.mktemp("search")
    (root / "images").mkdir()
    lines = (DEMO / "manifest.csv").read_text(encoding="utf-8").splitlines()
    chosen = [*lines[1 : NUM_IMAGES - 1], *(line for line in lines if "sku-1001.png" in line)]
    for line in chosen:
        shutil.copy(DEMO / line.split(",")[1], root / "images")
    (root / "images" / "manifest.csv").write_text("\n".join([lines[0], *chosen]), encoding="utf-8")
    enrich(job_of(root))
    return root


def job_of(root: Path) -> Job:
    return Job.model_validate(
        {
            "source": {"uri": str(root / "images" / "manifest.csv"), "text_column": "title"},
            "catalog": {"uri": str(root / "catalog")},
            "profile": "starter",
            "policy": "demo",
            "pools": [{"tasks": ["embed", "moderate", "caption", "match"], "cpus": 0.5, "batch_size": 16}],
        }
    )


def config(place: Path) -> CatalogConfig:
    return CatalogConfig(uri=str(place / "catalog"))


def test_a_text_finds_what_it_says(place: Path) -> None:
    result = search_images(config(place), Query(text="a camera and a dog on a yellow background"), top_k=3)
    assert result.hits[0].uri.endswith("sku-0003.jpg")
    assert result.num_rows == NUM_IMAGES


def test_an_image_finds_itself_and_its_vector_is_the_stored_one(place: Path) -> None:
    file = place / "images" / "sku-0004.png"
    for image in (file, file.read_bytes()):
        result = search_images(config(place), Query(image=image), top_k=2)
        assert result.hits[0].uri == str(file)
        assert result.hits[0].score == pytest.approx(1.0, abs=1e-5)
    others = search_images(config(place), Query(like=str(file)), top_k=2)
    assert others.hits[0].uri == result.hits[1].uri


def test_one_image_here_and_now_is_described_as_in_the_catalog(place: Path) -> None:
    job = job_of(place)
    rows = Catalog.open(config(place)).images(["uri", "decision", "decision_reason", "caption", "labels"]).to_pylist()
    flagged = next(row for row in rows if row["decision"] != "allow")
    plain = next(row for row in rows if row["decision"] == "allow")
    for row in (flagged, plain):
        described = describe_image(Path(row["uri"]), job)
        assert described.decision == row["decision"]
        assert described.decision_reason == row["decision_reason"]
        assert described.caption == row["caption"]
        assert described.labels is not None
        stored = {label["label"]: label["margin"] for label in row["labels"]}
        assert {label["label"]: label["margin"] for label in described.labels} == pytest.approx(stored, abs=1e-4)
        assert set(described.vectors) <= {"squash", "center"}
        itself = search_images(config(place), Query(image=Path(row["uri"])), top_k=1).hits[0]
        assert itself.uri == row["uri"]
        assert np.linalg.norm(described.vector()) == pytest.approx(1.0, abs=1e-5)
    unmoderated = describe_image(Path(plain["uri"]), job.model_copy(update={"tasks": ("embed",), "pools": ()}))
    assert (unmoderated.decision, unmoderated.labels, unmoderated.caption) == ("review", None, None)


def test_bombs_are_refused_as_queries(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_bomb())
    with pytest.raises(ImageError) as refused:
        search_images(config(place), Query(image=bomb))
    assert refused.value.error_class is RowErrorClass.TOO_MANY_PIXELS
    with pytest.raises(ImageError):
        describe_image(bomb, job_of(place))
    assert run("search", place / "catalog", "--image", bomb) == 2
    assert "pixels exceed limits.max_pixels" in capfd.readouterr().err


def test_a_query_by_another_model_is_refused(place: Path, models: dict[str, dict[str, str]]) -> None:
    job = Job.model_validate(job_of(place).model_dump() | {"models": {"embed": models["embed"]}})
    with pytest.raises(SearchError, match="vlmflow/starter-clip") as refused:
        search_images(config(place), Query(text="a dog"), job=job)
    assert "--profile" in refused.value.remedy


def test_other_views_of_the_same_model_are_no_other_model(place: Path) -> None:
    job = search_job(config(place), "starter").model_copy(update={"views": ("squash",)})
    assert len(search_images(config(place), Query(text="a dog"), job=job).hits) == 10


def test_the_page_has_pictures_and_flagged_ones_are_blurred(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page, shown = tmp_path / "page.html", tmp_path / "shown.html"
    query = ["search", place / "catalog", "a gun", "--top-k", "50"]
    assert run(*query, "--html", page, "--csv", tmp_path / "hits.csv", "--json") == 0
    result = SearchResult.model_validate_json(capfd.readouterr().out)
    assert run(*query, "--html", shown, "--show-flagged", "--json") == 0
    capfd.readouterr()
    hidden, clear = (pictures(path) for path in (page, shown))
    assert len(hidden) == len(clear) == len(result.hits) == NUM_IMAGES
    assert 0 < sum(hit.is_flagged for hit in result.hits) < NUM_IMAGES
    for hit, before, after in zip(result.hits, hidden, clear, strict=True):
        assert (sharpness(before) < 0.1 * sharpness(after)) == hit.is_flagged, hit.uri
        assert (before == after) == (not hit.is_flagged)
    assert page.read_text(encoding="utf-8").count("blurred: flagged") == sum(hit.is_flagged for hit in result.hits)
    assert len((tmp_path / "hits.csv").read_text(encoding="utf-8").splitlines()) == NUM_IMAGES + 1


def pictures(page: Path) -> list[bytes]:
    text = page.read_text(encoding="utf-8")
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)]


def sharpness(picture: bytes) -> float:
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L"), np.float32)
    return float(np.abs(np.diff(pixels, axis=0)).max() + np.abs(np.diff(pixels, axis=1)).max())


def test_a_picture_that_is_no_longer_the_rows_own_is_not_shown(place: Path) -> None:
    hits = search_images(config(place), Query(text="a dog"), top_k=1).hits
    (before,) = make_thumbnails(hits, config(place))
    assert before.uri is not None
    changed = hits[0].model_copy(update={"content_hash": "0" * 64})
    gone = hits[0].model_copy(update={"uri": str(place / "none.jpg")})
    private = hits[0].model_copy(update={"uri": "http://169.254.169.254/latest/meta-data"})
    other = hits[0].model_copy(update={"uri": "javascript://x"})
    found = make_thumbnails([changed, gone, private, other], config(place))
    assert [thumbnail.uri for thumbnail in found] == [None] * 4
    assert found[0].reason == "the image has changed since it was enriched"
    assert all(thumbnail.reason for thumbnail in found)
    store = CatalogConfig(uri="s3://bucket/catalog")
    (local,) = make_thumbnails(hits, store)  # rows of a store must not name files of this disk
    assert local.uri is None


def test_the_commands(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    catalog = place / "catalog"
    like = place / "images" / "sku-0003.jpg"
    assert run("search", catalog, "--like", like, "--where", "width > 10", "--top-k", "2") == 0
    assert "images of which width > 10" in capfd.readouterr().out
    assert run("search", catalog, "--build-index") == 0
    assert "No index" in capfd.readouterr().out
    assert run("search", catalog, "a dog", "--where", "nonsense >") == 2
    assert run("search", catalog) == 2
    assert run("search", catalog, "a dog", "--html", tmp_path / "none" / "page.html") == 2
    assert run("search", tmp_path / "none", "a dog") == 2
    assert "Traceback" not in capfd.readouterr().err

    assert run("titles", catalog, "-k", "5", "--json") == 0
    titles = json.loads(capfd.readouterr().out)["titles"]
    scores = [title["text_itm"] for title in titles]
    assert scores == sorted(scores)
    assert all(title["text_column"] == "title" for title in titles)

    assert run("duplicates", catalog, "--csv", tmp_path / "same.csv", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert report["threshold"] == THRESHOLD
    (group,) = [group for group in report["groups"] if group["kind"] == "exact"]
    assert {Path(member["uri"]).name for member in group["members"]} == {"sku-1001.png", "copy-of-sku-1001.png"}
    assert run("duplicates", catalog, "--kind", "phonetic") == 2
    assert run("duplicates", catalog) == 0
    assert run("titles", catalog, "--csv", tmp_path / "titles.csv") == 0
    assert "texts that fit least" in printable(capfd.readouterr().out).replace("\\u000a", " ")


@pytest.mark.slow
def test_the_threshold_of_duplicates_tells_copies_from_other_drawings() -> None:
    """Each of the demo's drawings against the others and against worse copies of itself."""
    encoder = QueryEncoder(search_job(CatalogConfig(uri="x"), "starter"))
    drawings = [Image.open(path).convert("RGB") for path in sorted(DEMO.glob("sku-0*"))]

    def embed(image: Image.Image, image_format: str = "PNG", **options: int) -> NDArray[np.float32]:
        sink = io.BytesIO()
        image.save(sink, image_format, **options)
        return encoder.encode(Query(image=sink.getvalue()))

    vectors = np.stack([embed(image) for image in drawings])
    others = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert len(drawings) >= 190
    assert others.max() < THRESHOLD
    copies = {
        "quality 40": [embed(image, "JPEG", quality=40) for image in drawings],
        "quarter": [embed(image.resize((max(1, image.width // 4), max(1, image.height // 4)))) for image in drawings],
    }
    for kind, copied in copies.items():
        cosines = (np.stack(copied) * vectors).sum(axis=1)
        assert (cosines >= THRESHOLD).all(), (kind, cosines.min())
    cropped = [embed(image.crop(_inner(image, 0.03))) for image in drawings]
    assert ((np.stack(cropped) * vectors).sum(axis=1) >= THRESHOLD).mean() > 0.9


def _inner(image: Image.Image, share: float) -> tuple[int, int, int, int]:
    width, height = image.size
    return round(width * share), round(height * share), round(width * (1 - share)), round(height * (1 - share))
