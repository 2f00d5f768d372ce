"""Counts and masks against the plain ones, what a new version costs, and one that cannot be read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.report_samples import label, labels_of, put_rows
from tests.search_samples import names
from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.config import CatalogConfig
from vlmflow.errors import TransientError
from vlmflow.search.searcher import Searcher
from vlmflow.web.facts import FactReader, Facts
from vlmflow.web.shelf import Shelf

LABELS = ("gun", "knife", "beer")


@pytest.fixture
def config(tmp_path: Path) -> CatalogConfig:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    random = np.random.default_rng(0)
    for part in range(3):
        decisions = random.choice(["allow", "review", "block"], 50).tolist()
        flags = [[label(name, 0.4, str(random.choice(["allow", "review"]))) for name in LABELS] for _ in range(50)]
        put_rows(
            config, names(50, 50 * part), run=f"run-{part}", decision=decisions, labels=labels_of(flags),
            status=random.choice(["ok", "partial", "failed"], 50).tolist(),
            errors=[[{"stage": "read", "class": "truncated", "message": ""}] if odd else None
                    for odd in random.integers(0, 2, 50).tolist()],
            text_itm=random.random(50),
        )  # fmt: skip
    return config


def read(config: CatalogConfig, reader: FactReader | None = None) -> tuple[Facts, list[dict[str, object]]]:
    live = Searcher(config).refresh()
    rows = [row for _, table in live.read(live.columns.names) for row in table.to_pylist()]
    return (reader or FactReader(Folder(config))).read(live.files), rows


def value_of(row: dict[str, object], facet: str) -> str:
    if facet == "error":
        errors = row["errors"]
        assert errors is None or isinstance(errors, list)
        return errors[0]["class"] if errors else ""
    return str(row[facet])


@pytest.mark.parametrize("facet", ["decision", "status", "error"])
def test_counts_and_masks_are_those_of_the_rows(config: CatalogConfig, facet: str) -> None:
    facts, rows = read(config)
    among = np.arange(len(rows)) % 3 > 0
    assert facts.counts(facet, None) == Counter(value_of(row, facet) for row in rows)
    some = [row for row, marked in zip(rows, among, strict=True) if marked]
    assert facts.counts(facet, among) == Counter(value_of(row, facet) for row in some)
    for value in facts.counts(facet, None):
        assert facts.mask(facet, [value]).tolist() == [value_of(row, facet) == value for row in rows]
    assert not facts.mask(facet, ["no such value"]).any()


def test_a_row_counts_for_each_label_that_flags_it(config: CatalogConfig) -> None:
    facts, rows = read(config)
    expected: Counter[str] = Counter()
    for row in rows:
        found = row["labels"]
        assert isinstance(found, list)
        expected.update(f"weapons/{one['label']}" for one in found if one["decision"] != "allow")
    assert facts.counts("label", None) == expected
    assert facts.mask("label", ["weapons/gun"]).sum() == expected["weapons/gun"]
    either = facts.mask("label", ["weapons/gun", "weapons/beer"])
    assert (either == (facts.mask("label", ["weapons/gun"]) | facts.mask("label", ["weapons/beer"]))).all()


def test_a_row_that_prompts_and_detectors_flag_for_one_label_counts_once(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    by_detectors = [label("gun", 0.9, "block") | {"detector": name} for name in ("one", "two")]
    flags = [[label("gun", 0.6, "review"), *by_detectors], [label("gun", 0.1, "allow"), by_detectors[0]], []]
    put_rows(config, names(3), decision=["block", "block", "allow"], labels=labels_of(flags))
    facts, _ = read(config)
    assert facts.counts("label", None) == {"weapons/gun": 2}
    assert facts.counts("label", np.array([True, False, True])) == {"weapons/gun": 1}
    assert facts.mask("label", ["weapons/gun"]).tolist() == [True, True, False]


def test_texts_are_ranked_by_cosines_where_no_row_has_a_match(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, names(3), text_itm=[None] * 3, text_itc=[0.3, None, -0.1])
    assert read(config)[0].match.tolist() == pytest.approx([0.3, np.inf, -0.1])
    put_rows(config, names(1, 3), run="run-2", text_itm=[0.5], text_itc=[0.2])
    assert sorted(read(config)[0].match.tolist()) == [0.5, np.inf, np.inf, np.inf]


def test_a_new_version_costs_the_reading_of_its_new_files(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = FactReader(Folder(config))
    read(config, reader)
    read_files: list[str] = []
    original = Folder.read_parquet

    def noted(self: Folder, path: str, columns: object = None) -> object:
        read_files.append(path)
        return original(self, path, columns)  # type: ignore[arg-type]

    put_rows(config, names(10, 500), run="run-9", decision=["block"] * 10)
    live = Searcher(config).refresh()
    monkeypatch.setattr(Folder, "read_parquet", noted)
    facts = reader.read(live.files)
    assert len(read_files) == 1
    assert len(facts) == len(live) == 160
    fresh = FactReader(Folder(config)).read(live.files)
    assert facts.counts("decision", None) == fresh.counts("decision", None)
    assert facts.counts("label", None) == fresh.counts("label", None)


@pytest.mark.parametrize("broken", [(FactReader, "read"), (Folder, "drop_copies")])
def test_a_version_that_is_not_read_to_its_end_is_not_searched_either(
    config: CatalogConfig, monkeypatch: pytest.MonkeyPatch, broken: tuple[type, str]
) -> None:
    shelf = Shelf(config)
    (row,) = shelf.rows(shelf.version, np.array([7]), ["image_id"])
    before, found, *_ = shelf.nearest(row["image_id"], lambda _: None, 5)
    put_rows(config, names(10, 500), run="run-9")

    def fail(*_: object) -> None:
        raise TransientError("the store is busy")

    with monkeypatch.context() as patch:
        patch.setattr(*broken, fail)
        with pytest.raises(TransientError):
            shelf.refresh()
    version, again, *_ = shelf.nearest(row["image_id"], lambda _: None, 5)
    assert version is before
    assert again.positions.tolist() == found.positions.tolist()
    assert len(shelf.refresh()) == 160
    assert shelf.nearest(row["image_id"], lambda _: None, 5)[2] == 159


def test_verdicts_are_laid_over_the_facts(config: CatalogConfig) -> None:
    facts, _ = read(config)
    changed = facts.with_verdicts({3: ("block", "person"), 7: ("allow", "nobody")})
    assert changed.mask("decision", ["block"])[3]
    assert changed.mask("verdict", ["person"]).sum() == 1
    assert changed.mask("decision", ["allow"])[7]
    assert facts.counts("verdict", None) == {"nobody": 150}


def test_an_empty_catalog_has_no_facts(tmp_path: Path) -> None:
    import pyarrow as pa

    config = CatalogConfig(uri=str(tmp_path / "empty"))
    Catalog.open_or_create(config, pa.schema([]))
    facts = FactReader(Folder(config)).read([])
    assert len(facts) == 0
    assert facts.counts("decision", None) == {}
    assert facts.counts("label", np.zeros(0, bool)) == {}
