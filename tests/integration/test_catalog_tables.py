"""The tables of a catalog: who creates them, the caller's columns, versions, what the log holds."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.catalog_samples import constants, enrich, finish, on_both_stores, references, request, rows_by_name, write
from vlmflow.catalog import Catalog, plan_without_catalog
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.log import SCHEMA_VERSION, TableLog
from vlmflow.config import CatalogConfig
from vlmflow.errors import CatalogError, ConfigError, StorageAccessError

NAMES = [f"image {number}" for number in range(6)]


def test_a_place_that_cannot_hold_a_catalog_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CatalogError, match=f"{tmp_path}/file is a file"):
        Catalog.open_or_create(CatalogConfig(uri=str(tmp_path / "file")), pa.schema([]))


@on_both_stores
def test_a_folder_of_any_name_holds_a_catalog_unless_deltalake_cannot_read_it(config: CatalogConfig) -> None:
    hard = config.model_copy(update={"uri": f"{config.uri}/Grüße #1?x=50%"})
    catalog = Catalog.open_or_create(hard, pa.schema([]))
    enrich(catalog, "r1", [references(["a"])])
    assert list(rows_by_name(Catalog.open(hard))) == ["a"]
    for name in ("a%20b", "a%41b", "%e9"):
        refused = config.model_copy(update={"uri": f"{config.uri}/{name}"})
        with pytest.raises(ConfigError, match=f"{name}: Delta tables cannot lie in a folder with %"):
            Catalog.exists(refused)
        with pytest.raises(ConfigError, match="Delta tables cannot lie"):
            Catalog.open_or_create(refused, pa.schema([]))


def test_the_other_run_creates_the_tables_first(config: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = TableLog.exists.__func__  # type: ignore[attr-defined]
    answers = iter([False, True, False, True])
    Catalog.open_or_create(config, pa.schema([]))
    monkeypatch.setattr(TableLog, "exists", classmethod(lambda cls, *args: next(answers, None) or exists(cls, *args)))
    catalog = Catalog.open_or_create(config, pa.schema([]))
    assert enrich(catalog, "r1", [references(NAMES)]).num_added == len(NAMES)


def test_runs_planned_before_there_was_a_catalog_add_each_image_once(config: CatalogConfig) -> None:
    asked = request()
    results = []
    for run_id in ("r1", "r2"):
        with plan_without_catalog([references(NAMES)], asked) as plan:
            catalog = Catalog.open_or_create(config, pa.schema([]))
            writer = catalog.writer(constants(run_id, asked), plan.version)
            files = pa.concat_tables([writer.write(finish(rows)) for rows in plan.batches()])
        results.append(catalog.commit(run_id, files))
        assert catalog.commit(run_id, files).repeated
    assert [(result.num_added, result.num_dropped) for result in results] == [(6, 0), (0, 6)]
    assert len(rows_by_name(catalog)) == len(NAMES)


@on_both_stores
def test_the_callers_columns_grow_by_an_explicit_commit(config: CatalogConfig) -> None:
    title, brand = pa.field("title", pa.string()), pa.field("brand", pa.string())
    catalog = Catalog.open_or_create(config, pa.schema([title]))
    enrich(catalog, "r1", [references(["a"], source=[{"title": "A"}])])
    running = write(catalog, "r2", [references(["b"], source=[{"title": "B"}])])
    replacing = write(catalog, "r3", [references(["a"], source=[{"title": "A2"}], version="v2")])
    wider = Catalog.open_or_create(config, pa.schema([brand, title]))
    assert wider.source_columns == pa.schema([title, brand])
    enrich(wider, "r4", [references(["c"], source=[{"brand": "C", "title": None}])])
    catalog.commit("r2", running)  # written before there was a brand
    catalog.commit("r3", replacing)
    rows = {name: row["source"] for name, row in rows_by_name(catalog).items()}
    assert rows == {
        "a": {"title": "A2", "brand": None},
        "b": {"title": "B", "brand": None},
        "c": {"title": None, "brand": "C"},
    }
    version = wider.version
    assert Catalog.open_or_create(config, pa.schema([title])).version == version  # nothing to add


def test_the_first_caller_with_columns_adds_the_struct(config: CatalogConfig) -> None:
    enrich(Catalog.open_or_create(config, pa.schema([])), "r1", [references(["a"])])
    catalog = Catalog.open_or_create(config, pa.schema([("title", pa.string())]))
    enrich(catalog, "r2", [references(["b"], source=[{"title": "B"}])])
    assert {name: row["source"] for name, row in rows_by_name(catalog).items()} == {"a": None, "b": {"title": "B"}}


def test_a_column_of_another_type_stops_before_anything_is_written(config: CatalogConfig) -> None:
    catalog = Catalog.open_or_create(config, pa.schema([("price", pa.int64())]))
    version = catalog.version
    with pytest.raises(CatalogError, match="'price' is string"):
        Catalog.open_or_create(config, pa.schema([("price", pa.string())]))
    assert catalog.version == version


def test_a_catalog_of_another_version_is_refused(config: CatalogConfig) -> None:
    catalog = Catalog.open_or_create(config, pa.schema([]))
    catalog._images.table.alter.set_table_properties({"vlmflow.schemaVersion": "9"}, raise_if_not_exists=False)
    with pytest.raises(CatalogError, match=f"schema version 9, not {SCHEMA_VERSION}") as raised:
        Catalog.open(config)
    assert "release" in raised.value.remedy


@on_both_stores
def test_no_catalog_and_no_bucket_are_told_apart(config: CatalogConfig) -> None:
    with pytest.raises(CatalogError, match="no catalog at"):
        Catalog.open(config)
    assert not Catalog.exists(config)
    if config.uri.startswith("s3:"):
        nowhere = config.model_copy(update={"uri": "s3://there-is-no-such-bucket/catalog"})
        with pytest.raises(StorageAccessError, match="does not exist"):
            Catalog.open_or_create(nowhere, pa.schema([]))


def test_the_log_keeps_numbers_and_ids_but_no_text(catalog: Catalog, config: CatalogConfig) -> None:
    enrich(catalog, "r1", [references(NAMES, text="a secret text")], caption="a secret caption")
    enrich(catalog, "r2", [references(NAMES, text="a secret text", version="v2")], content="two")
    catalog.compact("r3")
    folder = Folder(config)
    for file in folder.list("images/_delta_log"):
        log = folder.read(file.path) or b""
        assert b"secret" not in log
        assert b"mem://" not in log
    (action,) = pa.table(catalog._images.table.get_add_actions(flatten=True)).to_pylist()
    assert action["num_records"] == len(NAMES)
    assert (action["min.width"], action["max.width"]) == (8, 8)
