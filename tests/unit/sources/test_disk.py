"""A disk that goes away in mid-run: it ends the run, where a file that fails costs its row."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import RowErrorClass, StoreLostError
from vlmflow.sources import Source, open_source


class Disk:
    """Fails for everything below a folder with an error number, as a mount does whose server is gone."""

    def __init__(self, folder: Path, number: int, *, lists: bool) -> None:
        self.folder, self.number = folder, number
        self._open, self._scandir, self._lists = Path.open, os.scandir, lists

    def _check(self, path: Any) -> None:
        if Path(path).is_relative_to(self.folder):
            raise OSError(self.number, os.strerror(self.number), str(path))

    def fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def opened(path: Path, *arguments: Any, **options: Any) -> Any:
            self._check(path)
            return self._open(path, *arguments, **options)

        def scanned(path: Any) -> Any:
            if not self._lists:
                self._check(path)
            return self._scandir(path)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "scandir", scanned)


def listed(source: Source) -> pa.Table:
    return pa.Table.from_batches(list(source.list()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mount point with images."""
    folder = tmp_path / "mounted/images"
    folder.mkdir(parents=True)
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    return folder.parent


@pytest.fixture
def by_manifest(folder: Path, tmp_path: Path) -> Source:
    """The images in a manifest on another disk."""
    path = tmp_path / "lists/images.csv"
    path.parent.mkdir()
    path.write_text("uri\n" + "".join(f"{folder}/images/{name}.jpg\n" for name in "abcd"))
    return open_source(SourceConfig(uri=str(path)))


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_mount_that_is_out_of_reach_ends_the_run(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    Disk(folder, number, lists=False).fail(monkeypatch)
    with pytest.raises(StoreLostError, match=os.strerror(number)) as caught:
        source.reader(ImageLimits()).read(rows)
    assert "committed stays" in caught.value.remedy


def test_what_is_unmounted_leaves_an_empty_folder_and_ends_the_run(folder: Path) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    shutil.rmtree(folder / "images")
    with pytest.raises(StoreLostError, match="mounted is empty"):
        source.reader(ImageLimits()).read(rows)


def test_a_disk_that_lists_what_it_does_not_give_any_more_ends_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    assert source.reader(ImageLimits()).read(rows.slice(0, 1))[0].data == b"a"
    Disk(folder, errno.EACCES, lists=True).fail(monkeypatch)
    with pytest.raises(StoreLostError, match=r"a\.jpg was read before and cannot be now: Permission denied"):
        source.reader(ImageLimits()).read(rows.slice(1))


def test_files_that_were_refused_from_the_first_cost_their_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    Disk(folder / "images", errno.EACCES, lists=True).fail(monkeypatch)
    read = source.reader(ImageLimits()).read(rows)
    assert {item.error_class for item in read} == {RowErrorClass.ACCESS_DENIED}


def test_images_of_a_manifest_are_missed_as_a_disk_only_where_one_was_read(by_manifest: Source, folder: Path) -> None:
    rows, reader = listed(by_manifest), by_manifest.reader(ImageLimits())
    (folder / "images/a.jpg").unlink()
    assert reader.read(rows.slice(0, 1))[0].error_class is RowErrorClass.MISSING
    assert reader.read(rows.slice(1, 1))[0].data == b"b"
    (folder / "images/b.jpg").unlink()
    assert reader.read(rows.slice(0, 2))[0].error_class is RowErrorClass.MISSING, "others are there"
    shutil.rmtree(folder / "images")
    with pytest.raises(StoreLostError, match=r"b\.jpg, which was read before, is gone"):
        by_manifest.reader(ImageLimits()).read(rows.slice(2))
