"""People's verdicts: a queue goes out, and decisions come back that outlive everything but a change of bytes."""

from __future__ import annotations

import csv
import datetime as dt
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import rows_of
from tests.pictures import picture, write_broken, write_pictures
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine import enrich
from vlmflow.engine.remoderate import remoderate
from vlmflow.errors import ReviewError
from vlmflow.moderation.queue import QueueSizes
from vlmflow.review import export_queue, import_verdicts

pytestmark = pytest.mark.usefixtures("ray_session")

Row = dict[str, Any]


def write_csv(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def enriched(make_job_in: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("enriched")
    write_pictures(folder / "images", 8)
    write_broken(folder / "images")
    made = make_job_in(folder, folder / "images", tasks=("embed", "moderate"))
    enrich(made)
    return made


@pytest.fixture
def job(enriched: Job, tmp_path: Path) -> Job:
    """A catalog of the test's own. The images are those of all tests: only one reads, and changes, them."""
    shutil.copytree(enriched.catalog.uri, tmp_path / "catalog")
    return enriched.model_copy(update={"catalog": CatalogConfig(uri=str(tmp_path / "catalog"))})


def opposite(row: Row) -> str:
    return "allow" if row["decision"] != "allow" else "block"


@pytest.mark.slow
def test_a_verdict_outlives_runs_policies_and_models_but_no_change_of_bytes(
    job: Job, policy: str, tmp_path: Path
) -> None:
    before = rows_of(job)
    names = sorted(name for name, row in before.items() if row["status"] == "ok")
    first, second, third = names[:3]
    given = {first: opposite(before[first]), second: "block", third: "review"}
    at = "2026-11-20T10:00:00Z"
    file = write_csv(
        tmp_path / "verdicts.csv",
        [
            {
                "uri": before[name]["uri"],
                "verdict": verdict,
                "reviewer": "ada",
                "reason": "seen",
                "at": at,
            }
            for name, verdict in given.items()
        ],
    )

    report = import_verdicts(job.catalog, file)

    assert (report.num_verdicts, report.num_new, report.num_changed, report.left_out) == (3, 3, 3, {})

    def check(names: tuple[str, ...], now: dict[str, Row]) -> None:
        for name in names:
            row = now[name]
            assert (row["decision"], row["decision_reason"]) == (given[name], "verdict")
            verdict = row["verdict"]
            assert (verdict["reviewer"], verdict["reason"]) == ("ada", "seen")
            assert verdict["content_hash"] == row["content_hash"]
            assert verdict["at"] == dt.datetime(2026, 11, 20, 10, tzinfo=dt.UTC)

    after = rows_of(job)
    check((first, second, third), after)
    for name, row in after.items():
        if name not in given:
            assert row == {**before[name], "run_id": row["run_id"], "updated_at": row["updated_at"]}
        else:
            assert row["labels"] == before[name]["labels"], "what the model says stays"
            assert row["verdict"]["model_decision"] == before[name]["decision"]
            assert row["verdict"]["model_reason"] == before[name]["decision_reason"]

    # The same file again: nothing happens.
    version = Catalog.open(job.catalog).version
    again = import_verdicts(job.catalog, file)
    assert (again.num_new, again.num_changed) == (0, 0)
    assert Catalog.open(job.catalog).version == version

    # A re-run with another task, then another policy, then another model.
    enrich(job.model_copy(update={"tasks": ("embed", "moderate", "caption")}))
    check((first, second, third), rows_of(job))
    strict = tmp_path / "strict.yaml"
    strict.write_text(Path(policy).read_text().replace("review: 0.45, block: 0.9", "review: 0.0, block: 0.0"))
    strict.write_text(strict.read_text().replace('version: "1"', 'version: "2"'))
    other = job.model_copy(update={"policy": str(strict)})
    moved = remoderate(other)
    assert moved.num_moved == 8
    check((first, second, third), rows_of(job))
    assert {row["verdict"]["model_decision"] for row in rows_of(job).values() if row["verdict"]} == {"block"}
    enrich(job.model_copy(update={"views": ("squash",), "accept_unbound": True}))
    check((first, second, third), rows_of(job))

    # A swapped image loses its verdict; one whose object is touched alone keeps it.
    # Unreadable: nobody has a word on what is there now. The same bytes again: the verdict is back.
    swapped, touched, emptied = (Path(job.source.uri) / name for name in (first, second, third))
    picture(500).save(swapped, {"jpg": "JPEG"}.get(swapped.suffix[1:], swapped.suffix[1:].upper()))
    touched.touch()
    good = emptied.read_bytes()
    emptied.write_bytes(b"")
    enrich(job)
    now = rows_of(job)
    assert now[first]["verdict"] is None
    assert now[first]["decision_reason"] != "verdict"
    check((second,), now)
    assert (now[third]["status"], now[third]["decision"]) == ("unreadable", "review")
    assert now[third]["decision_reason"] != "verdict"
    emptied.write_bytes(good)
    enrich(job)
    check((third,), rows_of(job))


def test_the_newest_verdict_counts_and_one_can_be_taken_back(job: Job, tmp_path: Path) -> None:
    before = rows_of(job)
    name = next(name for name, row in before.items() if row["status"] == "ok")
    base = {"image_id": before[name]["image_id"], "reviewer": "ada"}

    def say(verdict: str, at: str) -> Row:
        import_verdicts(job.catalog, write_csv(tmp_path / "v.csv", [{**base, "verdict": verdict, "at": at}]))
        return rows_of(job)[name]

    assert say("block", "2026-11-20T10:00:00")["decision"] == "block"
    assert say("allow", "2026-11-19T10:00:00")["decision"] == "block", "an older word"
    assert say("review", "2026-11-21T10:00:00+02:00")["decision"] == "review"
    gone = say("none", "2026-11-22T10:00:00Z")
    assert gone["verdict"] is None
    assert (gone["decision"], gone["decision_reason"]) == (before[name]["decision"], before[name]["decision_reason"])


def test_a_queue_goes_out_and_comes_back_in_every_format(job: Job, tmp_path: Path) -> None:
    rows = {row["image_id"]: row for row in rows_of(job).values()}
    sizes = QueueSizes(near=3, disagreement=2, random=2)
    for number, suffix in enumerate(("csv", "parquet", "json")):
        path = tmp_path / f"queue.{suffix}"
        report = export_queue(job.catalog, str(path), sizes=sizes, seed=number)
        assert report.queues.items() >= {"near": 3, "random": 2}.items()
        if suffix == "json":
            tasks = json.loads(path.read_text())
            chosen = tasks[0]["data"]["image_id"]
            choice = {"from_name": "verdict", "type": "choices", "value": {"choices": ["block"]}}
            words = {"from_name": "reason", "type": "textarea", "value": {"text": ["a rifle"]}}
            tasks[0]["annotations"] = [
                {
                    "result": [choice, words],
                    "completed_by": {"email": "eva@shop"},
                    "updated_at": "2026-11-20T10:00:00Z",
                },
                {"result": [], "was_cancelled": True, "updated_at": "2026-11-21T10:00:00Z"},
            ]
            path.write_text(json.dumps(tasks))
        else:
            queue = list(csv.DictReader(path.open())) if suffix == "csv" else pq.read_table(path).to_pylist()
            assert all(rows[row["image_id"]]["content_hash"] == row["content_hash"] for row in queue)
            assert {row["queue"] for row in queue} <= {"near", "disagreement", "random"}
            assert all(
                float(row["weight"]) == pytest.approx((8 - number) / 2) for row in queue if row["queue"] == "random"
            )
            chosen = queue[0]["image_id"]
            filled = [{**row, "verdict": "block"} if row["image_id"] == chosen else row for row in queue]
            if suffix == "csv":
                write_csv(path, filled)
            else:
                pq.write_table(pa.Table.from_pylist(filled), path)

        done = import_verdicts(job.catalog, path, reviewer="ada")

        assert (done.num_verdicts, done.num_changed, done.left_out) == (1, 1, {})
        row = next(row for row in rows_of(job).values() if row["image_id"] == chosen)
        assert (row["decision"], row["verdict"]["reviewer"]) == ("block", "eva@shop" if suffix == "json" else "ada")
        # What has been judged is not asked again.
        export_queue(job.catalog, tmp_path / "next.parquet", sizes=QueueSizes(100, 100, 100))
        assert chosen not in pq.read_table(tmp_path / "next.parquet")["image_id"].to_pylist()


def test_what_cannot_be_taken_is_said_and_nothing_is_taken(job: Job, tmp_path: Path) -> None:
    rows = list(rows_of(job).values())
    good = next(row for row in rows if row["status"] == "ok")
    broken = next(row for row in rows if row["status"] == "unreadable")
    path = tmp_path / "v.csv"
    wrong = [
        ({"image_id": good["image_id"], "verdict": "maybe", "reviewer": "a"}, "verdict 'maybe'"),
        ({"image_id": good["image_id"], "verdict": "allow"}, "no reviewer"),
        ({"image_id": good["image_id"], "verdict": "allow", "reviewer": "a", "at": "tomorrow"}, "at 'tomorrow'"),
        ({"image_id": good["image_id"], "verdict": "allow", "reviewer": "a", "at": "2999-01-01"}, "is to come"),
        ({"image_id": good["image_id"], "value": "true", "reviewer": "a"}, "label None"),
        ({"verdict": "allow", "reviewer": "a"}, "has the columns verdict, reviewer"),
    ]
    for row, message in wrong:
        with pytest.raises(ReviewError, match=message):
            import_verdicts(job.catalog, write_csv(path, [row]))
    for name in ("v.txt", "absent.csv"):
        with pytest.raises(ReviewError):
            import_verdicts(job.catalog, tmp_path / name)
    assert Catalog.open(job.catalog).reviews.events().num_rows == 0

    report = import_verdicts(
        job.catalog,
        write_csv(
            path,
            [
                {"image_id": good["image_id"], "content_hash": "0" * 64, "verdict": "block"},
                {"image_id": "f" * 32, "content_hash": "", "verdict": "block"},
                {"image_id": broken["image_id"], "content_hash": "", "verdict": "allow"},
                {"image_id": good["image_id"], "content_hash": "", "verdict": ""},
            ],
        ),
        reviewer="ada",
    )
    assert (report.num_verdicts, report.num_changed) == (0, 0)
    assert report.left_out == {
        "image has changed since (content_hash differs)": 1,
        "image is not in the catalog": 1,
        "image was never read": 1,
    }


def test_verdicts_on_labels_feed_calibrate_and_erasure_takes_them(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    rows = [row for row in rows_of(job).values() if row["status"] == "ok"]
    said = [
        {"image_id": row["image_id"], "label": "weapons/gun", "value": str(number % 2 == 0).lower(), "reviewer": "ada"}
        for number, row in enumerate(rows)
    ]
    report = import_verdicts(job.catalog, write_csv(tmp_path / "v.csv", said))
    assert (report.num_verdicts, report.num_changed) == (8, 0), "a word on a label decides nothing by itself"

    models = tmp_path / "job.yaml"
    models.write_text(json.dumps({"models": {name: model.model_dump() for name, model in job.models.items()}}))
    command = ["calibrate", job.catalog.uri, "--policy", policy, "--profile", "starter", "--config", str(models)]
    assert run(*command, "--output", str(tmp_path / "new.yaml")) == 2
    assert "20" in capsys.readouterr().err, "eight verdicts are too few, and that is what it says"

    gone = rows[0]
    assert run("erase", job.catalog.uri, "--uri", gone["uri"], "--yes") == 0
    assert gone["image_id"] not in Catalog.open(job.catalog).reviews.events()["image_id"].to_pylist()
    assert Catalog.open(job.catalog).reviews.events().num_rows == 7
