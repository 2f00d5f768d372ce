"""Whether a run may write to a catalog on a local disk: told before it loads a model, and nothing is left."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.writable import check_writable
from vlmflow.config import CatalogConfig
from vlmflow.errors import StorageAccessError, StoreLostError

FOLDERS = ("images/_delta_log", "embeddings/_delta_log", "runs", "policies", "reviews")
NOBODY = 65534


@pytest.fixture
def catalog() -> Iterator[Path]:
    """A catalog's folders, all of which this process may write, where others can reach them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        catalog = Path(name, "catalog")
        for folder in FOLDERS:
            (catalog / folder).mkdir(parents=True)
        for folder in (catalog, *catalog.rglob("*")):
            folder.chmod(0o777)
        yield catalog


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind: root writes everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def folder_of(path: Path) -> Folder:
    return Folder(CatalogConfig(uri=str(path)))


@pytest.mark.parametrize("below", [".", "images", "images/_delta_log", "embeddings/_delta_log", "runs", "policies"])
def test_a_folder_that_a_run_writes_to_and_may_not_is_named(catalog: Path, below: str) -> None:
    (catalog / below).chmod(0o555)
    with unprivileged(), pytest.raises(StorageAccessError) as caught:
        check_writable(folder_of(catalog))
    assert str(caught.value) == f"{catalog} cannot be written: {catalog / below}: Permission denied"
    assert "permissions" in caught.value.remedy


def test_one_that_may_not_be_looked_into_is_told_of_in_our_words(catalog: Path) -> None:
    (catalog / "images").chmod(0)
    with unprivileged(), pytest.raises(StorageAccessError, match=r"catalog cannot be written: \S+: Permission denied$"):
        check_writable(folder_of(catalog))


def test_a_folder_that_no_run_writes_to_is_not_asked_for(catalog: Path) -> None:
    (catalog / "reviews").chmod(0o555)
    with unprivileged():
        check_writable(folder_of(catalog))


@pytest.mark.parametrize("name", ["", "new", "deep/new"])
def test_nothing_is_left_of_the_look(catalog: Path, name: str) -> None:
    before = sorted(catalog.rglob("*"))
    check_writable(folder_of(catalog / name))
    assert sorted(catalog.rglob("*")) == before


def test_where_a_catalog_cannot_be_made_is_told(catalog: Path) -> None:
    catalog.chmod(0o555)
    with unprivileged(), pytest.raises(StorageAccessError) as caught:
        check_writable(folder_of(catalog / "deep" / "new"))
    assert str(caught.value) == f"{catalog}/deep/new cannot be written: {catalog}: Permission denied"


@pytest.mark.parametrize("below", [".", "images"])
def test_a_link_that_leads_nowhere_is_named(catalog: Path, below: str) -> None:
    """As to a disk that is not mounted: no folder can be made in its place."""
    link = catalog / "linked" / below
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(catalog / "unmounted")
    with pytest.raises(StorageAccessError) as caught:
        check_writable(folder_of(catalog / "linked"))
    assert str(caught.value) == f"{catalog}/linked cannot be written: {link}: No such file or directory"


def test_a_full_disk_is_said_to_be_full(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StoreLostError, match="no space is left"):
        check_writable(folder_of(catalog))
