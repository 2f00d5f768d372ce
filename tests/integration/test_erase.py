"""Erasure: nothing of an image is left, it does not come back, and no run in flight brings it in."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references, request, rows_by_name, write
from tests.integration.test_vacuum import files, let_die, start
from tests.s3 import S3Server
from vlmflow.catalog import Catalog
from vlmflow.catalog import catalog as catalog_module
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog import erase as erase_module
from vlmflow.catalog.files import Found
from vlmflow.catalog.keys import to_binary
from vlmflow.cli import main
from vlmflow.config import CatalogConfig, SourceConfig
from vlmflow.erasure import find_images
from vlmflow.errors import ConfigError, RunRevokedError
from vlmflow.sources import open_source

NAMES = ["a", "b", "secret"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "catalog"


@pytest.fixture
def catalog(root: Path) -> Catalog:
    return open_catalog(root, pa.schema([("title", pa.string())]))


def key(*names: str) -> pa.Array:
    return to_binary(pa.array([image_id(name) for name in names], pa.string()))


def vectors(catalog: Catalog) -> int:
    return catalog.embeddings().num_rows


def everything(root: Path) -> str:
    """Every byte of the folder, Parquet files as their values, as one text."""
    parts = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            parts.append(path.name)
            data = path.read_bytes()
            parts.append(data.decode("latin-1"))
            if path.suffix == ".parquet":
                with pq.ParquetFile(path) as file:
                    parts.append(repr(file.read().to_pylist()))
                    parts.append(repr(file.metadata.to_dict()))
    return "\n".join(parts)


def test_nothing_of_it_is_left(catalog: Catalog, root: Path) -> None:
    marks = {"uri": "mem://secret", "caption": "a very private caption", "title": "her private title"}
    private, plain = [{"title": marks["title"]}], [{"title": "plain"}] * 2
    start(catalog, "r0", "r1", "killed")
    enrich(catalog, "r0", [references(["secret"], source=private)], caption=marks["caption"])
    enrich(catalog, "r1", [references(["a", "b"], source=plain)])
    message = f"1 of 3 images did not come out of the run, such as {marks['uri']}"
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


def everything_of(path: Path) -> str:
    with pq.ParquetFile(path) as file:
        rows = file.read().to_pylist()
    return repr([[value.hex() if isinstance(value, bytes) else value for value in row.values()] for row in rows])


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
    catalog.runs.finish("flight", {})
    assert catalog.erase(key("secret")).is_complete


def at_write(monkeypatch: pytest.MonkeyPatch, turn: int, action: Callable[[], object]) -> None:
    """Does something else between the decision and the writing of the commit with this number."""
    original = commit_module._write
    calls: list[int] = []

    def write_later(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == turn:
            action()
        original(*arguments)

    monkeypatch.setattr(commit_module, "_write", write_later)


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
from tests.integration.test_erase import key
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
 "embeddings": lambda: after(erase, "commit", 2), "deleting": lambda: setattr(Folder, "delete_all", die)}[point]()
Catalog.open(config_of(root)).erase(key("secret"))
"""


@pytest.mark.parametrize("point", ["tombstone", "images", "embeddings", "deleting"])
def test_killed_anywhere_the_same_command_finishes(catalog: Catalog, root: Path, point: str) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    enrich(catalog, "r1", [references(NAMES, version="v2")])
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


def test_the_command_line_asks_first(
    catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enrich(catalog, "r0", [references(NAMES)])
    command = ["erase", str(root), "--uri", "mem://secret"]
    monkeypatch.setattr(catalog_module, "erase", None)
    assert run(command) == 2
    assert "--yes" in capsys.readouterr().err
    assert run([*command, "--dry-run"]) == 0
    # The row's own id, made up here, and the one that the address has without a key.
    assert "would erase 2 images, 1 row now" in capsys.readouterr().out
    assert run([*command, "--dry-run", "--json"]) == 0
    told = {"dry_run": True, "lift": False, "num_images": 2, "num_rows": 1, "erased_before": [], "absent": []}
    assert json.loads(capsys.readouterr().out) == told
    monkeypatch.undo()
    start(catalog, "live")
    assert run([*command, "--yes"]) == 3
    assert "not finished: live at work" in " ".join(capsys.readouterr().out.split())
    catalog.runs.finish("live", {})
    assert run([*command, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_complete"] is True
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
    command += ["--lift", "--json"]
    monkeypatch.setattr("sys.stdin", Terminal("n\ny\n"))
    assert run(command) == 130
    asked = capsys.readouterr()
    assert "let 1 erased image come back with the next run?" in asked.err
    assert (asked.out.strip(), len(catalog.erased_keys)) == ("", 2)
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out) == told | {
        "dry_run": False,
        "lift": True,
        "num_images": 1,
        "num_rows": 0,
        "erased_before": ["mem://secret"],
        "kept_out": [],
    }
    assert len(Catalog.open(config_of(root)).erased_keys) == 0


def test_an_address_without_a_row_is_named(catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enrich(catalog, "r0", [references(NAMES)])

    def said(*names: str) -> str:
        assert run(["erase", str(root), *(f"--uri=mem://{name}" for name in names), "--yes"]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "named had rows" not in said("secret")
    mistyped = said("a", "secret", "not-there")
    assert "1 row erased, 2 vectors, 0 verdicts" in mistyped
    assert "1 of the 3 images named had rows erased before: mem://secret no row has this address" in mistyped
    assert mistyped.endswith("kept from coming back all the same: mem://not-there")
    assert "0 rows erased, 0 vectors" in said("not-there-either")
    assert "address" not in said("not-there")


def test_an_address_stays_away_under_any_key(catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a manifest with a key column, whether the catalog held the address before or not."""
    manifest = root.parent / "list.csv"
    addresses = [str(root.parent / name) for name in ("had.jpg", "new.jpg", "other.jpg")]
    for address in addresses:
        Path(address).write_bytes(b"")

    def listed(*keys: str) -> list[pa.RecordBatch]:
        manifest.write_text("uri,sku\n" + "".join(f"{uri},{key}\n" for uri in addresses for key in keys))
        return list(open_source(SourceConfig(uri=str(manifest), key_column="sku")).list())

    def uris() -> list[str]:
        return sorted(row["uri"] for row in catalog.images(["uri"]).to_pylist())

    had, new, other = addresses
    (first,) = (batch.slice(0, 1) for batch in listed("A1"))
    enrich(catalog, "r0", [first])
    command = ["erase", str(root), "--uri", had, "--uri", new]
    assert run([*command, "--yes"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("1 row erased, 2 vectors")
    assert said.endswith(f"kept from coming back all the same: {new}")
    with catalog.plan(listed("A1", "A2"), request()) as plan:
        assert (plan.num_erased, plan.num_new) == (4, 2)
    enrich(catalog, "r1", listed("A1", "A2"))
    assert uris() == [other, other]
    found = catalog.verify(listed("A1", "A2"), {})
    assert (found.is_sound, found.num_erased) == (True, 4)
    assert not any(".jpg" in everything_of(path) for path in stones(root))
    # Named by its id it stays, and that is said.
    (root.parent / "ids.txt").write_text(first["image_id"][0].as_py())
    assert run(["erase", str(root), "--ids", str(root.parent / "ids.txt"), "--lift", "--yes"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("0 images may come back with the next run stays away until its address is lifted")
    assert run([*command, "--uri=mem://no-such", "--lift", "--yes"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said == "2 images may come back with the next run was not erased by this address or id: mem://no-such"
    enrich(catalog, "r2", listed("A1", "A2"))
    assert uris() == sorted(addresses * 2)


def stones(root: Path) -> list[Path]:
    return list((root / "tombstones").iterdir())


@pytest.mark.parametrize("turn", [1, 2])
def test_an_erasure_by_address_inside_a_commit_wins(
    catalog: Catalog, root: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """Of images with keys, which only the run at work knows: it erases them by their ids too."""
    start(catalog, "r1")
    written = write(catalog, "r1", [references(["a"]), references(NAMES, "k1"), references(["secret"], "k2")])
    other = Catalog.open(config_of(root))
    nobody = pa.array([], pa.binary(16))
    at_write(monkeypatch, turn, lambda: other.erase(nobody, ["mem://secret"]))
    done = catalog.commit("r1", written)
    monkeypatch.undo()
    assert (done.num_added, done.num_erased) == (3, 2)
    catalog.runs.finish("r1", {})
    assert other.erase(nobody, ["mem://secret"]).is_complete
    hidden = (image_id("secret", "k1"), image_id("secret", "k2"))
    assert [path for path in files(root) if any(id_ in everything_of(root / path) for id_ in hidden)] == [
        f"tombstones/{path.name}" for path in stones(root) if hidden[0] in everything_of(path)
    ]
    assert catalog.embeddings().num_rows == 6


def test_what_a_dead_run_wrote_of_an_address_goes(catalog: Catalog, root: Path) -> None:
    start(catalog, "dead")
    written = write(catalog, "dead", [references(NAMES, "k1")])
    catalog.commit("dead", written.filter(pc.equal(written["table"], "embeddings")))
    let_die(root, "dead")
    result = catalog.erase(pa.array([], pa.binary(16)), ["mem://secret"])
    assert (result.is_complete, result.num_images, result.num_vectors) == (True, 1, 2)
    assert "mem://secret" not in everything(root)
    secret = image_id("secret", "k1")
    assert all(secret not in everything_of(root / path) for path in files(root) if "tombstones" not in path)


def test_tombstones_of_before_addresses_hold(catalog: Catalog, root: Path) -> None:
    catalog.erase(key("secret"))
    (stone,) = stones(root)
    pq.write_table(pq.read_table(stone).drop_columns(["address"]), stone)
    enrich(Catalog.open(config_of(root)), "r0", [references(NAMES)])
    assert sorted(rows_by_name(catalog)) == ["a", "b"]


class Terminal(io.StringIO):
    """What somebody types."""

    def isatty(self) -> bool:
        return True


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_on_a_store(s3_server: S3Server) -> None:
    config = CatalogConfig(uri=f"s3://{s3_server.make_bucket()}/catalog", storage=s3_server.storage)
    catalog = Catalog.open_or_create(config, pa.schema([]))
    enrich(catalog, "r0", [references(NAMES)])
    enrich(catalog, "r1", [references(NAMES, version="v2")])
    result = catalog.erase(key("secret"))
    assert result.is_complete
    assert result.num_files >= 3
    assert sorted(rows_by_name(catalog)) == ["a", "b"]
