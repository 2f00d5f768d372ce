"""The whole job with JPEGs decoded in the first pool, on a processor, against the same job with all decoded before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.images import encode, with_orientation
from tests.pictures import picture, write_broken, write_pictures
from vlmflow.catalog import Catalog
from vlmflow.config import Job
from vlmflow.demo import demo_job
from vlmflow.engine import RunReport, enrich

pytestmark = pytest.mark.usefixtures("ray_session")

SCORES = ("caption_itm", "caption_itc")
VOLATILE = {
    "run_id",
    "read_at",
    "ingest_date",  # midnight may lie between the two
    "updated_at",
    "embed_run_id",
    "attempt_digest",
    "phash",
    "labels",
    "caption",
    "answers",
    *SCORES,
}


def write_jpegs(folder: Path) -> None:
    """Of many sizes and orientations, and those that the pool must leave to processors."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(24):
        image = picture(number, 90 + 70 * (number % 5), 64 + 20 * (number % 3))
        (folder / f"jpeg {number:02d}.jpg").write_bytes(with_orientation(image, 1 + number % 8, quality=90))
    whole = encode(picture(77, 200, 100), "JPEG")
    (folder / "cmyk.jpg").write_bytes(encode(picture(70).convert("CMYK"), "JPEG"))
    (folder / "grey.jpg").write_bytes(encode(picture(71).convert("L"), "JPEG"))
    (folder / "progressive.jpg").write_bytes(encode(picture(72), "JPEG", progressive=True))
    (folder / "cut but ended.jpg").write_bytes(whole[: whole.index(b"\xff\xda") + 14] + b"\xff\xd9")


def rows_of(job: Job) -> dict[str, dict[str, Any]]:
    rows = Catalog.open(job.catalog).images().to_pylist()
    return {str(row["uri"]).rsplit("/", 1)[-1]: row for row in rows}


def compare(left: dict[str, dict[str, Any]], right: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """Asserts that all but what pixels decide is equal; returns the share of equal captions and answers, and the
    greatest difference of a label's score."""
    assert left.keys() == right.keys()
    equal, worst = [], 0.0
    for name, row in left.items():
        other = right[name]
        equal.append(row["caption"] == other["caption"])
        made_of_it = set() if equal[-1] else {"alt_text", "alt_text_rule"}
        for column in row.keys() - VOLATILE - made_of_it:
            assert row[column] == other[column], (name, column)
        for ours, theirs in zip(row["labels"] or [], other["labels"] or [], strict=True):
            assert ours["label"] == theirs["label"]
            worst = max(worst, abs(ours["score"] - theirs["score"]))
        for ours, theirs in zip(row.get("answers") or [], other.get("answers") or [], strict=True):
            assert ours["question"] == theirs["question"]
            equal.append(ours["answer"] == theirs["answer"])
    return float(np.mean(equal)), worst


def ran(job: Job, decode: str, tmp_path: Path, **options: Any) -> tuple[RunReport, dict[str, dict[str, Any]]]:
    catalog = job.catalog.model_copy(update={"uri": str(tmp_path / f"catalog-{decode}-{len(options)}")})
    job = job.model_copy(update={"decode": decode, "catalog": catalog})
    job = Job.model_validate(job.model_dump() | options)
    return enrich(job), rows_of(job)


@pytest.mark.slow
def test_rows_are_equal_wherever_jpegs_are_decoded(make_job: Callable[..., Job], tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_jpegs(images)
    write_pictures(images, 9, first_seed=100)
    write_broken(images)
    job = make_job(images)
    report, before = ran(job, "cpu", tmp_path)
    pools = [
        {"tasks": ("embed", "moderate"), "cpus": 0.5, "batch_size": 7},
        {"tasks": ("caption", "match"), "cpus": 0.5, "batch_size": 5},
    ]
    pooled, after = ran(job, "pool", tmp_path, pools=pools)
    assert report.statuses == pooled.statuses
    assert pooled.statuses["unreadable"] >= 4
    equal, worst = compare(before, after)
    assert equal >= 0.98
    assert worst <= 0.01


@pytest.mark.slow
def test_the_starter_models_see_the_same_in_the_demo_wherever_jpegs_are_decoded(tmp_path: Path) -> None:
    """Its pictures several times the models' size, as JPEG: decoded in full by the one, reduced by the other."""
    images = tmp_path / "images"
    images.mkdir()
    demo = Path(demo_job("unused").source.uri).parent
    for number, path in enumerate(sorted(demo.iterdir())):
        try:
            with Image.open(path) as opened:
                shown = opened.convert("RGB")
        except OSError:
            continue  # the demo's broken files
        (images / f"{number:03d}.jpg").write_bytes(encode(shown.resize((640, 480)), "JPEG", quality=90))
    job = demo_job(str(tmp_path / "catalog"))
    source = job.source.model_copy(update={"uri": str(images), "text_column": None})
    job = job.model_copy(update={"source": source})
    before, after = ran(job, "cpu", tmp_path)[1], ran(job, "pool", tmp_path)[1]
    assert len(before) > 100
    equal, worst = compare(before, after)
    print(f"{len(before)} pictures: captions equal {equal:.3f}, scores within {worst:.4f}")
    assert equal >= 0.98
    assert worst <= 0.01
