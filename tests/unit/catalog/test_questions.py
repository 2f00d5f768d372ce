"""Questions and answers in the catalog: when they are due again, when results are shared, older catalogs."""

from __future__ import annotations

import datetime as dt
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from tests.catalog_samples import (
    constants,
    finish,
    open_catalog,
    references,
    request,
    rows_by_name,
)
from vlmflow import schema
from vlmflow.catalog import Catalog
from vlmflow.catalog.due import PlanRequest
from vlmflow.catalog.keys import questions_digests, to_binary
from vlmflow.catalog.log import SCHEMA_VERSION, UPGRADABLE
from vlmflow.catalog.reviews import EVENT
from vlmflow.catalog.rows import alt_texts, attempt_digest
from vlmflow.config import CatalogConfig
from vlmflow.engine.equal_bytes import RecentResults, look_up
from vlmflow.imaging import PixelRequest
from vlmflow.models import Answer
from vlmflow.search.live import LiveRows
from vlmflow.tasks.answer import AnswerTask

NAMES = ["a", "b", "c"]
ANSWER_LISTS = pa.list_(schema.ANSWER)
ANSWERS = [{"question": "who", "answer": "a cat", "score": 0.75}]


def ask(*questions: str, **given: Any) -> PlanRequest:
    asked = request(["answer"], **given)
    return PlanRequest(**{**vars(asked), "questions": questions})


def answered(
    catalog: Catalog, run_id: str, batches: list[pa.RecordBatch], asked: PlanRequest, content: str = "bytes"
) -> None:
    """Runs what is due, `answer` with :data:`ANSWERS`; content hashes are as long as the real ones."""
    said = constants(run_id, asked)
    said = type(said)(**{**vars(said), "questions": asked.questions, "models": {"answer": "vqa@1"}})
    with catalog.plan(batches, asked) as plan:
        writer = catalog.writer(said, plan.version)
        for planned in plan.batches():
            hashes = [hash_of(f"{content} of {uri}") for uri in planned["uri"].to_pylist()]
            columns = (planned[name].to_pylist() for name in ("previous_hash", "due", "due_if_same"))
            run = [same if new == old else due for new, old, due, same in zip(hashes, *columns, strict=True)]
            rows = finish(planned, run=asked.tasks)
            for name, values in (
                ("content_hash", pa.array(hashes)),
                ("tasks_run", pa.array(run, pa.list_(pa.string()))),
                ("answers", pa.array([ANSWERS if "answer" in tasks else None for tasks in run], ANSWER_LISTS)),
            ):
                rows = rows.set_column(rows.schema.get_field_index(name), name, values)
            catalog.commit(run_id, writer.write(rows))


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reasons(catalog: Catalog, batches: list[pa.RecordBatch], asked: PlanRequest) -> dict[str, int]:
    with catalog.plan(batches, asked) as plan:
        return {reason: count for (_, reason), count in plan.counts.items()}


def test_other_questions_are_due_and_the_same_are_not(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    answered(catalog, "r1", [references(NAMES)], ask("who", "what"))
    assert reasons(catalog, [references(NAMES)], ask("who", "what")) == {}
    changed = {"questions_changed": 3}
    assert reasons(catalog, [references(NAMES)], ask("who")) == changed
    assert reasons(catalog, [references(NAMES)], ask("what", "who")) == changed
    mixed = [references(["a"]), references(["b"], questions=["what"]), references(["c"], questions=["why"])]
    assert reasons(catalog, mixed, ask("who", "what")) == {"questions_changed": 1}, "a question is asked once"
    assert reasons(catalog, mixed[1:2], ask("who")) == {}, "whoever asks, it is the same question"
    assert reasons(catalog, [references(NAMES)], ask("who", "what", fingerprints={"answer": "answer-2"})) == {
        "fingerprint": 3
    }
    row = rows_by_name(catalog)["a"]
    assert (row["answers"], row["answer_model"], row["answer_fingerprint"]) == (ANSWERS, "vqa@1", "answer-1")


def test_answers_stay_when_other_tasks_run_and_go_with_the_bytes(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    answered(catalog, "r1", [references(NAMES)], ask("who"))
    answered(catalog, "r2", [references(NAMES)], request(["caption"]))
    row = rows_by_name(catalog)["b"]
    assert (row["answers"], row["caption"], row["status"]) == (ANSWERS, "a cat", "ok")
    assert reasons(catalog, [references(NAMES)], ask("who")) == {}
    answered(catalog, "r3", [references(["b"], version="v2")], request(["caption"]), "others")
    rows = rows_by_name(catalog)
    assert (rows["b"]["answers"], rows["b"]["questions_digest"]) == (None, None)
    assert rows["a"]["answers"] == ANSWERS
    assert reasons(catalog, [references(["b"], version="v2")], ask("who")) == {"task_added": 1}


def test_digests_tell_questions_apart() -> None:
    lists = pa.array([None, [], ["a"], ["a", "b"], ["ab"], ["b", "a"]], pa.list_(pa.string()))
    digests = questions_digests(lists, ()).to_pylist()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    assert questions_digests(lists[:2], ("a",)).to_pylist() == [digests[2]] * 2
    assert questions_digests(lists, ("a", "b")).to_pylist()[2:4] == [digests[3]] * 2


def test_answers_are_copied_for_equal_bytes_and_equal_questions_alone(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    answered(catalog, "r1", [references(["a"])], ask("who"))
    known = catalog.known_bytes(ask("who"), None)
    assert known is not None
    batch = pa.table(
        {
            "text": pa.nulls(3, pa.string()),
            "previous_caption": pa.nulls(3, pa.string()),
            "questions": pa.array([None, ["why"], ["who"]], pa.list_(pa.string())),
        }
    )
    found = look_up(known, batch, [hash_of("bytes of mem://a")] * 3, [["answer"]] * 3)
    assert found is not None
    assert found.tasks == [("answer",), (), ("answer",)]
    assert found.column([True, False, True]).to_pylist()[2]["answers"] == ANSWERS
    other = catalog.known_bytes(ask("what"), None)
    assert other is not None
    assert look_up(other, batch, [hash_of("bytes of mem://a")] * 3, [["answer"]] * 3).tasks == [(), (), ()]  # type: ignore[union-attr]


def test_of_equal_bytes_the_newest_row_alone_is_looked_up(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    for number, day in enumerate((1, 3, 2)):  # one address and its bytes, under several keys
        answered(catalog, f"r{number}", [references(["a"], str(number))], ask("who", date=dt.date(2026, 3, day)))
    known = catalog.known_bytes(ask("who"), None)
    assert known is not None
    assert len(known) == 1
    assert known.images.paths[known.images.file[0]].startswith("ingest_date=2026-03-03/")
    mask, rows = known.copies([hash_of("bytes of mem://a"), hash_of("others")])
    assert (mask.tolist(), rows["answers"].to_pylist()) == ([True, False], [ANSWERS])


class Counting:
    """Counts the images that it is shown."""

    num_images = 0

    def answer(self, pixels: Any, questions: Any) -> list[list[Answer]]:
        self.num_images += len(pixels)
        return [[Answer(question, 1.0) for question in asked] for asked in questions]

    def check_questions(self, questions: Any) -> None:
        pass


def test_within_a_run_equal_bytes_with_equal_questions_are_asked_once() -> None:
    asked_of = [None, ["a"], ["a"], ["b"], None]
    pixel_request = PixelRequest(2, "bicubic", ("squash",))
    rows = pa.table(
        {
            "content_hash": ["x"] * 5,
            f"pixels_{pixel_request.key}": pa.array([[bytes(12)]] * 5, pa.list_(pa.binary())),
            "questions": pa.array(asked_of, pa.list_(pa.string())),
        }
    )
    model = Counting()
    task = AnswerTask(model, pixel_request, ["who"])
    recent = RecentResults(task)
    for _ in range(2):
        split = recent.split(rows)
        fresh = rows.take(pa.array(split.fresh, pa.int64()))
        values = task(fresh)
        joined, _ = recent.join(split, values, pa.nulls(fresh.num_rows, schema.ERROR))
        said = [[answer["answer"] for answer in answers] for answers in joined["answers"].to_pylist()]
        assert said == [["who"], ["who", "a"], ["who", "a"], ["who", "b"], ["who"]]
    assert model.num_images == 3


def older_catalog(folder: Path, monkeypatch: pytest.MonkeyPatch, *others: str) -> dict[str, dict[str, Any]]:
    """A catalog as version 2 wrote it: without the columns that have come since. Returns its rows."""
    new = ["alt_text", "alt_text_rule", "answers", "questions_digest", "answer_model", "answer_fingerprint"]
    new += ["read_at", "http_validator", *others]
    old = pa.schema([field for field in schema.IMAGES if field.name not in new])
    with monkeypatch.context() as patched:
        patched.setattr(schema, "IMAGES", old)
        patched.setattr("vlmflow.catalog.log.SCHEMA_VERSION", "2")
        patched.setattr("vlmflow.catalog.upgrade.SCHEMA_VERSION", "2")
        catalog = open_catalog(folder)
        answered(catalog, "r1", [references(NAMES)], request())
    table = DeltaTable(folder / "images")
    assert table.metadata().configuration["vlmflow.schemaVersion"] == "2"
    assert not set(new) & set(table.schema().to_arrow().names)
    return {row["uri"].removeprefix("mem://"): row for row in table.to_pyarrow_table().to_pylist()}


def test_a_catalog_of_version_2_gains_the_columns_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = older_catalog(tmp_path, monkeypatch, "phash")  # which the first of that version lack
    catalog = Catalog.open(open_catalog(tmp_path)._folder.config)
    rows = rows_by_name(catalog)
    assert {name: {key: row[key] for key in before[name]} for name, row in rows.items()} == before
    assert {row["alt_text"] for row in rows.values()} == {None}
    for table in ("images", "embeddings"):
        assert DeltaTable(tmp_path / table).metadata().configuration["vlmflow.schemaVersion"] == SCHEMA_VERSION
    versions = catalog.version
    assert Catalog.open(catalog._folder.config).version == versions, "once is enough"
    # Old files, whose rows lack the columns, are planned, copied from, merged and compacted.
    assert reasons(catalog, [references(NAMES)], ask("who")) == {"task_added": 3}
    assert catalog.known_bytes(ask("who"), None) is None
    known = catalog.known_bytes(request(), None)
    assert known is not None
    assert np.array_equal(known.copies([rows["a"]["content_hash"]])[0], [True])
    answered(catalog, "r2", [references(["a"])], ask("who"))
    answered(catalog, "r3", [references(["d"])], request())
    catalog.compact("r4")
    after = rows_by_name(catalog)
    assert after["a"]["answers"] == ANSWERS
    assert after["a"]["caption"] == before["a"]["caption"]
    assert (after["b"]["answers"], after["b"]["caption"]) == (None, "a cat")
    assert after["d"]["alt_text"] == "A cat."
    assert [after[name]["read_at"] is None for name in "abd"] == [False, True, False]
    assert [*UPGRADABLE, SCHEMA_VERSION] == [str(version) for version in range(2, int(SCHEMA_VERSION) + 1)]


def test_several_programs_may_upgrade_an_older_catalog_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older_catalog(tmp_path, monkeypatch)
    config = CatalogConfig(uri=str(tmp_path))
    together = threading.Barrier(3)

    def open_it(_: int) -> str | None:
        together.wait()
        return Catalog.open_or_create(config, pa.schema([]))._embeddings.schema_version

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(open_it, range(3))) == [SCHEMA_VERSION] * 3


def test_only_who_writes_the_new_columns_upgrades_an_older_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = older_catalog(tmp_path / "catalog", monkeypatch)
    catalog = Catalog.open(CatalogConfig(uri=str(tmp_path / "catalog")))
    # Read with all columns of this version, by conditions and exports too ...
    assert set(schema.IMAGES.names) == set(catalog.newest_images.schema.names)
    assert set(schema.IMAGES.names) == set(catalog.images().column_names)
    rows = rows_by_name(catalog)
    assert {name: row["caption"] for name, row in rows.items()} == {
        name: row["caption"] for name, row in before.items()
    }
    assert {row["answers"] for row in rows.values()} == {None}
    live = LiveRows(catalog._folder, catalog._images.refresh())
    assert live.mask("answers IS NULL AND caption = 'a cat'").all()
    catalog.export(tmp_path / "export", with_embeddings=True)
    assert "alt_text" in pq.read_table(tmp_path / "export/images").column_names
    assert reasons(catalog, [references(NAMES)], ask("who")) == {"task_added": 3}
    # ... and kept in order and judged as it is: a version that is at work on it goes on.
    said = {name: rows["a"][name] for name in ("image_id", "content_hash")} | {"decision": "block", "reviewer": "ada"}
    catalog.reviews.add(pa.Table.from_pylist([said | {"at": dt.datetime.now(dt.UTC)}], schema=EVENT))
    assert catalog.apply_verdicts().num_changed == 1
    catalog.vacuum(dry_run=True)
    catalog.vacuum()
    catalog.compact("r2")
    catalog.erase(to_binary(pa.chunked_array([[rows["c"]["image_id"]]])))
    left = rows_by_name(catalog)
    assert {name: row["decision"] for name, row in left.items()} == {"a": "block", "b": rows["b"]["decision"]}
    for table in ("images", "embeddings"):
        assert DeltaTable(tmp_path / "catalog" / table).metadata().configuration["vlmflow.schemaVersion"] == "2"
    assert "alt_text" not in DeltaTable(tmp_path / "catalog/images").schema().to_arrow().names


def test_other_questions_are_asked_where_answering_failed_too_often() -> None:
    fingerprints = {"answer": "f", "caption": "g"}
    assert attempt_digest(fingerprints, ["who"]) != attempt_digest(fingerprints, ["what"])
    assert attempt_digest({"caption": "g"}, ["who"]) == attempt_digest({"caption": "g"}), "older rows keep their count"


def test_found_text_may_be_a_list_of_lines() -> None:
    source = pa.array([{"ocr": ["SALE", None, "now"]}, {"ocr": None}], pa.struct([("ocr", pa.list_(pa.string()))]))
    rows = pa.table({"uri": ["a.png", "b.png"], "source": source})
    texts = alt_texts(rows, pa.array(["a red bag", "a dog"]), "ocr")["alt_text"].to_pylist()
    assert texts[0] is not None
    assert "SALE now" in texts[0]
    assert texts[1] == "A dog."
