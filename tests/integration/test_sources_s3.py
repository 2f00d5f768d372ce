"""Sources on an S3-compatible server over HTTP: the same references and bytes as from the local disk."""

from __future__ import annotations

import gc
import http.server
import io
import os
import pickle
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from obstore.exceptions import AlreadyExistsError, PreconditionError

from tests.images import bad_images, good_images, write_corpus
from tests.s3 import CREDENTIALS, S3Server
from vlmflow.config import CatalogConfig, ImageLimits, SourceConfig, StorageConfig
from vlmflow.delta_table import delta_storage_options
from vlmflow.errors import (
    EmptySourceError,
    RowErrorClass,
    SourceError,
    StorageAccessError,
    StoreLostError,
    TransientError,
    WorkspaceError,
)
from vlmflow.schema import REFERENCE, with_source
from vlmflow.sources import open_source
from vlmflow.sources.again import RowReader
from vlmflow.sources.manifest import ManifestSource
from vlmflow.sources.stores import Stores
from vlmflow.storage import access_error, open_store, read_bytes

LIMITS = ImageLimits()
HARD_NAMES = ["a b.jpg", "Grüße.jpg", "100%.jpg", "%20.jpg", "h#1", "q?x=1&y=+.jpg", "sub/dir/x.jpg", "back\\slash"]


def references(config: SourceConfig) -> pa.Table:
    source = open_source(config)
    return pa.Table.from_batches(list(source.list()), with_source(REFERENCE, source.columns))


def read(config: SourceConfig, refs: pa.Table, limits: ImageLimits = LIMITS) -> list[Any]:
    return pickle.loads(pickle.dumps(open_source(config).reader(limits))).read(refs)


def by_name(config: SourceConfig) -> dict[str, tuple[int, bytes | None, bool]]:
    """Of every image its size, its bytes, and whether the version listed is the version read."""
    refs = references(config)
    names = [uri.removeprefix(config.uri).lstrip("/") for uri in refs["uri"].to_pylist()]
    rows = zip(names, refs["size_bytes"].to_pylist(), refs["object_version"].to_pylist(), strict=True)
    return {
        name: (size, item.data, item.object_version == version)
        for (name, size, version), item in zip(rows, read(config, refs), strict=True)
    }


def test_a_prefix_gives_the_same_as_the_folder(s3_server: S3Server, tmp_path: Path) -> None:
    folder = tmp_path / "im ages"
    write_corpus(folder)
    for name in [*HARD_NAMES, "_DSC0001.JPG", ".hidden", "_logs/x", "_x.jpg/x.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    bucket = s3_server.make_bucket()
    s3_server.upload(bucket, "some prefix/é", folder)
    s3_server.put(bucket, "some prefix/é/folder/", b"")  # as consoles create
    s3_server.put(bucket, "some prefix/é-not/x.jpg", b"x")
    local = by_name(SourceConfig(uri=str(folder)))
    stored = by_name(SourceConfig(uri=f"s3://{bucket}/some prefix/é", storage=s3_server.storage))
    assert stored == local
    assert len(local) == len(HARD_NAMES) + len(good_images()) + len(bad_images()) + 3
    assert local["empty.jpg"] == (0, b"", True)
    assert all(same for _, _, same in stored.values())


def test_a_whole_bucket_is_a_source_too(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    s3_server.put(bucket, "a/b.jpg", b"x")
    config = SourceConfig(uri=f"s3://{bucket}", storage=s3_server.storage)
    assert references(config)["uri"].to_pylist() == [f"s3://{bucket}/a/b.jpg"]


def test_an_empty_prefix_is_an_error(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    config = SourceConfig(uri=f"s3://{bucket}/nothing", storage=s3_server.storage)
    with pytest.raises(EmptySourceError, match="nothing holds no images"):
        references(config)
    assert list(open_source(config.model_copy(update={"allow_empty": True})).list()) == []


def test_a_missing_bucket_is_named_with_a_remedy(s3_server: S3Server) -> None:
    for uri in ("s3://no-such-bucket/images", "s3://no-such-bucket/list.csv", "s3://no-such-bucket/a.tar"):
        with pytest.raises((StorageAccessError, SourceError), match=r"no-such-bucket.*does not exist") as caught:
            references(SourceConfig(uri=uri, storage=s3_server.storage))
        assert caught.value.remedy
        assert caught.value.exit_code == 2


def test_a_name_that_obstore_cannot_express_is_shown(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    s3_server.put(bucket, "p/a//b.jpg", b"x")
    with pytest.raises(SourceError, match=r"holds a name that cannot be read: 'p/a//b\.jpg'"):
        references(SourceConfig(uri=f"s3://{bucket}/p", storage=s3_server.storage))


def test_an_object_that_is_gone_is_missing_and_a_bucket_that_is_gone_ends_the_run(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    for name in "abc":
        s3_server.put(bucket, f"p/{name}.jpg", name.encode())
    config = SourceConfig(uri=f"s3://{bucket}/p", storage=s3_server.storage)
    refs = references(config)
    s3_server.client.delete_object(Bucket=bucket, Key="p/b.jpg")
    s3_server.put(bucket, "p/c.jpg", b"new content")
    a, b, c = read(config, refs)
    assert (a.data, a.object_version) == (b"a", refs["object_version"][0].as_py())
    assert (b.data, b.error_class) == (None, RowErrorClass.MISSING)
    assert c.data == b"new content"
    assert c.object_version != refs["object_version"][2].as_py(), "the version is that of the bytes read"
    assert read(config, refs.slice(1, 1))[0].error_class == RowErrorClass.MISSING, "alone in its batch, too"
    for name in "ac":
        s3_server.client.delete_object(Bucket=bucket, Key=f"p/{name}.jpg")
    s3_server.client.delete_bucket(Bucket=bucket)
    with pytest.raises(StoreLostError, match=f"lost in mid-run: s3://{bucket} does not exist"):
        read(config, refs)


def test_an_object_that_has_grown_too_large_is_not_downloaded(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    s3_server.put(bucket, "p/a.jpg", b"small")
    config = SourceConfig(uri=f"s3://{bucket}/p", storage=s3_server.storage)
    refs = references(config)
    s3_server.put(bucket, "p/a.jpg", bytes(1_000))
    (item,) = read(config, refs, ImageLimits(max_bytes=100))
    assert (item.error_class, item.message) == (
        RowErrorClass.TOO_MANY_BYTES,
        "1,000 bytes exceed limits.max_bytes of 100",
    )


@pytest.mark.parametrize("extension", ["csv", "jsonl", "parquet"])
def test_a_manifest_in_a_bucket_is_read_and_its_images_too(s3_server: S3Server, extension: str, tmp_path: Path) -> None:
    bucket, other = s3_server.make_bucket(), s3_server.make_bucket()
    s3_server.put(bucket, "sets/images/a b.jpg", b"a")
    s3_server.put(other, "c.jpg", b"ccc")
    (tmp_path / "secret").write_bytes(b"of this machine")
    uris = ["images/a b.jpg", "images/gone.jpg", f"s3://{other}/c.jpg", f"{tmp_path}/secret"]
    rows = pa.table({"uri": uris, "title": ["A", "B", "C", "D"]})
    body = io.BytesIO()
    if extension == "csv":
        pa.csv.write_csv(rows, body)
    elif extension == "parquet":
        pq.write_table(rows, body)
    else:
        body.write("".join(f'{{"uri": "{uri}"}}\n' for uri in uris).encode())
    s3_server.put(bucket, f"sets/list.{extension}", body.getvalue())
    config = SourceConfig(uri=f"s3://{bucket}/sets/list.{extension}", storage=s3_server.storage)
    refs = references(config)
    assert refs["uri"].to_pylist()[:2] == [
        f"s3://{bucket}/sets/images/a b.jpg",
        f"s3://{bucket}/sets/images/gone.jpg",
    ]
    assert refs["size_bytes"].to_pylist()[:3] == [1, None, 3]
    items = read(config, refs)
    assert [item.data for item in items] == [b"a", None, b"ccc", None]
    assert [item.error_class for item in items[1::2]] == [RowErrorClass.MISSING, RowErrorClass.ADDRESS_REFUSED]
    versions = refs["object_version"].to_pylist()
    assert [items[0].object_version, items[2].object_version] == [versions[0], versions[2]]


def test_the_copy_of_a_manifest_is_swept_up_and_a_full_disk_is_no_fault_of_the_store(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket = s3_server.make_bucket()
    s3_server.put(bucket, "list.csv", b"uri\na.jpg\n")
    source = ManifestSource(SourceConfig(uri=f"s3://{bucket}/list.csv", storage=s3_server.storage))
    assert source.columns.names == []
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("vlmflow-workspace-")
    with pytest.raises(WorkspaceError, match="No space left on device"):
        source._download(f"s3://{bucket}/list.csv", Path("/dev/full"))
    del source
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_of_a_bucket_that_is_not_there_stops_the_listing(s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri\ns3://no-such-bucket/a.jpg\n")
    config = SourceConfig(uri=str(tmp_path / "list.csv"), storage=s3_server.storage)
    with pytest.raises(StorageAccessError, match="s3://no-such-bucket does not exist"):
        references(config)


def test_shards_and_parquet_files_are_read_by_ranges(s3_server: S3Server, tmp_path: Path) -> None:
    bucket = s3_server.make_bucket()
    images = {f"{index:03}.jpg": os.urandom(40_000) for index in range(20)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.table({"image": list(images.values())}), tmp_path / "b.parquet", row_group_size=6)
    s3_server.upload(bucket, "p", tmp_path)
    for name in ("a.tar", "b.parquet"):
        local = SourceConfig(uri=str(tmp_path / name))
        stored = SourceConfig(uri=f"s3://{bucket}/p/{name}", storage=s3_server.storage)
        refs = references(stored)
        columns = ["offset", "length", "row", "text", "size_bytes"]
        assert refs.select(columns) == references(local).select(columns)
        items = read(stored, refs)
        assert [item.data for item in items] == list(images.values())
        assert [item.object_version for item in items] == refs["object_version"].to_pylist()
        # Once more, by what rows of a catalog hold of them.
        catalog = CatalogConfig(uri=f"s3://{bucket}/catalog", storage=s3_server.storage)
        rows = list(zip(refs["uri"].to_pylist(), refs["object_version"].to_pylist(), strict=True))
        assert [item.data for item in RowReader(catalog, LIMITS).read(rows)] == list(images.values())
    # The shard is replaced between listing and reading.
    refs = references(SourceConfig(uri=f"s3://{bucket}/p/a.tar", storage=s3_server.storage))
    s3_server.put(bucket, "p/a.tar", b"something else" * 100_000)
    items = read(SourceConfig(uri=f"s3://{bucket}/p/a.tar", storage=s3_server.storage), refs)
    assert {item.error_class for item in items} == {RowErrorClass.READ_FAILED}


def test_a_file_that_is_replaced_while_it_is_read_is_told_as_that(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket()
    config = SourceConfig(uri=f"s3://{bucket}/a.tar", storage=s3_server.storage)
    s3_server.put(bucket, "a.tar", bytes(1 << 20))
    file, _ = Stores(s3_server.storage).open_file(config.uri)
    s3_server.put(bucket, "a.tar", b"x" * (1 << 20))
    monkeypatch.setattr("vlmflow.retry._delay_s", lambda _: pytest.fail("it does not pass"))
    with file, pytest.raises(PreconditionError) as caught:
        file.read(1)
    error = access_error(caught.value, config.uri)
    assert isinstance(error, SourceError)
    assert str(error) == f"{config.uri} was changed while it was read"


def test_the_catalog_can_use_the_same_settings(s3_server: S3Server) -> None:
    uri = f"s3://{s3_server.make_bucket()}/catalog/a b"
    options = delta_storage_options(s3_server.storage, uri)
    write_deltalake(f"{uri}/images", pa.table({"x": [1, 2]}), storage_options=options)
    assert DeltaTable(f"{uri}/images", storage_options=options).version() == 0
    store, path = open_store(uri, s3_server.storage)
    obstore.put(store, f"{path}/runs/1.json", b"{}", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, f"{path}/runs/1.json", b"{}", mode="create")
    assert read_bytes(f"{uri}/runs/1.json", s3_server.storage) == b"{}"
    with pytest.raises(SourceError, match="does not exist"):
        read_bytes(f"{uri}/runs/2.json", s3_server.storage)


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request as the server's ``answers`` say: by method and path prefix, else with ``status``."""

    def do_GET(self) -> None:
        status, body = self.server.answer(self.command, self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class RefusingServer(http.server.ThreadingHTTPServer):
    status = 403
    code = "AccessDenied"
    listing_works = False
    readable: tuple[str, ...] = ()
    pages: tuple[bytes, ...] = ()

    def answer(self, method: str, path: str) -> tuple[int, bytes]:
        if self.pages:
            return 200, self.pages[1 if "continuation-token=next" in path else 0]
        if any(path.endswith(name) for name in self.readable):
            return 200, b"data"
        if self.listing_works and "list-type" in path:
            return 200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
        return self.status, f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingServer]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vlmflow.retry._FIRST_DELAY_S", 0.01)  # as many attempts, which come sooner
    server = RefusingServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def storage_of(server: RefusingServer) -> StorageConfig:
    return StorageConfig(endpoint=f"http://127.0.0.1:{server.server_port}", timeout_s=60, max_retries=1)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "refused the credentials"),
        (403, "InvalidAccessKeyId", "refused the credentials"),
        (403, "SignatureDoesNotMatch", "refused the credentials"),
        (401, "Unauthorized", "refused the credentials"),
        (400, "ExpiredToken", "refused the credentials"),
        (404, "NoSuchBucket", "does not exist"),
        (301, "PermanentRedirect", "is in another region"),
    ],
)
def test_a_store_that_refuses_is_named_with_a_remedy(
    refusing: RefusingServer, status: int, code: str, message: str, tmp_path: Path
) -> None:
    refusing.status, refusing.code = status, code
    (tmp_path / "list.csv").write_text("uri\ns3://bucket/a.jpg\ns3://bucket/b.jpg\n")
    for uri in ("s3://bucket/images", str(tmp_path / "list.csv")):
        with pytest.raises(StorageAccessError, match=f"s3://bucket {message}") as caught:
            references(SourceConfig(uri=uri, storage=storage_of(refusing)))
        assert caught.value.remedy
        assert caught.value.exit_code == 2
        assert "testing" not in str(caught.value)


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests")])
def test_a_store_that_keeps_failing_is_a_transient_error(refusing: RefusingServer, status: int, code: str) -> None:
    refusing.status, refusing.code = status, code
    with pytest.raises(TransientError, match="out of reach or throttling, after all retries"):
        references(SourceConfig(uri="s3://bucket/images", storage=storage_of(refusing)))


def test_a_store_that_does_not_answer_is_a_transient_error(refusing: RefusingServer) -> None:
    storage = StorageConfig(endpoint="http://127.0.0.1:9", max_retries=1)
    with pytest.raises(TransientError, match="s3://bucket is out of reach"):
        references(SourceConfig(uri="s3://bucket/images", storage=storage))


def test_all_pages_of_a_listing_are_read(refusing: RefusingServer) -> None:
    contents = "".join(
        f"<Contents><Key>p/{name}.jpg</Key><Size>5</Size><ETag>&quot;tag&quot;</ETag>"
        "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        for name in "ab"
    )
    first = f"<ListBucketResult>{contents}<NextContinuationToken>next</NextContinuationToken></ListBucketResult>"
    refusing.pages = (
        first.encode(),
        first.replace("<Next", "<Not").replace("</Next", "</Not").replace("p/", "p/2").encode(),
    )
    refs = references(SourceConfig(uri="s3://bucket/p", storage=storage_of(refusing)))
    assert refs["uri"].to_pylist() == [f"s3://bucket/p/{name}.jpg" for name in ("a", "b", "2a", "2b")]
    assert refs["object_version"].to_pylist() == ["tag"] * 4


def stored_refs(*names: str) -> pa.Table:
    """References as they were listed before something happened to the store."""
    rows = [{"image_id": name, "uri": f"s3://bucket/p/{name}", "locator": f"s3://bucket/p/{name}"} for name in names]
    return pa.Table.from_pylist(rows, schema=REFERENCE)


def test_one_object_that_is_refused_costs_its_row(refusing: RefusingServer) -> None:
    config = SourceConfig(uri="s3://bucket/p", storage=storage_of(refusing))
    refusing.readable = ("a.jpg",)
    a, b = read(config, stored_refs("a.jpg", "b.jpg"))
    assert (a.data, b.error_class) == (b"data", RowErrorClass.ACCESS_DENIED)
    # Alone in its batch: the store still lists, so it is the object that is refused.
    refusing.listing_works = True
    (b,) = read(config, stored_refs("b.jpg"))
    assert b.error_class == RowErrorClass.ACCESS_DENIED
    refusing.status, refusing.code = 500, "InternalError"
    (b,) = read(config, stored_refs("b.jpg"))
    assert b.error_class == RowErrorClass.READ_FAILED


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (403, "ExpiredToken"), (503, "SlowDown")])
def test_a_store_that_withdraws_access_in_mid_run_ends_the_run(
    refusing: RefusingServer, status: int, code: str
) -> None:
    refusing.status, refusing.code = status, code
    with pytest.raises(StoreLostError, match="lost in mid-run") as caught:
        read(SourceConfig(uri="s3://bucket/p", storage=storage_of(refusing)), stored_refs("a.jpg", "b.jpg"))
    assert "What was committed stays" in caught.value.remedy
    assert caught.value.exit_code == 4
