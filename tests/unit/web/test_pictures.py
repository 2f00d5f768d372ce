"""Pictures come from wherever an image lies, and a host that does not answer holds up its own alone."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from anyio.to_thread import current_default_thread_limiter

from tests.images import encode, scene
from tests.report_samples import label, labels_of, put_rows
from vlmflow import explain
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, SourceConfig
from vlmflow.errors import ExplainError, RowErrorClass
from vlmflow.imaging import PixelRequest, hash_of
from vlmflow.report.flagged import newly_flagged
from vlmflow.search.query import Query, search_job
from vlmflow.search.searcher import search_images
from vlmflow.search.thumbnails import make_thumbnails
from vlmflow.sources import open_source
from vlmflow.sources.again import RowReader
from vlmflow.sources.base import Fetched
from vlmflow.web import pictures
from vlmflow.web.pictures import COLUMNS, Picture, Pictures
from vlmflow.web.shelf import CARD_COLUMNS

JPEG = "image/jpeg"


def member(folder: Path, data: bytes) -> Path:
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("0.txt", b"a word"), ("0.png", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def cell(folder: Path, data: bytes) -> Path:
    pq.write_table(pa.table({"image": [b"another", data]}), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("write", [member, cell])
def test_an_image_inside_a_file_has_a_picture_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    data = encode(scene(), "PNG")
    path = write(tmp_path, data)
    (listed,) = open_source(SourceConfig(uri=str(path))).list()
    reference = listed.to_pylist()[-1]
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(
        config, ["image"], uri=[reference["uri"]], object_version=[reference["object_version"]], decision=["review"],
        content_hash=[hash_of(data)], labels=labels_of([[label("gun", 0.7, "review") | {"view": "squash"}]]),
        policy_digest=["digest"],
    )  # fmt: skip
    assert picture(config).media_type == JPEG
    hits = search_images(config, Query(like=Catalog.open(config).images(["image_id"]).to_pylist()[0]["image_id"])).hits
    (row,) = newly_flagged(config, "run-1", 1)[1]
    for hit in (*hits, row.hit):
        assert make_thumbnails([hit], config)[0].uri is not None
    monkeypatch.setattr(explain, "_scorer", lambda *_: (PixelRequest(32, "bicubic", ("squash",)), _no_score))
    evidence = explain.evidence_of(Catalog.open(config).images(explain.EVIDENCE_COLUMNS).to_pylist()[0])
    assert explain.draw_heatmap(search_job(config, "starter"), evidence)[1].size == (448, 448)

    write(tmp_path, b"other bytes in its place")
    assert "has changed since" in words(picture(config))
    with pytest.raises(ExplainError, match="has changed since"):
        explain.draw_heatmap(search_job(config, "starter"), evidence)


def _no_score(shown: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.zeros(len(shown), np.float32)


def picture(config: CatalogConfig) -> Picture:
    (row,) = Catalog.open(config).images(COLUMNS).to_pylist()

    async def make() -> Picture:
        return await Pictures(config).small(row, "small", blurred=False)

    return anyio.run(make)


def words(found: Picture) -> str:
    return found.data.decode().replace('</text><text x="128"', " ")


class Hosts:
    """Reads of ``http`` addresses end when they are let go; others at once."""

    def __init__(self) -> None:
        self.data = encode(scene(), "PNG")
        self.free = threading.Event()
        self.num_held = 0

    def read(self, images: Sequence[tuple[str, str | None]]) -> list[Fetched]:
        if images[0][0].startswith("http"):
            self.num_held += 1
            self.free.wait(300)
            return [Fetched(None, None, RowErrorClass.READ_TIMEOUT, "not read in time")]
        return [Fetched(self.data, None, None, "")]

    def row(self, uri: str) -> Mapping[str, Any]:
        row = {"image_id": uri, "uri": uri, "object_version": None, "content_hash": hash_of(self.data)}
        return {**row, "width": 4, "height": 3, "decision": "allow"}


def test_a_host_that_does_not_answer_holds_up_its_own_pictures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, found = Hosts(), {}
    monkeypatch.setattr(RowReader, "read", lambda _, images: hosts.read(images))
    monkeypatch.setattr(pictures, "_PATIENCE_S", 0.5)
    shown = Pictures(CatalogConfig(uri=str(tmp_path)))

    async def ask(uri: str) -> None:
        found[uri] = await shown.small(hosts.row(uri), "small", blurred=False)

    async def main() -> None:
        dead = [f"https://dead.example/{number}.jpg" for number in range(50)]
        async with anyio.create_task_group() as tasks:
            for uri in dead:
                tasks.start_soon(ask, uri)
            await anyio.wait_all_tasks_blocked()
            assert current_default_thread_limiter().borrowed_tokens == 0  # they are for pages and verdicts
            monkeypatch.setattr(pictures, "_PATIENCE_S", 60.0)
            with anyio.fail_after(60):
                await ask("s3://bucket/a.jpg")
                await ask("/images/a.jpg")
                while len(found) < len(dead) - hosts.num_held + 2:  # whoever waits for a turn is told so
                    await anyio.sleep(0.01)
            hosts.free.set()

    anyio.run(main)
    assert hosts.num_held == 4
    assert [found[uri].media_type for uri in ("s3://bucket/a.jpg", "/images/a.jpg")] == [JPEG, JPEG]
    told = [words(answer) for uri, answer in found.items() if uri.startswith("https")]
    assert sum("Not read in time" in text for text in told) == hosts.num_held
    assert sum("reload the page" in text for text in told) == len(told) - hosts.num_held


def test_a_label_is_explained_by_what_was_asked_for() -> None:
    """Of a row whose label its prompts and a detector scored, the detector's the gravest; another only a detector."""
    by_detector = {"label": "gun", "decision": "block", "score": 0.9, "detector": "finder"}
    by_prompts = {"label": "gun", "decision": "review", "score": 0.6, "detector": None}
    alone = {"label": "nude", "decision": "allow", "score": 0.1, "detector": "finder"}
    row: dict[str, Any] = dict.fromkeys(explain.EVIDENCE_COLUMNS, "") | {"errors": None, "verdict": None}
    row |= {"labels": [alone, by_prompts, by_detector], "detections": None, "policy_digest": None}
    more = {"category": "weapons", "probability": None}
    evidence = explain.evidence_of(
        {**row, "decision_reason": "weapons/gun"} | {"labels": [one | more for one in row["labels"]]}
    )
    asked = {
        "gun": by_prompts,
        "weapons/gun": by_prompts,
        "weapons/gun (finder)": by_detector,
        "gun (finder)": by_detector,
        "nude": alone,
        "nude (finder)": alone,
        None: by_detector,
    }
    for name, expected in asked.items():
        assert explain._chosen(evidence, name) == expected | more, name
    with pytest.raises(ExplainError, match=r"no label gun \(other\)") as refused:
        explain._chosen(evidence, "gun (other)")
    assert refused.value.remedy == "Name one of gun (finder), gun, nude (finder)."
    error = {"stage": "decode", "class": "truncated", "message": "ends early"}
    unreadable = evidence.model_copy(update={"labels": (), "status": "unreadable", "errors": (error,)})
    with pytest.raises(ExplainError, match="could not be read: truncated"):
        explain._chosen(unreadable, None)
    with pytest.raises(ExplainError, match="has no labels"):
        explain._chosen(unreadable.model_copy(update={"status": "ok"}), None)


def test_a_picture_needs_no_more_of_a_row_than_a_card() -> None:
    assert {*COLUMNS, "status", "verdict"} <= set(CARD_COLUMNS), "each picture would read all columns of a row group"
