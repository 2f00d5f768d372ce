"""The app while the catalog changes under it: other models, an index, a version that is being read, a broken thread."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.processes import wait_for
from tests.report_samples import put_rows
from tests.search_samples import names, put, unit
from tests.web_samples import Served, by_id, serving, shown_ids, small_catalog, starter_catalog, text_of
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.pieces import ParquetPieces
from vlmflow.catalog.reviews import EVENT
from vlmflow.config import CatalogConfig
from vlmflow.errors import TransientError
from vlmflow.search.build import update_index
from vlmflow.search.query import QueryEncoder
from vlmflow.web.facts import FactReader
from vlmflow.web.judging import Judging


def embed_anew(served: Served, model: str) -> None:
    """As a run with another model does: every row refers to a vector of it."""
    rows = list(served.rows().values())
    images = [Path(row["uri"]).name for row in rows]
    kept = {name: [row[name] for row in rows] for name in ("uri", "decision", "content_hash")}
    vectors = unit(np.random.default_rng(0).standard_normal((len(rows), 7)))
    put(served.config, images, vectors, run="r9", model=model, replace=True, **kept)
    served.desk.shelf.refresh()


def test_what_is_asked_after_another_model_embedded_the_catalog_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(starter_catalog(tmp_path)) as served:
        browser = served.browser()
        assert len(shown_ids(browser.get("/?q=a+dog").text)) == 12
        file = Path(next(iter(served.rows().values()))["uri"])
        by_file = browser.write("/query-image", content=file.read_bytes()).json()["location"]
        assert "The nearest of" in text_of(browser.get(by_file).text)

        embed_anew(served, "other-model")

        for query in ("/?q=a+dog", "/?q=a+cat"):  # of old queries and new ones the same is said
            page = text_of(browser.get(query).text)
            assert "That cannot be searched: the embeddings" in page
            assert "were made by clip-of-other-model@1" in page
            assert "nearest of 0" not in page
        assert "Choose the file again" in browser.get(by_file).text

        # And where the newest run names a profile whose vectors these are, they are found.
        original = QueryEncoder.__init__

        def other(self: QueryEncoder, job: Any) -> None:
            original(self, job)
            self.fingerprints = ("other-model",)
            monkeypatch.setattr(self, "encode", lambda query: unit(np.ones(7)))

        monkeypatch.setattr(QueryEncoder, "__init__", other)
        put_rows(served.config, ["more"], run="r10", embed_run_id=[None], embed_fingerprint=[None])
        served.desk.shelf.refresh()
        assert "The nearest of 12 images to “a dog”" in text_of(browser.get("/?q=a+dog").text)


def test_a_version_that_is_being_read_keeps_no_search_waiting(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    browser, (one, *_) = served.browser(), by_id(served)
    original, begun, go_on = FactReader.read, threading.Event(), threading.Event()

    def slowly(self: FactReader, files: Any) -> Any:
        begun.set()
        assert go_on.wait(300)
        return original(self, files)

    monkeypatch.setattr(FactReader, "read", slowly)
    put_rows(served.config, ["new"], run="run-9")
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(served.desk.shelf.refresh)
        try:
            assert begun.wait(60)
            assert pool.submit(browser.get, f"/?like={one}").result(60).status_code == 200
        finally:
            go_on.set()
    reading.result()
    assert len(served.desk.shelf.version) == len(by_id(served))


def test_an_index_that_is_made_meanwhile_is_used(served: Served) -> None:
    shelf, (one, *_) = served.desk.shelf, by_id(served)
    version = shelf.version
    assert shelf.nearest(one, lambda _: None, 5)[3] == ()
    assert update_index(served.config, min_rows=0).num_covered == len(version)
    assert shelf.refresh() is version, "the rows are the same: none is read anew"
    used: list[int] = []
    original = shelf._searcher.nearest

    def noted(*arguments: Any) -> Any:
        found, num_indexed = original(*arguments)
        used.append(num_indexed)
        return found, num_indexed

    shelf._searcher.nearest = noted
    shelf.nearest(one, lambda _: None, 5)
    assert used == [len(version) - 1]


def test_however_many_verdicts_wait_a_page_reads_no_row_twice_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, count = CatalogConfig(uri=str(tmp_path / "catalog")), 12
    for number in range(count):
        put_rows(config, [f"n{number}", f"m{number}"], run=f"run-{number}",
                 content_hash=[f"{number:064x}", f"{number + 99:064x}"], decision=["review"] * 2)  # fmt: skip
    monkeypatch.setattr("vlmflow.web.shelf._CARD_GROUPS", 4)
    with serving(config) as served:
        browser = served.browser().review_as("ada")
        rows = [row for name, row in served.rows().items() if name.startswith("n")]
        for row in rows[:-1]:
            assert browser.judge(row, "allow").status_code == 200
        browser.get("/review?decision=review")
        assert browser.judge(rows[-1], "allow").status_code == 200
        read: list[Any] = []
        original = ParquetPieces.read
        monkeypatch.setattr(ParquetPieces, "read", lambda self, *given: (read.append(given), original(self, *given))[1])
        page = browser.get("/review?decision=review")
        assert len(read) <= 2, "of the verdict that is new, and of the image that is shown"
        assert served.desk.facts(served.desk.shelf.version).counts("verdict", None) == {"person": 12, "nobody": 12}
        assert page.status_code == 200


def test_a_file_that_is_older_than_a_column_is_served(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    config = small_catalog(tmp_path, 4)
    for file in (tmp_path / "catalog" / "images").glob("*/*.parquet"):
        pq.write_table(pq.ParquetFile(file).read().drop_columns(["verdict", "policy_name", "text_itm"]), file)
    with serving(config) as served:
        assert len(shown_ids(served.browser().get("/?verdict=nobody").text)) == 4


def test_an_error_of_any_kind_ends_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vlmflow")
    errors = [KeyError("odd"), TransientError("the store is away")]
    original = Catalog.apply_verdicts

    def fails_at_first(self: Catalog, **given: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return original(self, **given)

    monkeypatch.setattr(Catalog, "apply_verdicts", fails_at_first)
    config = small_catalog(tmp_path, 6)
    broken = [KeyError("odd")]
    original_read = FactReader.read

    def breaks_once(self: FactReader, files: Any) -> Any:
        if broken and started.is_set():
            raise broken.pop()
        return original_read(self, files)

    started = threading.Event()
    monkeypatch.setattr(FactReader, "read", breaks_once)
    with serving(config, every_s=0.05) as served:
        started.set()
        browser = served.browser().review_as("ada")
        row = next(row for row in by_id(served).values() if row["decision"] == "review")
        assert browser.judge(row, "block").status_code == 200
        wait_for(lambda: served.desk.judging.num_waiting == 0, seconds=60)
        put_rows(config, names(1), run="run-9")

        def has_followed() -> bool:
            served.desk.shelf.look()
            return len(served.desk.shelf.version) == 7

        wait_for(has_followed, seconds=60)
    assert "KeyError: 'odd'" in caplog.text


def test_it_is_asked_again_whether_rows_show_their_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_catalog(tmp_path, 6)
    catalog = Catalog.open(config)
    row = catalog.images().to_pylist()[0]
    event = {"image_id": row["image_id"], "content_hash": row["content_hash"], "decision": "block"}
    said = event | {"reviewer": "ada", "at": dt.datetime.now(dt.UTC)}
    catalog.reviews.add(pa.Table.from_pylist([said], schema=EVENT))
    errors, original = [TransientError("the store is away")] * 2, Judging._catch_up

    def away_at_first(self: Judging) -> None:
        if errors:
            raise errors.pop()
        original(self)

    monkeypatch.setattr(Judging, "_catch_up", away_at_first)
    with serving(config, every_s=0.05) as served:
        wait_for(lambda: by_id(served)[row["image_id"]]["decision"] == "block", seconds=60)


def test_a_verdict_is_taken_though_an_erasure_has_just_rewritten_the_file_of_its_row(served: Served) -> None:
    served.desk.shelf.stop()  # it does not look again by itself
    browser, (first, second, third, *_) = served.browser().review_as("ada"), list(by_id(served).values())
    assert browser.judge(first, "block").status_code == 200
    assert browser.judge(second, "block").status_code == 200
    served.desk.shelf.catalog.erase(to_binary(pa.array([third["image_id"]])))

    page = browser.get(f"/image/{second['image_id']}")
    assert page.status_code == 503
    assert "Reload the page in a few seconds." in text_of(page.text)
    assert ".parquet" not in page.text
    undone = browser.write("/undo", json={})
    assert undone.status_code == 200
    assert undone.json()["message"] == f"Undone: {second['uri'].rsplit('/', 1)[-1]}"

    served.desk.shelf.catalog.erase(to_binary(pa.array([first["image_id"]])))
    again = browser.judge(second, "allow", seen=undone.json()["seen"])
    assert again.status_code == 200
    assert browser.write("/undo", json={}).status_code == 200
    gone = browser.write("/undo", json={})  # of what was said of the image that is erased
    assert gone.status_code == 409
    assert "not in the catalog any more" in gone.json()["error"]
    assert first["image_id"] not in Catalog.open(served.config).reviews.events()["image_id"].to_pylist()
    assert "nothing to undo" in browser.write("/undo", json={}).json()["error"]


def test_nothing_is_kept_of_what_is_said_of_an_image_while_it_is_erased(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts are erased before the files are: until these are gone the app shows the image."""
    browser, (row, *_) = served.browser().review_as("ada"), list(by_id(served).values())
    refusals = []

    def meanwhile(folder: Folder, paths: Iterable[str]) -> list[str]:
        monkeypatch.undo()
        for said in ({"decision": "block"}, {"decision": None, "labels": {"gun": True}}):
            refusals.append(browser.judge(row, **said).json()["error"])
        return folder.delete_all(paths)

    served.desk.shelf.stop()  # it does not look again by itself
    monkeypatch.setattr(Folder, "delete_all", meanwhile)
    served.desk.shelf.catalog.erase(to_binary(pa.array([row["image_id"]])))
    assert refusals == ["The image has been erased from the catalog. Reload the page."] * 2
    assert not Catalog.open(served.config).reviews.events().num_rows
