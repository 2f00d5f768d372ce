"""Erasure: nothing of an image is left, it does not come back, and no run in flight brings it in."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references, request, rows_by_name, write
from tests.erasing import NAMES, at_write, everything, everything_of, key
from tests.integration.test_vacuum import files, let_die, start
from tests.s3 import S3Server
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.catalog import catalog as catalog_module
from vlmflow.catalog import erase as erase_module
from vlmflow.catalog.files import Found
from vlmflow.config import CatalogConfig
from vlmflow.erasure import find_images
from vlmflow.errors import ConfigError, RunRevokedError


@pytest.fixture
def catalog(root: Path) -> Catalog:
    return open_catalog(root, pa.schema([("title", pa.string())]))


def vectors(catalog: Catalog) -> int:
    return catalog.embeddings().num_rows


def test_nothing_of_it_is_left(catalog: Catalog, root: Path) -> None:
    marks = {"uri": "mem://secret", "caption": "a very private caption", "title": "her private title"}
    private, plain = [{"title": marks["title"]}], [{"title": "plain"}] * 2
    start(catalog, "r0", "r1", "killed")
    enrich(catalog, "r0", [references(["secret"], source=private)], caption=marks["caption"])
    enrich(catalog, "r1", [references(["a", "b"], source=plain)])
    message = f"1 of 3 images did not come out of run r, such as {marks['uri']}"
    catalog.runs.finish("r0", {"message": message})
    catalog.runs.finish("r1", {})
    write(catalog, "killed", [references(["secret"], version="v3", source=private)], caption=marks["caption"])
    let_die(root, "killed")
    (root / "reviews").mkdir()
    verdicts = [{"image_id": image_id(name), "note": f"note on {name}"} for name in NAMES]
    pq.write_table(pa.Table.from_pylist(verdicts), root / "reviews" / "v1.parquet")
    (root / "reviews" / "v2.jsonl").write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    catalog.compact("r9")
    assert all(mark in everything(root) for mark in marks.values())

    result = catalog.erase(key("secret"))

    assert result.is_complete
    assert (result.num_rows, result.num_vectors, result.num_reviews, result.num_records) == (1, 2, 2, 1)
    text = everything(root)
    for mark in (*marks.values(), "note on secret", "secret"):
        assert mark not in text, mark
    assert "note on a" in text
    left = [path for path in files(root) if image_id("secret") in everything_of(root / path)]
    assert [path.split("/")[0] for path in left] == ["tombstones"]
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    assert vectors(catalog) == 4


@pytest.mark.parametrize("damage", ["emptied", "gone"])
def test_a_file_that_nobody_can_read_and_no_version_has_stands_in_no_way(
    catalog: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    start(catalog, "over")
    write(catalog, "over", [references(["d"])])
    catalog.runs.finish("over", {})
    (orphan,) = (root / path for path in files(root) if path.startswith("images/") and "/over-" in path)
    orphan.write_bytes(b"")
    look_through = erase_module.look_through

    def beside_a_vacuum(*args: Any) -> list[Found]:
        found = list(look_through(*args))
        if damage == "gone":
            orphan.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(erase_module, "look_through", beside_a_vacuum)
    result = catalog.erase(key("secret"))
    assert (result.is_complete, result.num_rows) == (True, 1)
    assert not orphan.exists()
    left = [path for path in files(root) if image_id("secret") in everything_of(root / path)]
    assert [path.split("/")[0] for path in left] == ["tombstones"]


def test_it_does_not_come_back_until_that_is_asked_for(catalog: Catalog) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    catalog.erase(key("secret"))
    with catalog.plan([references([*NAMES, "d"], version="v2")], request()) as plan:
        assert (plan.num_erased, plan.num_listed, plan.num_new) == (1, 3, 1)
    assert enrich(catalog, "r1", [references(NAMES, version="v2")]).num_replaced == 2
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    catalog.erase(key("secret"))
    catalog.lift(key("secret"))
    assert enrich(catalog, "r2", [references(NAMES, version="v2")]).num_added == 1
    assert sorted(rows_by_name(catalog)) == NAMES
    assert len(catalog.erased_keys) == 0


def test_an_image_that_was_never_there_is_kept_out(catalog: Catalog) -> None:
    result = catalog.erase(key("secret"))
    assert (result.num_images, result.num_rows, result.is_complete) == (1, 0, True)
    enrich(catalog, "r0", [references(NAMES)])
    assert sorted(rows_by_name(catalog)) == ["a", "b"]


@pytest.mark.parametrize("planned", ["new", "replaced"])
def test_a_run_in_flight_does_not_bring_it_in(catalog: Catalog, root: Path, planned: str) -> None:
    if planned == "replaced":
        enrich(catalog, "r0", [references(NAMES)])
    start(catalog, "flight")
    written = write(catalog, "flight", [references(NAMES, version="v2")])

    first = catalog.erase(key("secret"))
    assert first.live_runs == ("flight",)
    assert not first.is_complete
    done = catalog.commit("flight", written)

    assert (done.num_erased, done.num_dropped) == (1, 0)
    assert done.num_added + done.num_replaced == 2
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    assert vectors(catalog) == 4
    assert all(image_id("secret") not in everything_of(root / path) for path in files(root) if "tombstones" not in path)
    example = {"image_id": image_id("secret"), "uri": "mem://secret", "before": "allow"}
    catalog.runs.finish("flight", {"examples": [example, {**example, "image_id": image_id("a"), "uri": "mem://a"}]})
    last = catalog.erase(key("secret"))  # by its id: the files that told its address are gone
    assert (last.is_complete, last.num_records) == (True, 1)
    assert "mem://secret" not in (text := everything(root))
    assert "mem://a" in text


@pytest.mark.parametrize("turn", [1, 2])
def test_an_erasure_inside_a_commit_wins(
    catalog: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    # The run's commits: first the vectors, then the rows. Each has decided already when the erasure comes.
    written = write(catalog, "r1", [references(NAMES)])
    other = Catalog.open(config_of(root))
    at_write(monkeypatch, turn, lambda: other.erase(key("secret")))
    catalog.commit("r1", written)
    monkeypatch.undo()
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    catalog.compact("r2")
    other.erase(key("secret"))
    assert all(image_id("secret") not in everything_of(root / path) for path in files(root) if "tombstones" not in path)
    assert vectors(catalog) == 4


@pytest.mark.parametrize("turn", [1, 2])
def test_a_commit_inside_an_erasure_is_found(
    catalog: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    enrich(catalog, "r0", [references(["a"])])
    other = Catalog.open(config_of(root))
    written = write(other, "r1", [references(["b", "secret"])])
    at_write(monkeypatch, turn, lambda: other.commit("r1", written))
    catalog.erase(key("secret"))
    monkeypatch.undo()
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    assert vectors(catalog) == 4
    assert all(image_id("secret") not in everything_of(root / path) for path in files(root) if "tombstones" not in path)


def test_a_dead_run_is_shut_out_before_its_files_go(catalog: Catalog, root: Path) -> None:
    start(catalog, "dead")
    written = write(catalog, "dead", [references(NAMES)])
    let_die(root, "dead")
    assert catalog.erase(key("secret")).is_complete
    with pytest.raises(RunRevokedError):
        catalog.commit("dead", written)


CHILD = """
import os, signal, sys
from tests.catalog_samples import config_of
from tests.erasing import key
from vlmflow.catalog import Catalog, erase
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.tombstones import Tombstones

root, point = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def after(owner, name, count=1):
    original, calls = getattr(owner, name), []
    def call(*arguments, **named):
        out = original(*arguments, **named)
        calls.append(1)
        if len(calls) == count:
            die()
        return out
    setattr(owner, name, call)

{"tombstone": lambda: after(Tombstones, "put"), "images": lambda: after(erase, "commit"),
 "embeddings": lambda: after(erase, "commit", 2), "deleting": lambda: setattr(Folder, "delete_all", die),
 "deleted": lambda: after(Folder, "delete_all")}[point]()
Catalog.open(config_of(root)).erase(key("secret"))
"""


@pytest.mark.parametrize("point", ["tombstone", "images", "embeddings", "deleting", "deleted"])
def test_killed_anywhere_the_same_command_finishes(catalog: Catalog, root: Path, point: str) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    enrich(catalog, "r1", [references(NAMES, version="v2")])
    start(catalog, "told")
    catalog.runs.finish("told", {"message": "1 of 3 images did not come out, such as mem://secret"})
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), point], check=False, env=os.environ | {"PYTHONPATH": "."}
    )
    assert killed.returncode == -9
    (run,) = [run for run, state in catalog.runs.states().items() if state == "running"]
    let_die(root, run)
    assert catalog.erase(key("secret")).is_complete
    assert "mem://secret" not in everything(root)
    assert all(image_id("secret") not in everything_of(root / path) for path in files(root) if "tombstones" not in path)
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    assert vectors(catalog) == 4


def test_a_file_of_ids_counts_whole_or_not_at_all(catalog: Catalog, tmp_path: Path) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    ids = tmp_path / "ids.txt"
    ids.write_text(f"# takedown 7\n{image_id('a')}\n\n{image_id('secret')}  # her request: a\u2028b.jpg\n")
    assert find_images(catalog, [], ids).num_rows == 2
    (tmp_path / "ids.csv").write_text(f"image_id,reason\n{image_id('a')},x\n")
    assert find_images(catalog, ["mem://b"], tmp_path / "ids.csv").num_rows == 2
    long = "".join(f'{image_id("a")},"{"a reason " * 8}\nof two lines"\n' for _ in range(20_000))  # more than a block
    (tmp_path / "long.csv").write_text(f"image_id,reason\n{long}")
    assert find_images(catalog, [], tmp_path / "long.csv").num_rows == 1
    ids.write_text(f"{image_id('a')}\nnot-an-id\n")
    with pytest.raises(ConfigError, match=r"line 2: 'not-an-id' is no image_id"):
        find_images(catalog, [], ids)
    (tmp_path / "other.csv").write_text("id\n1\n")
    with pytest.raises(ConfigError, match="no column image_id"):
        find_images(catalog, [], tmp_path / "other.csv")
    with pytest.raises(ConfigError, match="no image is named"):
        find_images(catalog, [], None)


def test_an_empty_address_or_list_names_no_image(catalog: Catalog, root: Path, tmp_path: Path) -> None:
    """A variable that was not set, a query that failed: nothing must seem to be erased."""
    enrich(catalog, "r0", [references(NAMES)])
    for uris in ([""], ["mem://a", " "]):
        with pytest.raises(ConfigError, match="an address of --uri is empty"):
            find_images(catalog, uris, None)
    for name, text in (("ids.txt", "# of today\n\n"), ("ids.csv", "image_id\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=f"{name} holds no image_id"):
            find_images(catalog, ["mem://a"], tmp_path / name)
    assert run("erase", str(root), "--uri", "", "--yes") == 2
    assert len(Catalog.open(config_of(root)).erased_keys) == 0


def test_the_command_line_asks_first(
    catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    command = ["erase", str(root), "--uri", "mem://secret"]
    monkeypatch.setattr(catalog_module, "erase", None)
    assert run(*command) == 2
    assert "--yes" in capsys.readouterr().err
    assert run(*command, "--dry-run") == 0
    # The row's own id, made up here, and the one that the address has without a key.
    assert "would erase 2 images, 1 row now" in capsys.readouterr().out
    assert run(*command, "--dry-run", "--json") == 0
    told = {"dry_run": True, "lift": False, "num_images": 2, "num_rows": 1, "erased_before": [], "absent": []}
    assert json.loads(capsys.readouterr().out) == told
    monkeypatch.undo()
    start(catalog, "live")
    assert run(*command, "--yes") == 3
    assert "not finished: live at work" in " ".join(capsys.readouterr().out.split())
    catalog.runs.finish("live", {})
    assert run(*command, "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["is_complete"] is True
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    command += ["--lift", "--json"]
    monkeypatch.setattr("sys.stdin", Terminal("n\ny\n"))
    assert run(*command) == 130
    asked = capsys.readouterr()
    assert "let 1 erased image come back with the next run?" in asked.err
    assert (asked.out.strip(), len(catalog.erased_keys)) == ("", 2)
    assert run(*command) == 0
    assert json.loads(capsys.readouterr().out) == told | {
        "dry_run": False,
        "lift": True,
        "num_images": 1,
        "num_rows": 0,
        "erased_before": ["mem://secret"],
        "kept_out": [],
    }
    assert len(Catalog.open(config_of(root)).erased_keys) == 0


class Terminal(io.StringIO):
    """What somebody types."""

    def isatty(self) -> bool:
        return True


def test_on_a_store(s3_server: S3Server) -> None:
    config = CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=s3_server.storage)
    catalog = Catalog.open_or_create(config, pa.schema([]))
    enrich(catalog, "r0", [references(NAMES)])
    enrich(catalog, "r1", [references(NAMES, version="v2")])
    result = catalog.erase(key("secret"))
    assert result.is_complete
    assert result.num_files >= 3
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
