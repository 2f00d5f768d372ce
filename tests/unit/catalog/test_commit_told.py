"""Writes to the tables that the store refuses are told in our words, in one line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from deltalake.exceptions import DeltaError

from tests.search_samples import clustered, names, put
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog import log as log_module
from vlmflow.errors import CatalogError, StorageAccessError, StoreLostError

FULL = "Generic LocalFileSystem error\n \x1b[31m↳\x1b[0m Unable to copy data\n No space left on device (os error 28)\n"
REFUSAL = "Generic LocalFileSystem error\n \x1b[31m↳\x1b[0m Unable to open file\n Read-only file system (os error 30)\n"


def test_a_refused_commit_is_told_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, names(2), clustered(2))

    def refuse(*_: object) -> None:
        raise DeltaError(REFUSAL)

    monkeypatch.setattr(commit_module, "_write", refuse)
    caplog.set_level(logging.INFO, "vlmflow")
    with pytest.raises(StorageAccessError, match="refuses this user"):
        put(tmp_path, names(2, 2), clustered(2), run="r1")
    told = [record.getMessage() for record in caplog.records if "looked at again" in record.getMessage()]
    assert told
    assert all("refuses this user" in line and not {"\n", "\x1b"} & set(line) for line in told)


def test_a_disk_that_is_full_before_there_is_a_table_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(FULL)

    monkeypatch.setattr(log_module, "_create", refuse)
    with pytest.raises(StoreLostError, match=r"^\S+: no space is left on the disk$"):
        put(tmp_path, names(2), clustered(2))


def test_what_deltalake_itself_cannot_do_is_no_store_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, names(2), clustered(2))

    def fail(*_: object) -> None:
        raise DeltaError("Invalid table version: 1")

    monkeypatch.setattr(commit_module, "_write", fail)
    with pytest.raises(CatalogError, match="table embeddings cannot be committed to: Invalid table version: 1"):
        put(tmp_path, names(2, 2), clustered(2), run="r1")
