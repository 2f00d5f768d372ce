"""What the README, its chapters and the help show can be done as it stands."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

import vlmflow
from tests.catalog_samples import DATE, config_of, open_catalog, references, request
from tests.catalog_samples import enrich as enrich_rows
from tests.search_samples import clustered, put
from vlmflow.cli.run import enrich
from vlmflow.config import load_job
from vlmflow.moderation.policy import load_policy, shipped_policies

ROOT = Path(vlmflow.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = sorted(path for room in ("vlmflow", "benchmarks", "deploy") for path in (ROOT / room).rglob("README.md"))
DOCUMENTS = [ROOT / "README.md", *(path for path in CHAPTERS if "starter" not in path.parts)]
ALL_TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
UNBOUND = [name for name in shipped_policies() if not load_policy(name).bindings]


@pytest.mark.parametrize("text", [README, vlmflow.__doc__, enrich.__doc__], ids=["README", "Python", "--help"])
def test_a_policy_that_is_bound_to_no_model_is_shown_with_what_lets_it_run(text: str) -> None:
    shown = list(re.finditer(rf"""policy(: |=["']| )({"|".join(UNBOUND)})\b(?! \w)""", text))
    assert shown
    for found in shown:
        assert re.search("accept.unbound", text[found.start() : found.end() + 200]), found[0]


def read_as_shown(catalog: Path) -> tuple[dict[str, Any], str]:
    """The names that the documented way of reading the tables of ``catalog`` leaves, and how it calls DuckDB."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", ALL_TEXT, re.DOTALL) if "embedded = " in block]
    names: dict[str, Any] = {}
    exec(block.replace("demo-catalog", config_of(catalog).uri), names)
    (call,) = re.findall(r"^duckdb\.read_parquet\(.*\)", block, re.MULTILINE)
    return names, call


def test_files_that_lack_columns_which_came_later_are_read_with_them(tmp_path: Path) -> None:
    """The night after the manifest has got a column."""
    title, price = ("title", pa.string()), ("price", pa.float64())
    enrich_rows(open_catalog(tmp_path, pa.schema([title])), "r1", [references(["a"], source=[{"title": "A"}])])
    listed, next_night = references(["b"], source=[{"title": "B", "price": 1.0}]), DATE + dt.timedelta(days=1)
    enrich_rows(open_catalog(tmp_path, pa.schema([title, price])), "r2", [listed], request(date=next_night))
    names, call = read_as_shown(tmp_path)
    for files in (names["files"], names["files"][::-1]):
        rows = eval(call, names | {"files": files}).order("uri").select("source", "ingest_date").fetchall()
        assert rows == [({"title": "A", "price": None}, DATE), ({"title": "B", "price": 1.0}, next_night)]


def test_vectors_are_joined_with_the_rows_that_refer_to_them(tmp_path: Path) -> None:
    vectors = clustered(3)
    put(tmp_path, ["a", "b", "c"], vectors, run="first")
    put(tmp_path, ["a", "b", "c"], vectors, run="first", with_rows=False)  # a killed run: the same once more
    put(tmp_path, ["a"], -vectors[:1], run="killed", with_rows=False)
    names = read_as_shown(tmp_path)[0]
    rows = names["embedded"].sort("uri").to_dicts()
    assert [row["uri"] for row in rows] == ["mem://a", "mem://b", "mem://c"]
    np.testing.assert_array_equal([row["vector"] for row in rows], vectors)


def test_job_files_of_the_readme_can_be_loaded(tmp_path: Path) -> None:
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", ALL_TEXT, re.DOTALL) if "source:" in block]
    assert len(blocks) == 3
    for block in blocks:
        (tmp_path / "job.yaml").write_text(block)
        assert load_job(tmp_path / "job.yaml", {}).source.uri == yaml.safe_load(block)["source"]["uri"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
        linked = (document.parent / target).resolve() if target else document
        assert linked.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], heading
