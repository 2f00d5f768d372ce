"""A disk that goes away in mid-run: it ends the run, where a file that fails costs its row."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmflow.config import ImageLimits, SourceConfig, SourceKind
from vlmflow.errors import RowErrorClass, StoreLostError
from vlmflow.sources import Source, disk, open_source
from vlmflow.sources.base import Reader


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


class Mount:
    """Gives a folder, and what is below it, the number of another disk, until it is unmounted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.device = folder, 4711
        self._stat = Path.stat

    def mount(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def stat(path: Path, **options: Any) -> os.stat_result:
            found = self._stat(path, **options)
            if self.device and path.is_relative_to(self.folder):
                reduced: Any = found.__reduce__()
                made, (values, names) = reduced
                numbered: os.stat_result = made((*values[:2], self.device, *values[3:]), names)
                return numbered
            return found

        monkeypatch.setattr(Path, "stat", stat)

    def unmount(self) -> None:
        """Leaves the folder on the disk that it is a mount point of, without anything in it."""
        self.device = 0
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def listed(source: Source) -> pa.Table:
    return pa.Table.from_batches(list(source.list()))


def in_another_process(reader: Reader) -> Reader:
    """The reader as a worker gets it that has not looked at anything before."""
    disk._FOLDERS.clear()
    disk._FILES.clear()
    sent: Reader = pickle.loads(pickle.dumps(reader))
    return sent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mount point with images."""
    folder = tmp_path / "mounted/images"
    folder.mkdir(parents=True)
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    return folder.parent


@pytest.fixture
def mount(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mount:
    made = Mount(folder)
    made.mount(monkeypatch)
    return made


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


def test_what_is_unmounted_leaves_a_folder_of_another_disk_and_ends_the_run(folder: Path, mount: Mount) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    assert source.reader(ImageLimits()).read(rows.slice(0, 1))[0].data == b"a"
    mount.unmount()
    with pytest.raises(StoreLostError, match="mounted is not on the disk that it was on: unmounted"):
        source.reader(ImageLimits()).read(rows.slice(1))
    folder.rmdir()
    with pytest.raises(StoreLostError, match="mounted is gone"):
        source.reader(ImageLimits()).read(rows.slice(1))


def test_a_disk_that_goes_before_anything_was_read_is_missed_where_its_folder_was_seen(
    folder: Path, mount: Mount
) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    (folder / "images/a.jpg").unlink()
    assert source.reader(ImageLimits()).read(rows.slice(0, 1))[0].error_class is RowErrorClass.MISSING
    mount.unmount()
    with pytest.raises(StoreLostError, match="unmounted"):
        source.reader(ImageLimits()).read(rows.slice(1))


def test_an_inbox_whose_last_image_is_moved_away_is_no_disk_that_is_lost(folder: Path) -> None:
    (folder / "images/a.jpg").rename(folder / "a.jpg")
    source = open_source(SourceConfig(uri=str(folder / "images")))
    rows = listed(source)
    for name in "bcd":
        (folder / f"images/{name}.jpg").unlink()
    read = source.reader(ImageLimits()).read(rows)
    assert [item.error_class for item in read] == [RowErrorClass.MISSING] * 3


def test_products_that_are_removed_with_their_folders_cost_their_rows(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "products.csv"
    path.write_text("uri\n" + "".join(f"{folder}/{name}/{name}.jpg\n" for name in "abc"))
    for name in "abc":
        (folder / name).mkdir()
        (folder / f"images/{name}.jpg").rename(folder / f"{name}/{name}.jpg")
    source = open_source(SourceConfig(uri=str(path)))
    rows = listed(source)
    assert source.reader(ImageLimits()).read(rows.slice(0, 1))[0].data == b"a"
    shutil.rmtree(folder)
    path.unlink()
    read = source.reader(ImageLimits()).read(rows.slice(1))
    assert [item.error_class for item in read] == [RowErrorClass.MISSING] * 2


def test_a_disk_that_links_lead_to_is_missed_and_a_link_that_is_removed_is_not(
    folder: Path, tmp_path: Path, mount: Mount
) -> None:
    (tmp_path / "links").mkdir()
    for name in "abcd":
        (tmp_path / f"links/{name}.jpg").symlink_to(folder / f"images/{name}.jpg")
    source = open_source(SourceConfig(uri=str(tmp_path / "links")))
    rows, reader = listed(source), source.reader(ImageLimits())
    assert reader.read(rows.slice(0, 1))[0].data == b"a"
    for name in "ab":
        (tmp_path / f"links/{name}.jpg").unlink()
    assert reader.read(rows.slice(1, 1))[0].error_class is RowErrorClass.MISSING
    mount.unmount()
    with pytest.raises(StoreLostError, match=r"images/a\.jpg, which was read before, is gone, and so is its disk"):
        reader.read(rows.slice(2))


def test_a_disk_that_was_mounted_again_may_have_another_number(
    folder: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_SEEN_FOR_S", 0.0)
    source = open_source(SourceConfig(uri=str(folder)))
    rows, reader = listed(source), source.reader(ImageLimits())
    reader.read(rows.slice(0, 1))
    mount.device += 1
    assert reader.read(rows.slice(1, 1))[0].data == b"b"
    for name in "bc":
        (folder / f"images/{name}.jpg").unlink()
    assert reader.read(rows.slice(2, 1))[0].error_class is RowErrorClass.MISSING


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


def test_what_a_disk_says_of_one_file_stands_in_its_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    Disk(folder / "images" / "b.jpg", errno.ENAMETOOLONG, lists=True).fail(monkeypatch)
    read = source.reader(ImageLimits()).read(rows)
    assert [item.data for item in read] == [b"a", None, b"c", b"d"]
    assert (read[1].error_class, read[1].message) == (
        RowErrorClass.READ_FAILED,
        "it cannot be read: File name too long",
    )


def test_images_of_a_manifest_are_missed_as_a_disk_only_where_one_was_read(
    by_manifest: Source, mount: Mount, folder: Path
) -> None:
    rows, reader = listed(by_manifest), by_manifest.reader(ImageLimits())
    (folder / "images/a.jpg").unlink()
    assert reader.read(rows.slice(0, 1))[0].error_class is RowErrorClass.MISSING
    assert reader.read(rows.slice(1, 1))[0].data == b"b"
    (folder / "images/b.jpg").unlink()
    assert reader.read(rows.slice(0, 2))[0].error_class is RowErrorClass.MISSING, "others are there"
    mount.unmount()
    with pytest.raises(StoreLostError, match=r"b\.jpg, which was read before, is gone, and so is its disk"):
        by_manifest.reader(ImageLimits()).read(rows.slice(2))


@pytest.mark.parametrize(
    ("uri", "kind"),
    [("", "auto"), ("images", "auto"), ("list.csv", "auto"), ("lists/list.csv", "auto"), ("", "parquet")],
)
def test_a_disk_that_is_not_there_when_a_worker_first_looks_is_missed(
    folder: Path, mount: Mount, uri: str, kind: SourceKind
) -> None:
    if uri.endswith("csv"):
        (folder / uri).parent.mkdir(exist_ok=True)
        (folder / uri).write_text("uri\n" + "".join(f"{folder}/images/{name}.jpg\n" for name in "abcd"))
    if kind == "parquet":
        pq.write_table(pa.table({"image": pa.array([b"a", b"b"])}), folder / "images.parquet")
    source = open_source(SourceConfig(uri=str(folder / uri), kind=kind, bytes_column="image"))
    rows = listed(source)
    mount.unmount()  # before there is a reader: models are loaded first
    reader = source.reader(ImageLimits())
    for _ in range(2):
        reader = in_another_process(reader)
        with pytest.raises(StoreLostError):
            reader.read(rows)
    folder.rmdir()
    with pytest.raises(StoreLostError):
        in_another_process(reader).read(rows)


def test_a_disk_that_is_a_part_of_the_one_planned_from_is_there(folder: Path, mount: Mount) -> None:
    """As in a container that was given one folder of it."""
    source = open_source(SourceConfig(uri=str(folder / "images")))
    rows, reader = listed(source), source.reader(ImageLimits())
    mount.folder = folder / "images"
    for name in "abcd":
        (folder / f"images/{name}.jpg").unlink()
    read = in_another_process(reader).read(rows)
    assert {item.error_class for item in read} == {RowErrorClass.MISSING}


def test_a_disk_that_holds_the_one_planned_from_is_there(folder: Path, mount: Mount) -> None:
    """As where planning ran in a container, or on a machine that mounts what this one serves from its own disk."""
    source = open_source(SourceConfig(uri=str(folder / "images")))
    rows, reader = listed(source), source.reader(ImageLimits())
    mount.device = 0
    (folder / "images/a.jpg").unlink()
    read = in_another_process(reader).read(rows.slice(0, 1))
    assert [item.error_class for item in read] == [RowErrorClass.MISSING]


def test_a_manifest_may_lie_on_a_disk_that_workers_do_not_have(folder: Path, mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"a")
    (folder / "lists").mkdir()
    path = folder / "lists/images.csv"
    path.write_text(f"uri\n{tmp_path}/images/a.jpg\n")
    source = open_source(SourceConfig(uri=str(path)))
    rows, reader = listed(source), source.reader(ImageLimits())
    mount.unmount()
    (tmp_path / "images/a.jpg").unlink()
    assert in_another_process(reader).read(rows)[0].error_class is RowErrorClass.MISSING


@pytest.mark.parametrize("kept", [True, False])
def test_a_disk_that_was_mounted_again_and_lacks_an_image_is_there(folder: Path, mount: Mount, kept: bool) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows, reader = listed(source), source.reader(ImageLimits())
    assert reader.read(rows.slice(0, 1))[0].data == b"a"
    mount.device += 1
    if not kept:  # nothing was read while the process saw the disk
        disk._FILES.clear()
    (folder / "images/b.jpg").unlink()
    for _ in range(2):
        read = reader.read(rows.slice(0, 3))
        assert [item.error_class for item in read] == [None, RowErrorClass.MISSING, None]
    mount.device += 1
    assert reader.read(rows.slice(1, 1))[0].error_class is RowErrorClass.MISSING
    mount.unmount()
    with pytest.raises(StoreLostError, match="unmounted"):
        reader.read(rows.slice(2))


def test_a_disk_that_only_this_machine_mounts_may_be_mounted_again(folder: Path, mount: Mount) -> None:
    """The machine that planned has the files on its own disk, so the reader knows of no mount point."""
    device, mount.device = mount.device, 0
    source = open_source(SourceConfig(uri=str(folder)))
    rows, reader = listed(source), source.reader(ImageLimits())
    mount.device = device
    assert in_another_process(reader).read(rows.slice(0, 1))[0].data == b"a"
    mount.device += 1
    (folder / "images/b.jpg").unlink()
    assert reader.read(rows.slice(1, 1))[0].error_class is RowErrorClass.MISSING
    mount.unmount()
    with pytest.raises(StoreLostError, match="unmounted"):
        reader.read(rows.slice(2))


def test_a_disk_that_comes_late_is_there(folder: Path, mount: Mount) -> None:
    source = open_source(SourceConfig(uri=str(folder)))
    rows = listed(source)
    (folder / "images/b.jpg").unlink()
    device, mount.device = mount.device, 0
    reader = in_another_process(source.reader(ImageLimits()))
    (folder / "images").rename(folder.parent / "away")
    with pytest.raises(StoreLostError, match="mounted"):
        reader.read(rows)
    mount.device = device
    (folder.parent / "away").rename(folder / "images")
    assert reader.read(rows.slice(1, 1))[0].error_class is RowErrorClass.MISSING
    assert reader.read(rows.slice(0, 1))[0].data == b"a"
