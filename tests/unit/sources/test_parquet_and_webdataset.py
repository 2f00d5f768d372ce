"""Images inside larger files: tar shards, and Parquet columns of bytes."""

from __future__ import annotations

import datetime as dt
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.exceptions import GenericError

from vlmflow.config import CatalogConfig, ImageLimits, SourceConfig
from vlmflow.errors import EmptySourceError, RowErrorClass, SourceError, TransientError
from vlmflow.schema import REFERENCE, with_source
from vlmflow.sources import open_source, parquet_rows
from vlmflow.sources.again import Place, RowReader, place_of
from vlmflow.sources.stores import ObjectHead, Stores

BYTES = [b"one", b"two" * 50, b"", None, b"five"]


def references(path: Path, **options: Any) -> pa.Table:
    source = open_source(SourceConfig(uri=str(path), **options))
    return pa.Table.from_batches(list(source.list()), with_source(REFERENCE, source.columns))


def contents(path: Path, refs: pa.Table, **options: Any) -> list[bytes | RowErrorClass | None]:
    fetched = open_source(SourceConfig(uri=str(path), **options)).reader(ImageLimits()).read(refs)
    return [item.error_class if item.data is None else item.data for item in fetched]


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


SHARD = {
    "000.jpg": b"image 0",
    "000.txt": b"a caption\n",
    "000.json": json.dumps({"id": 0}).encode(),
    "001.left.jpg": b"left",
    "001.right.jpg": b"right",
    "001.cls": b"7",
    "002.txt": b"no image",
    ".hidden": b"x",
    "._004.jpg": b"x",
    "dir/_logs/x.jpg": b"x",
    "dir/_DSC0001.JPG": b"image 5",
    "dir/_DSC0001.txt": b"a camera's",
    "dir/._DSC0001.txt": b"x",
    "./dir/003.png": b"",
    f"{'long/' * 30}Grüße 004.webp": b"image 4",
}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_shard_lists_its_images_with_what_belongs_to_them(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", SHARD, format)
    refs = references(path)
    names = ["000.jpg", "001.left.jpg", "001.right.jpg", "dir/_DSC0001.JPG", "dir/003.png"]
    names.append(f"{'long/' * 30}Grüße 004.webp")
    assert refs["uri"].to_pylist() == [f"{path}#{name}" for name in names]
    assert refs["text"].to_pylist() == ["a caption", None, None, "a camera's", None, None]
    assert refs["source"].to_pylist()[:3] == [
        {"txt": "a caption", "json": '{"id": 0}', "cls": None},
        {"txt": None, "json": None, "cls": "7"},
        {"txt": None, "json": None, "cls": "7"},
    ]
    assert contents(path, refs) == [SHARD.get(name, b"") for name in names]
    assert len(set(refs["object_version"].to_pylist())) == 6


def test_all_shards_under_a_folder_are_listed(tmp_path: Path) -> None:
    for index in range(20):
        write_tar(tmp_path / f"{index:02}.tar", {f"{index}-{item}.jpg": b"x" for item in range(3)})
    (tmp_path / "README.md").touch()
    refs = references(tmp_path, kind="webdataset")
    assert refs.num_rows == 60
    assert refs["uri"].to_pylist() == sorted(refs["uri"].to_pylist())
    with pytest.raises(EmptySourceError):
        references(write_tar(tmp_path / "none.tar", {"a.txt": b"x"}))


def test_shards_that_are_compressed_are_not_left_out_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x"})
    for name in ("1.tar.gz", "2.TGZ"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    with caplog.at_level("WARNING", "vlmflow"):
        assert references(tmp_path, kind="webdataset").num_rows == 1
    assert f"2 compressed shards are left out, the first is {tmp_path / '1.tar.gz'}" in caplog.text
    with pytest.raises(EmptySourceError, match=r"holds no \.tar files"):
        references(tmp_path / "2.TGZ", kind="webdataset")


def test_the_version_of_a_member_moves_with_its_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", SHARD)
    refs = references(path)
    write_tar(path, {"new.jpg": b"first now", **SHARD})
    assert contents(path, refs)[0] == RowErrorClass.READ_FAILED, "the part may lie elsewhere"
    assert set(references(path)["object_version"].to_pylist()).isdisjoint(refs["object_version"].to_pylist())


def test_a_shard_that_is_not_whole_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": bytes(4000), "1.jpg": bytes(4000)})
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(SourceError, match=r"a\.tar is not a whole tar file"):
        references(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(SourceError, match=r"a\.tar is not a whole tar file"):
        references(path)
    with pytest.raises(SourceError, match=r"gone\.tar does not exist"):
        references(tmp_path / "gone.tar")


def test_no_damage_hides_the_images_behind_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number}.jpg": b"x" * 600 for number in range(4)}, tarfile.USTAR_FORMAT)
    whole, member, members = path.read_bytes(), 512 + 1024, 4 * (512 + 1024)
    bits = bytearray(whole)
    bits[2 * member + 5] ^= 0xFF
    hole = whole[:member] + bytes(512) + whole[member + 512 :]
    for damaged in (bytes(bits), hole, whole[: 3 * member + 200], whole[:members] + b"no header"):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"a\.tar is not a whole tar file: no header at byte"):
            references(path)
    # GNU tar takes these for whole: without blocks of zeros, with one, or with more behind them.
    for ended in (whole[:members], whole[: members + 512], whole[: members + 700], whole + whole):
        path.write_bytes(ended)
        assert references(path).num_rows == 4


def test_a_shard_with_one_name_twice_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"), io.BytesIO())
    with pytest.raises(SourceError, match=r"holds 0\.jpg twice"):
        references(path)


def test_names_that_a_local_shard_does_not_tell_apart_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds d/0\.jpg twice"):
        references(write_tar(tmp_path / "a.tar", {"d//0.jpg": b"x", "d/0.jpg": b"y"}))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_member_that_is_not_named_in_utf_8_is_an_image_like_any_other(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", {"caf\udce9.jpg": b"image", "caf\udce9.txt": b"a caf\xc3\xa9"}, format)
    refs = references(path)
    assert refs["uri"].to_pylist() == [f"{path}#caf\\xe9.jpg"]
    assert refs["text"].to_pylist() == ["a café"]
    assert contents(path, refs) == [b"image"]


def add_links(path: Path, links: dict[str, tuple[bytes, str]]) -> Path:
    with tarfile.open(path, "a") as tar:
        for name, (kind, target) in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    return path


def test_a_link_to_a_file_before_it_is_an_image_of_its_own(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"./d/0.jpg": b"image", "./d/0.txt": b"a caption"})
    hard, symbolic = tarfile.LNKTYPE, tarfile.SYMTYPE
    add_links(
        path, {"./d/1.jpg": (hard, "./d/0.jpg"), "./d/1.txt": (hard, "./d/0.txt"), "2.jpg": (symbolic, "d/1.jpg")}
    )
    add_links(path, {"e/3.jpg": (symbolic, "../d/0.jpg"), "e/.hidden": (symbolic, "nowhere")})
    refs = references(path)
    assert refs["uri"].to_pylist() == [f"{path}#{name}" for name in ("d/0.jpg", "d/1.jpg", "2.jpg", "e/3.jpg")]
    assert refs["text"].to_pylist() == ["a caption", "a caption", None, None]
    assert contents(path, refs) == [b"image"] * 4
    assert refs["size_bytes"].to_pylist() == [5] * 4


def test_members_named_from_beside_the_shard_are_no_hidden_files(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"../p/0.jpg": b"zero", "../p/0.txt": b"a caption", "d/./1.jpg": b"one"})
    hard, symbolic = tarfile.LNKTYPE, tarfile.SYMTYPE
    add_links(path, {"../p/2.jpg": (hard, "../p/0.jpg"), "../p/3.jpg": (symbolic, "0.jpg"), "../.p/4.jpg": (hard, "x")})
    refs = references(path)
    assert refs["uri"].to_pylist() == [f"{path}#{name}" for name in ("p/0.jpg", "d/1.jpg", "p/2.jpg", "p/3.jpg")]
    assert contents(path, refs) == [b"zero", b"one", b"zero", b"zero"]
    assert refs["text"].to_pylist() == ["a caption", None, None, None]


@pytest.mark.parametrize("target", ["gone.jpg", "../0.jpg", "d", "/d/0.jpg"])
def test_a_link_that_leads_to_no_file_is_named(tmp_path: Path, target: str) -> None:
    path = add_links(write_tar(tmp_path / "a.tar", {"d/0.jpg": b"x"}), {"d/1.jpg": (tarfile.SYMTYPE, target)})
    with pytest.raises(SourceError, match=rf"holds d/1\.jpg as a link to {target}, which is no file before it"):
        references(path)


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_sparse_file_is_named(tmp_path: Path, format: str) -> None:
    with (tmp_path / "0.bmp").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    command = ["tar", f"--format={format}", "--sparse", "-cf", "a.tar", "0.bmp"]
    subprocess.run(command, check=True, cwd=tmp_path)
    with pytest.raises(SourceError, match=r"holds 0\.bmp as a sparse file"):
        references(tmp_path / "a.tar")


def write_parquet(path: Path, bytes_type: str = "binary", **columns: list[Any]) -> Path:
    if bytes_type == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        image = pa.array([{"bytes": data, "path": "a.jpg"} for data in BYTES], kind)
    else:
        image = pa.array(BYTES, pa.large_binary() if bytes_type == "large_binary" else pa.binary())
    pq.write_table(pa.table({"image": image, **columns}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("bytes_type", ["binary", "large_binary", "struct"])
def test_a_column_of_bytes_lists_its_rows(tmp_path: Path, bytes_type: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", bytes_type, title=list("abcde"))
    refs = references(path, text_column="title")
    assert refs["uri"].to_pylist() == [f"{path}#{row}" for row in range(5)]
    assert refs["row"].to_pylist() == list(range(5))
    assert refs["text"].to_pylist() == list("abcde")
    assert refs["source"].to_pylist()[0] == {"title": "a"}
    expected = [b"one", b"two" * 50, b"", RowErrorClass.MISSING, b"five"]
    assert contents(path, refs) == expected
    assert contents(path, refs.take([4, 0, 3])) == [expected[4], expected[0], expected[3]]


def test_a_file_of_bytes_alone_lists_its_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    refs = references(path)
    assert refs.num_rows == 5
    assert refs.schema == REFERENCE
    assert contents(path, refs)[4] == b"five"


def test_images_are_known_by_their_uris_where_the_file_has_some(tmp_path: Path) -> None:
    uris = ["https://h/0.jpg?X-Amz-Signature=1", "1.jpg", "1.jpg", None, "4.jpg"]
    path = write_parquet(tmp_path / "a.parquet", uri=uris)
    refs = references(path)
    assert refs["uri"].to_pylist() == ["https://h/0.jpg", f"{tmp_path}/1.jpg", f"{path}#3", f"{tmp_path}/4.jpg"]
    assert refs["row"].to_pylist() == [0, 1, 3, 4], "the same uri twice is one image"
    assert contents(path, refs)[1] == b"two" * 50


def test_the_column_of_the_uris_may_be_the_text_too(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", uri=[f"{letter}.jpg" for letter in "abcde"])
    refs = references(path, text_column="uri")
    assert refs["text"].to_pylist() == [f"{letter}.jpg" for letter in "abcde"]
    assert "source" not in refs.column_names


def test_all_files_of_bytes_under_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        write_parquet(tmp_path / name, title=list("abcde"))
    refs = references(tmp_path, kind="parquet")
    assert refs.num_rows == 10
    assert contents(tmp_path, refs)[9] == b"five"
    write_parquet(tmp_path / "c.parquet")
    with pytest.raises(SourceError, match=r"c\.parquet has no column title"):
        references(tmp_path, kind="parquet")


def test_a_file_without_its_column_of_bytes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["text"], "uri": ["a.jpg"]}), path)
    with pytest.raises(SourceError, match=r"has no column image of image bytes; it has image \(string\)"):
        references(path, kind="parquet")
    assert references(path)["uri"].to_pylist() == [f"{tmp_path}/a.jpg"], "told from its columns, it is a manifest"


def test_a_file_with_another_type_of_column_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", price=[1, 2, 3, 4, 5], seen=[dt.datetime(2025, 1, 1)] * 5)
    assert references(tmp_path, kind="parquet").num_rows == 5
    times = pa.array([1_700_000_000_123_456_789] * 5, pa.timestamp("ns"))
    write_parquet(tmp_path / "1.parquet", price=[6] * 5, seen=times)
    assert references(tmp_path, kind="parquet").num_rows == 10, "times may be finer"
    write_parquet(tmp_path / "2.parquet", price=["much"] * 5, seen=times)
    with pytest.raises(SourceError, match=r"2\.parquet: column price \(string\) does not become int64"):
        references(tmp_path, kind="parquet")


def test_a_file_with_a_damaged_page_is_named_and_a_store_that_fails_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.parquet"
    images = [random.Random(number).randbytes(300) for number in range(1000)]
    table = pa.table({"price": [str(number) for number in range(1000)], "image": images})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    whole, refs = path.read_bytes(), references(path)
    start = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 60 + whole[start + 60 :])
    (image,) = open_source(SourceConfig(uri=str(path))).reader(ImageLimits()).read(refs.slice(0, 1))
    assert image.message == "the file is not Parquet, or is damaged"
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(SourceError, match=r"0\.parquet is not a Parquet file, or is damaged"):
        references(path)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() < 64:  # the footer can be read
                raise GenericError("Generic S3 error: HTTP error: request or response body error")
            return super().read(size)

    monkeypatch.setattr(Stores, "open_file", lambda *_: (Failing(whole), ObjectHead("v", len(whole))))
    with pytest.raises(TransientError, match="out of reach"):
        references(path)


def test_a_file_that_has_changed_since_it_was_listed_is_not_read_by_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    refs = references(path)
    write_parquet(path, "large_binary")
    assert set(contents(path, refs)) == {RowErrorClass.READ_FAILED}
    path.unlink()
    assert set(contents(path, refs, kind="parquet")) == {RowErrorClass.MISSING}


def again(refs: pa.Table, catalog: str) -> list[bytes | RowErrorClass | None]:
    """Reads images by what rows of a catalog hold of them."""
    rows = list(zip(refs["uri"].to_pylist(), refs["object_version"].to_pylist(), strict=True))
    fetched = RowReader(CatalogConfig(uri=catalog), ImageLimits()).read(rows)
    return [item.error_class if item.data is None else item.data for item in fetched]


def test_a_row_of_a_catalog_is_enough_to_read_its_image_again(tmp_path: Path) -> None:
    names = {"a#b.jpg": b"hash sign", "dir/c.tar#d.jpg": b"a name like ours", **SHARD}
    for path in (write_tar(tmp_path / "A#1.TAR", names), write_parquet(tmp_path / "a#1.parquet", title=list("abcde"))):
        refs = references(path)
        assert again(refs, str(tmp_path / "catalog")) == contents(path, refs)
        assert set(again(refs, "s3://bucket/catalog")) == {RowErrorClass.ADDRESS_REFUSED}, "of this disk"


def test_a_name_that_only_looks_like_a_part_is_that_of_a_whole(tmp_path: Path) -> None:
    assert place_of("/x/a.tar#b", "5-3-2") == Place("/x/a.tar", offset=3, length=2)
    assert place_of("/x/a.parquet#17", "5-3-11") == Place("/x/a.parquet", row=17)
    for uri, version in (("/x/a.tar#b", "5-3"), ("s3://x/a.parquet#17", "etag"), ("/x/a#17", "5-11"), ("/x/a", None)):
        assert place_of(uri, version) == Place(uri)
    path = tmp_path / "a.tar#b.jpg"
    path.write_bytes(b"whole")
    assert again(references(tmp_path), str(tmp_path)) == [b"whole"]


def test_a_column_of_bytes_of_any_name_is_found_again_and_a_large_row_group_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"picture": BYTES, "title": list("abcde")}), path)
    refs = references(path, bytes_column="picture")
    assert again(refs, str(tmp_path)) == contents(path, refs, bytes_column="picture")
    monkeypatch.setattr(parquet_rows, "_MAX_CELLS_MIB", 100 / 2**20)
    assert set(again(refs, str(tmp_path))) == {RowErrorClass.READ_FAILED}
    assert contents(path, refs, bytes_column="picture")[0] == b"one", "a run reads it whole"
    pq.write_table(pa.table({"picture": BYTES, "mask": BYTES}), path)
    assert set(again(references(path, bytes_column="mask"), str(tmp_path))) == {RowErrorClass.READ_FAILED}
