"""A local folder as a source."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import (
    ConfigError,
    EmptySourceError,
    RowErrorClass,
    SourceError,
    StorageAccessError,
    StoreLostError,
    TransientError,
)
from vlmflow.schema import REFERENCE
from vlmflow.sources import Source, open_source

HARD_NAMES = ["a b.jpg", "Grüße.jpg", "100%.jpg", "%20.jpg", "h#1", "q?x=1.jpg", "sub/dir/x.jpg", "back\\slash", "a\nb"]


def table(source: Source) -> pa.Table:
    """All references of a source."""
    batches = list(source.list())
    for batch in batches:
        assert batch.num_rows > 0
        batch.validate(full=True)
    return pa.Table.from_batches(batches)


def write(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_every_file_is_listed_under_its_own_name_and_read(tmp_path: Path) -> None:
    write(tmp_path, HARD_NAMES)
    source = open_source(SourceConfig(uri=str(tmp_path)))
    refs = table(source)
    assert refs.schema == REFERENCE
    assert len(source.columns) == 0
    assert set(refs["uri"].to_pylist()) == {str(tmp_path / name) for name in HARD_NAMES}
    assert len(set(refs["image_id"].to_pylist())) == len(HARD_NAMES)
    reader = pickle.loads(pickle.dumps(source.reader(ImageLimits())))
    for uri, size, version, fetched in zip(
        *(refs[name].to_pylist() for name in ("uri", "size_bytes", "object_version")), reader.read(refs), strict=True
    ):
        assert fetched.data == Path(uri).read_bytes()
        assert len(fetched.data) == size
        assert fetched.object_version == version


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, ["a.jpg", ".DS_Store", "_SUCCESS", ".git/x", "_delta_log/0.json", "in/.x", "in/b.jpg", "c_d.e"])
    uris = table(open_source(SourceConfig(uri=str(tmp_path))))["uri"].to_pylist()
    assert [os.path.relpath(uri, tmp_path) for uri in uris] == ["a.jpg", "c_d.e", "in/b.jpg"]


def test_what_a_camera_names_with_an_underscore_is_listed(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            "_DSC0001.JPG",
            "in/_MG_2.jpeg",
            "in/_x.heic",
            "in/_y.HIF",
            "._DSC0001.JPG",
            "_x.json",
            "_x.jpg.tmp",
            "_.jpg/a.jpg",
        ],
    )
    uris = table(open_source(SourceConfig(uri=str(tmp_path))))["uri"].to_pylist()
    assert [os.path.relpath(uri, tmp_path) for uri in uris] == [
        "_DSC0001.JPG",
        "in/_MG_2.jpeg",
        "in/_x.heic",
        "in/_y.HIF",
    ]


def test_an_empty_file_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    source = open_source(SourceConfig(uri=str(tmp_path)))
    refs = table(source)
    assert refs["size_bytes"].to_pylist() == [0]
    assert source.reader(ImageLimits()).read(refs)[0].data == b""


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "images", ["a.jpg"])
    write(tmp_path / "elsewhere", ["b.jpg"])
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/linked.jpg").symlink_to(tmp_path / "elsewhere/b.jpg")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "images")
    (tmp_path / "images/nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "images/pipe")
    source = open_source(SourceConfig(uri=str(tmp_path / "images")))
    refs = table(source)
    names = [os.path.relpath(uri, tmp_path / "images") for uri in refs["uri"].to_pylist()]
    assert names == ["a.jpg", "linked/b.jpg", "linked.jpg", "nowhere.jpg"]
    assert [fetched.error_class for fetched in source.reader(ImageLimits()).read(refs)] == [
        None,
        None,
        None,
        RowErrorClass.MISSING,
    ]


def test_a_large_folder_is_listed_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmflow.sources.listing.BATCH_ROWS", 10)
    write(tmp_path, [f"{index:02}.jpg" for index in range(25)])
    sizes = [batch.num_rows for batch in open_source(SourceConfig(uri=str(tmp_path))).list()]
    assert sizes == [10, 10, 5]


def test_a_version_moves_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"one")
    before = table(open_source(SourceConfig(uri=str(tmp_path))))["object_version"].to_pylist()
    again = table(open_source(SourceConfig(uri=str(tmp_path))))["object_version"].to_pylist()
    os.utime(path, (1, 1))
    after = table(open_source(SourceConfig(uri=str(tmp_path))))["object_version"].to_pylist()
    assert before == again != after


def test_an_empty_folder_is_an_error_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(EmptySourceError, match="holds no images") as caught:
        list(open_source(SourceConfig(uri=str(tmp_path))).list())
    assert "--allow-empty" in caught.value.remedy
    assert list(open_source(SourceConfig(uri=str(tmp_path), allow_empty=True)).list()) == []


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="gone does not exist"):
        list(open_source(SourceConfig(uri=str(tmp_path / "gone"))).list())
    (tmp_path / "a.jpg").touch()
    with pytest.raises(SourceError, match="is a file") as caught:
        list(open_source(SourceConfig(uri=str(tmp_path / "a.jpg"))).list())
    assert "Name its folder" in caught.value.remedy


def test_a_name_that_is_not_utf_8_stops_the_listing_and_is_shown(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/bad\xff.jpg", "wb"):  # noqa: PTH123 (a name in bytes)
        pass
    with pytest.raises(SourceError, match=r"bad\\xff\.jpg is not named in UTF-8"):
        list(open_source(SourceConfig(uri=str(tmp_path))).list())


def test_a_name_is_not_blamed_where_python_reads_none_in_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with LC_ALL=POSIX and PYTHONUTF8=0, where every letter beyond ASCII comes as that of a bad name."""
    (tmp_path / os.fsdecode(b"bad\xff.jpg")).touch()
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(SourceError, match="takes file names for ascii here") as caught:
        list(open_source(SourceConfig(uri=str(tmp_path))).list())
    assert "PYTHONUTF8=1" in caught.value.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(StorageAccessError, match="closed may not be listed"):
        list(open_source(SourceConfig(uri=str(tmp_path))).list())


def removing(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Removes what is in a folder right after the folder was looked into."""
    scandir = os.scandir

    @contextlib.contextmanager
    def scanned(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        if path == str(folder):
            for name in names:
                (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)
        yield found

    monkeypatch.setattr(os, "scandir", scanned)


def test_what_is_removed_while_it_is_listed_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["a.jpg", "b.jpg", "sub/c.jpg", "sub/dir/d.jpg", "z.jpg"])
    removing(monkeypatch, tmp_path, "b.jpg", "sub")
    uris = table(open_source(SourceConfig(uri=str(tmp_path))))["uri"].to_pylist()
    assert uris == [f"{tmp_path}/a.jpg", f"{tmp_path}/z.jpg"]


def test_a_folder_that_is_removed_between_its_parent_and_itself_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ["a.jpg", "sub/b.jpg"])
    scandir = os.scandir

    def scanned(path: str) -> object:
        if path == f"{tmp_path}/sub":
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scanned)
    assert table(open_source(SourceConfig(uri=str(tmp_path))))["uri"].to_pylist() == [f"{tmp_path}/a.jpg"]


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.ESTALE])
def test_a_mount_whose_server_is_gone_is_told_as_that(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ["sub/a.jpg"])
    scandir = os.scandir

    def scanned(path: str | Path) -> object:
        if str(path).endswith("sub"):
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scanned)
    with pytest.raises(TransientError, match=f"{tmp_path} cannot be read: {os.strerror(number)}") as caught:
        list(open_source(SourceConfig(uri=str(tmp_path))).list())
    assert "mounted" in caught.value.remedy


def test_a_file_that_is_gone_costs_its_row_and_a_folder_that_is_gone_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write(folder, ["a.jpg", "b.jpg"])
    source = open_source(SourceConfig(uri=str(folder)))
    refs, reader = table(source), source.reader(ImageLimits())
    (folder / "a.jpg").unlink()
    gone, there = reader.read(refs)
    assert (gone.error_class, gone.data) == (RowErrorClass.MISSING, None)
    assert str(tmp_path) not in gone.message
    assert there.data == b"b.jpg"
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(StoreLostError, match="is gone"):
        reader.read(refs)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, ["a.jpg"])
    source = open_source(SourceConfig(uri=str(tmp_path)))
    refs = table(source)
    (fetched,) = source.reader(ImageLimits(max_bytes=4)).read(refs)
    assert (fetched.error_class, fetched.message) == (
        RowErrorClass.TOO_MANY_BYTES,
        "5 bytes exceed limits.max_bytes of 4",
    )
    # Grown since it was listed.
    (tmp_path / "a.jpg").write_bytes(bytes(100))
    (fetched,) = source.reader(ImageLimits(max_bytes=50)).read(refs)
    assert fetched.error_class == RowErrorClass.TOO_MANY_BYTES


def test_a_store_that_is_not_known_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="ftp:// is not a store"):
        list(open_source(SourceConfig(uri="ftp://host/images")).list())
    with pytest.raises(ConfigError, match="names no bucket"):
        list(open_source(SourceConfig(uri="s3:///images")).list())
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        list(open_source(SourceConfig(uri="s3://key:secret@bucket/images")).list())
    assert "secret" not in str(caught.value)
