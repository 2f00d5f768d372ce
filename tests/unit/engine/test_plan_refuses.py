"""What a run would refuse, its planning does: before a cluster starts, and whether or not there is a catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmflow.config import load_job
from vlmflow.engine import plan
from vlmflow.errors import CatalogError, SourceError, VlmflowError


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        ({"uri": "photos", "text_column": "title"}, SourceError, "a folder of images has no columns"),
        ({"uri": "list.csv"}, CatalogError, "'Title' and 'title' differ by case only"),
    ],
)
def test_columns_that_no_catalog_takes(
    source: dict[str, Any], error: type[VlmflowError], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"x")
    (tmp_path / "list.csv").write_text("uri,Title,title\nphotos/a.jpg,a,b\n")
    given = {"source": source, "catalog": {"uri": "catalog"}, "profile": "starter", "tasks": ["embed"]}
    with pytest.raises(error, match=told):
        plan(load_job(None, given))
    assert not (tmp_path / "catalog").exists()
