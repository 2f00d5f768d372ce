"""Logs of tables that are damaged: told at once, for it does not pass, and never read as fewer rows."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from tests.catalog_samples import config_of, enrich, open_catalog, references, request
from vlmflow import retry
from vlmflow.catalog import Catalog
from vlmflow.errors import CatalogError
from vlmflow.storage import passes


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of one image, whose row was replaced once: three versions."""
    place = tmp_path_factory.mktemp("sample") / "catalog"
    catalog = open_catalog(place)
    enrich(catalog, "r1", [references(["a"])])
    newer = request(("caption",), fingerprints={"caption": "caption-2"})
    assert enrich(catalog, "r2", [references(["a"])], newer, caption="a dog").num_replaced == 1
    return place


@pytest.fixture
def log(sample: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sample, tmp_path / "catalog") / "images/_delta_log"


def opened(log: Path) -> Catalog:
    return Catalog.open(config_of(log.parents[1]))


@pytest.mark.parametrize(("number", "may_go"), [(1, False), (2, True)])
def test_an_empty_commit_is_named(log: Path, number: int, may_go: bool) -> None:
    """As a loss of power leaves it. To deltalake it says nothing: a row would be gone, or a replaced one back."""
    entry = log / f"{number:020d}.json"
    entry.write_bytes(b"")
    with pytest.raises(CatalogError, match=rf"images/_delta_log/{entry.name} is empty: the log is damaged") as told:
        opened(log)
    assert ("delete it" in told.value.remedy) == may_go
    if may_go:
        entry.unlink()
        assert opened(log).images(["uri"]).num_rows == 1


def test_one_that_is_just_being_written_is_waited_for(log: Path) -> None:
    """As Spark writes on a disk: it makes the file, and fills it then."""
    entry = log / f"{2:020d}.json"
    text = entry.read_text()
    entry.write_text("")
    writer = threading.Timer(0.2, entry.write_text, [text])
    writer.start()
    assert opened(log).images(["caption"])["caption"].to_pylist() == ["a dog"]
    writer.join()


def test_one_that_a_checkpoint_holds_does_not_matter(log: Path) -> None:
    DeltaTable(str(log.parent)).create_checkpoint()
    (log / f"{1:020d}.json").write_bytes(b"")
    assert opened(log).images(["uri"]).num_rows == 1


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[: len(text) // 2],
    "no JSON": lambda _: "nothing of the kind",
    "another type": lambda text: re.sub(r'"size":\d+', '"size":"x"', text),
    "no protocol": lambda text: "\n".join(line for line in text.splitlines() if '"protocol"' not in line) + "\n",
    "no schema": lambda text: text.replace('\\"type\\":\\"struct\\"', '\\"type\\":\\"strukt\\"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_is_told_at_once_with_what_to_do(log: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    for entry in log.glob("*.json"):
        entry.write_text(DAMAGES[damage](entry.read_text()))
    with pytest.raises(CatalogError, match="table images cannot be read") as told:
        opened(log)
    assert "put `_delta_log` back from a copy" in told.value.remedy
    assert waits == []


def test_a_store_that_fails_while_a_log_is_read_may_pass() -> None:
    told = "Kernel error: Arrow error: External: Generic S3 error: Error performing GET http://s3/b/k in 1s: timed out"
    assert passes(DeltaError(told))
