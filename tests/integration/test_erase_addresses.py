"""Erasure by address: under any key, before and after the catalog held it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references, request, rows_by_name, write
from tests.erasing import NAMES, at_write, everything, everything_of, key
from tests.integration.test_vacuum import files, let_die, start
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.catalog.keys import to_binary
from vlmflow.config import SourceConfig
from vlmflow.erasure import find_images
from vlmflow.sources import open_source
from vlmflow.sources.uris import ids_of_normalised


@pytest.fixture
def catalog(root: Path) -> Catalog:
    return open_catalog(root, pa.schema([("title", pa.string())]))


def test_an_address_without_a_row_is_named(catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enrich(catalog, "r0", [references(NAMES)])

    def said(*names: str) -> str:
        assert run("erase", str(root), *(f"--uri=mem://{name}" for name in names), "--yes") == 0
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
    assert run(*command, "--yes") == 0
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
    assert run("erase", str(root), "--ids", str(root.parent / "ids.txt"), "--lift", "--yes") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("0 images may come back with the next run stays away until its address is lifted")
    assert run(*command, "--uri=mem://no-such", "--lift", "--yes") == 0
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


@pytest.mark.parametrize("key_column", [None, "id"])
def test_what_was_erased_with_a_signature_in_its_address_stays_away(
    catalog: Catalog, root: Path, tmp_path: Path, key_column: str | None
) -> None:
    """Earlier versions knew the signatures of fewer services: those of others were a part of address and id."""
    url = "https://host.example/a.jpg?x-oss-signature=5ec7e7&x-oss-expires=9"
    (manifest := tmp_path / "list.csv").write_text(f"id,uri\n1,{url}\n2,https://host.example/b.jpg?x-oss-signature=1\n")
    source = open_source(SourceConfig(uri=str(manifest), key_column=key_column))
    before = to_binary(pa.array(ids_of_normalised([url], key_column and ["1"]), pa.string()))
    catalog.erase(before)
    with catalog.plan(source.list(), request()) as plan:
        assert (plan.num_erased, plan.num_listed) == (1, 1)
    assert catalog.verify(source.list(), {}).num_erased == 1
    catalog.lift(before)
    with catalog.plan(source.list(), request()) as plan:
        assert (plan.num_erased, plan.num_listed) == (0, 2)
    named = find_images(catalog, [url], None)
    catalog.erase(named.keys, named.uris)
    with catalog.plan(source.list(), request()) as plan:
        assert plan.num_erased == 1


def test_a_row_with_a_signature_in_its_address_is_found_by_it(
    catalog: Catalog, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://host.example/a.jpg?q-sign-algorithm=sha1&q-signature=5ec7e7"
    older = references(["a"])
    for column, value in (("image_id", *ids_of_normalised([url], None)), ("uri", url)):
        at = older.schema.get_field_index(column)
        older = older.set_column(at, older.schema.field(at), pa.array([value]))
    enrich(catalog, "r0", [older, references(["b"])])
    assert run("erase", str(root), f"--uri={url}", "--yes") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 row erased" in said
    assert "named had rows" not in said
    assert [row["uri"] for row in catalog.images().to_pylist()] == ["mem://b"]
    assert "q-signature" not in everything(root)
    assert run("erase", str(root), f"--uri={url}", "--lift", "--yes") == 0
    assert len(catalog.erased_keys) == 0
