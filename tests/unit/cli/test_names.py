"""Names whose bytes are no UTF-8, which a command line may hold, and terminals that lack letters."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.report_samples import put_rows
from tests.terminal import run
from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig
from vlmflow.erasure import find_images
from vlmflow.errors import ConfigError, ExplainError
from vlmflow.explain import find_evidence
from vlmflow.search.query import Query
from vlmflow.search.searcher import search_images
from vlmflow.sources.uris import spelled
from vlmflow.storage import parse_address

NAME = "caf\udce9"  # as Python reads the bytes caf\xe9 of a command line
MEMBER, SIMILAR = "/p/a.tar#caf\\xe9.jpg", "/p/a.tar#caf?.jpg"


@pytest.fixture
def catalog(tmp_path: Path) -> CatalogConfig:
    """A member of a tar file as `enrich` spells it, and one whose name differs by a question mark."""
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a", "b"], uri=[MEMBER, SIMILAR])
    return config


def test_a_name_is_spelled_as_rows_have_it() -> None:
    assert spelled(f"{NAME}.jpg") == "caf\\xe9.jpg"
    assert spelled("café") == "café"
    spelled("half of a pair \ud83d").encode("utf-8")


def test_an_image_is_found_by_its_bytes_and_no_other_is(catalog: CatalogConfig) -> None:
    given = f"/p/a.tar#{NAME}.jpg"
    assert find_evidence(catalog, given).uri == MEMBER
    assert find_images(Catalog.open(catalog), [given], None).uris == (MEMBER,)
    assert [hit.uri for hit in search_images(catalog, Query(like=given)).hits] == [SIMILAR]
    for absent in (f"/p/{NAME}.jpg", f"https://host/{NAME}.jpg"):
        assert find_images(Catalog.open(catalog), [absent], None).num_rows == 0
        with pytest.raises(ExplainError, match="no image"):
            find_evidence(catalog, absent)
        with pytest.raises(ConfigError):
            search_images(catalog, Query(like=absent))


@pytest.mark.parametrize("command", [["show", NAME], ["plan", ".", NAME, "--profile", "starter", "--tasks", "embed"]])
def test_a_place_of_such_a_name_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command) == 2
    assert "is no UTF-8 - Rename it" in capsys.readouterr().err
    for uri in (NAME, f"s3://bucket/{NAME}", f"file:///{NAME}"):
        with pytest.raises(ConfigError, match="is no UTF-8"):
            parse_address(uri)


def test_a_terminal_without_a_letter_shows_its_number(catalog: CatalogConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    put_rows(catalog, ["c"], run="run-2", uri=["/p/café.jpg"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert run("explain", catalog.uri, "/p/café.jpg") == 0
    assert b"/p/caf\\xe9.jpg" in shown.getvalue()
