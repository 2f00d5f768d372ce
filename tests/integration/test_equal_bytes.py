"""Equal bytes are computed once: copied from the catalog under the new image's name, and shared within a run."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.pictures import picture, write_broken, write_pictures
from vlmflow.catalog import Catalog, KnownBytes
from vlmflow.config import Job
from vlmflow.engine import enrich
from vlmflow.engine.prepare import prepare
from vlmflow.engine.report import RunReport

pytestmark = pytest.mark.usefixtures("ray_session")

# What belongs to the image and to the run, not to the bytes.
OWN = (
    "image_id",
    "uri",
    "run_id",
    "embed_run_id",
    "read_at",
    "updated_at",
    "object_version",
    "seen_version",
    "ingest_date",
)


@pytest.fixture(scope="module")
def old(make_job_in: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job over six images, done, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("enriched")
    write_pictures(folder / "old", 6)
    job = make_job_in(folder, folder / "old")
    enrich(job)
    return job


def rows_below(catalog: Catalog, folder: str) -> dict[str, dict[str, Any]]:
    rows = catalog.images().to_pylist()
    return {row["uri"].rsplit("/", 1)[-1]: row for row in rows if f"/{folder}/" in row["uri"]}


def values(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: value for key, value in row.items() if key not in OWN} for name, row in rows.items()}


def vectors(catalog: Catalog) -> dict[tuple[str, str], list[float]]:
    found = catalog.embeddings().to_pylist()
    assert len({(row["image_id"], row["view"]) for row in found}) == len(found)
    return {(row["image_id"], row["view"]): row["vector"] for row in found}


def worked(report: RunReport) -> dict[str, int]:
    return {stage.stage: stage.images for stage in report.stages if stage.stage not in ("read", "decode", "feed")}


def known(job: Job) -> KnownBytes:
    catalog = Catalog.open(job.catalog)
    found = catalog.known_bytes(prepare(job).plan_request(), None)
    assert found is not None
    return found


def test_images_moved_to_another_folder_are_copied_and_not_computed(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "old", 12)
    broken = write_broken(tmp_path / "old")
    first = enrich(make_job(tmp_path / "old"))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    picture(99).save(tmp_path / "new" / "extra.png")

    report = enrich(make_job(tmp_path / "new"))

    assert (first.num_copied, report.num_copied, report.num_shared) == (0, 12, 0)
    assert set(worked(report).values()) == {1}, "the one new image, in every task"
    catalog = Catalog.open(make_job(tmp_path / "new").catalog)
    old, new = rows_below(catalog, "old"), rows_below(catalog, "new")
    extra = new.pop("extra.png")
    assert extra["status"] == "ok"
    assert values(new) == values(old)
    assert {row["status"] for row in new.values()} == {"ok", "unreadable"}
    assert len(broken) == sum(row["status"] == "unreadable" for row in new.values())
    found = vectors(catalog)
    for name, row in new.items():
        assert row["embed_run_id"] in (None, report.run_id), "a copy stands on its own"
        for view in ("squash", "center"):
            assert found.get((row["image_id"], view)) == found.get((old[name]["image_id"], view))
    assert {image for image, _ in found} == {
        row["image_id"] for row in catalog.images().to_pylist() if row["status"] == "ok"
    }
    assert enrich(make_job(tmp_path / "new")).status == "nothing_due"


@pytest.mark.slow
def test_a_copy_with_another_text_is_matched_anew(make_job: Callable[..., Job], tmp_path: Path) -> None:
    write_pictures(tmp_path / "old", 3)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "old").iterdir())

    def manifest(name: str, folder: str, texts: list[str]) -> Path:
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["uri", "title"])
            writer.writerows([[str(tmp_path / folder / one), text] for one, text in zip(names, texts, strict=True)])
        return path

    options: dict[str, Any] = {"source_options": {"text_column": "title"}, "tasks": ("caption", "match")}
    enrich(make_job(manifest("a.csv", "old", ["a red car", "a dog", "a cup"]), **options))
    job = make_job(manifest("b.csv", "new", ["a red car", "a cat", "a cup"]), **options)
    report = enrich(job)

    assert report.num_copied == 3
    assert {task: count for task, count in worked(report).items() if count} == {"match": 1}
    catalog = Catalog.open(job.catalog)
    old, new = rows_below(catalog, "old"), rows_below(catalog, "new")
    assert [new[name]["text_itm"] == old[name]["text_itm"] for name in names] == [True, False, True]
    # What an undisturbed run computes of the second.
    alone = make_job(tmp_path / "b.csv", catalog={"uri": str(tmp_path / "alone")}, **options)
    assert enrich(alone).num_copied == 0
    undisturbed = rows_below(Catalog.open(alone.catalog), "new")
    for name in names:
        assert new[name]["caption"] == undisturbed[name]["caption"]
        for score in ("caption_itm", "caption_itc", "text_itm", "text_itc"):
            assert new[name][score] == pytest.approx(undisturbed[name][score], abs=1e-5)


def test_equal_bytes_within_a_run_are_computed_once(make_job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(12):
        picture(number % 3).save(tmp_path / "images" / f"{number:02d}.png")

    job = make_job(tmp_path / "images")
    report = enrich(job)

    assert (report.num_copied, report.num_shared) == (0, 9)
    rows = values(rows_below(Catalog.open(job.catalog), "images"))
    assert len(rows) == 12
    for number in range(3, 12):
        assert rows[f"{number:02d}.png"] == rows[f"{number % 3:02d}.png"]


@pytest.mark.parametrize(
    "change", ["policy", *(pytest.param(rare, marks=pytest.mark.slow) for rare in ("fingerprint", "off", "too few"))]
)
def test_nothing_is_copied_where_results_would_differ_or_looking_costs_more(
    change: str, old: Job, make_job: Callable[..., Job], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "too few":
        monkeypatch.setattr("vlmflow.engine.prepare.MAX_ROWS_PER_IMAGE", 0.5)
    shutil.copytree(old.catalog.uri, tmp_path / "catalog")
    shutil.copytree(old.source.uri, tmp_path / "new")
    other = tmp_path / "other.yaml"
    other.write_text(Path(policy).read_text().replace("review: 0.45", "review: 0.4"))
    options: dict[str, dict[str, Any]] = {
        "fingerprint": {"max_caption_tokens": 5},
        "policy": {"policy": str(other), "accept_unbound": True},
        "off": {"reuse": False},
        "too few": {},
    }

    report = enrich(make_job(tmp_path / "new", **options[change]))

    assert (report.num_copied, report.num_added) == (0, 6)
    assert set(worked(report).values()) == {6}


def test_results_that_are_gone_or_of_others_are_computed_again(
    old: Job, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    shutil.copytree(old.catalog.uri, tmp_path / "catalog")
    job = make_job(old.source.uri)
    catalog = Catalog.open(job.catalog)
    hashes = catalog.images(["content_hash"])["content_hash"].to_pylist()
    index = known(job)
    assert len(index) == 6

    mask, rows = index.copies([hashes[3], None, "f" * 64, hashes[0], hashes[3]])

    assert mask.tolist() == [True, False, False, True, True]
    assert rows["content_hash"].to_pylist() == [hashes[3], hashes[0], hashes[3]]
    stored = {row["image_id"]: row for row in catalog.images().to_pylist()}
    held = vectors(catalog)
    by_hash = {row["content_hash"]: row for row in stored.values()}
    for row in rows.to_pylist():
        mine = by_hash[row["content_hash"]]
        assert row["caption"] == mine["caption"]
        assert row["labels"] == mine["labels"]
        theirs = dict(zip(row["vector_views"], row["vectors"], strict=True))
        assert theirs == {view: held[mine["image_id"], view] for view in theirs}

    # The same prefix is not the same hash.
    mask, _ = index.copies([hashes[0][:32] + "0" * 32])
    assert not mask.any()
    # Vectors that are those of another image by now.
    assert index.vectors is not None
    index.vectors.row[:] = np.roll(index.vectors.row, 1)
    mask, _ = index.copies([hashes[0]])
    assert not mask.any()
    # A file that is gone.
    index = known(job)
    for path in (tmp_path / "catalog" / "embeddings").rglob("*.parquet"):
        path.unlink()
    mask, _ = index.copies(hashes)
    assert not mask.any()


def test_only_sizes_that_are_to_come_are_indexed(old: Job) -> None:
    catalog = Catalog.open(old.catalog)
    sizes = catalog.images(["size_bytes"])["size_bytes"].to_pylist()
    request = prepare(old).plan_request()

    some = catalog.known_bytes(request, pa.array([sizes[0]]))
    assert some is not None
    assert len(some) == sizes.count(sizes[0])
    assert catalog.known_bytes(request, pa.array([10**9])) is None
