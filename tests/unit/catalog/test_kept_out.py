"""A catalog that another user keeps to himself: never taken for one that is not there, which would be begun anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from obstore.exceptions import GenericError

from tests.catalog_samples import config_of
from vlmflow.catalog import Catalog
from vlmflow.errors import StorageAccessError
from vlmflow.storage import access_error


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user with a umask of 077; not by its permissions, which mean nothing to root."""
    place, stat = tmp_path / "catalog", Path.stat

    def refused(path: Path, **options: bool) -> object:
        if path != place and path.is_relative_to(place):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    return place


def test_it_is_refused(kept: Path) -> None:
    for ask in (Catalog.open, Catalog.exists):
        with pytest.raises(StorageAccessError, match=f"{kept} refuses this user") as told:
            ask(config_of(kept))
        assert "permissions" in told.value.remedy


@pytest.mark.parametrize(
    "said",
    [
        "Generic LocalFileSystem error: Unable to open file {}: Permission denied (os error 13)\n\nDebug source: ...",
        "Generic LocalFileSystem error: Unable to open file {}#1: Permission denied (os error 13)",
        "Generic LocalFileSystem error: Unable to walk dir: IO error for operation on {}: Permission denied "
        "(os error 13)",
        "Kernel error -> Generic LocalFileSystem error\n  \x1b[31m↳\x1b[0m Unable to open file {}\n"
        "   \x1b[31m↳\x1b[0m Permission denied (os error 13)\n",
    ],
)
def test_what_refuses_is_named(said: str) -> None:
    error = access_error(GenericError(said.format("/data/my catalog/runs/r 1.json")), "/data/my catalog")
    assert str(error) == "/data/my catalog refuses this user: /data/my catalog/runs/r 1.json"
