"""Stores that say little, or nothing: which failures are of an object, and which of the store."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from tests.s3 import CREDENTIALS
from vlmflow.config import ImageLimits, SourceConfig, StorageConfig
from vlmflow.errors import RowErrorClass, StoreLostError, TransientError
from vlmflow.schema import REFERENCE
from vlmflow.sources.manifest import ManifestSource
from vlmflow.sources.stores import CONCURRENT_REQUESTS, Stores


class Store:
    """Gives the objects whose names hold ``good``, and refuses everything else as one that must not be listed does."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.is_silent = threading.Event()
        self.refuses_all = self.lists = self.stalls = False
        self.code = "AccessDenied"
        self.ended = threading.Event()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.num_requests += 1
        if self.is_silent.is_set():
            self.ended.wait()
            return
        good = "good" in request.path and not self.refuses_all
        data = b"image" if good else f"<Error><Code>{self.code}</Code></Error>".encode()
        if self.lists and "list-type" in request.path:
            good, data = True, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
        ranged = good and request.headers["Range"]
        request.send_response(206 if ranged else 200 if good else 403)
        if ranged:  # the client goes on where a body broke off: here at its beginning
            request.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
        request.send_header("ETag", '"e"')
        request.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET" and self.stalls and "good" in request.path:
            self.ended.wait()
        elif request.command == "GET":
            request.wfile.write(data)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def source(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ManifestSource]]:
    """Makes the source of a manifest of objects in the store."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            store.answer(self)

        do_HEAD = do_GET  # noqa: N815  a name of the library

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"

    def make(names: list[str], timeout_s: float = 60.0) -> ManifestSource:
        storage = StorageConfig(endpoint=endpoint, region="us-east-1", timeout_s=timeout_s, max_retries=1)
        path = tmp_path / "images.csv"
        path.write_text("uri\n" + "".join(f"s3://bucket/{name}\n" for name in names))
        return ManifestSource(SourceConfig(uri=str(path), storage=storage))

    yield make
    store.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()


def listed(source: ManifestSource) -> pa.Table:
    return pa.Table.from_batches(list(source.list()), REFERENCE)


def test_an_object_that_is_gone_costs_its_row_where_the_store_may_be_read_and_not_listed(
    store: Store, source: Callable[..., ManifestSource]
) -> None:
    opened = source(["good.jpg", "gone.jpg"])
    rows, reader = listed(opened), opened.reader(ImageLimits())
    (gone,) = reader.read(rows.slice(1))
    assert gone.error_class is RowErrorClass.ACCESS_DENIED
    store.refuses_all = True
    with pytest.raises(StoreLostError, match="refused the credentials"):
        reader.read(rows.slice(1))


def test_a_store_that_falls_silent_is_given_up_before_every_image_was_waited_for(
    store: Store, source: Callable[..., ManifestSource]
) -> None:
    names = [f"good{number}.jpg" for number in range(8 * CONCURRENT_REQUESTS)]
    rows = listed(source(names))
    opened = source(names, timeout_s=0.4)  # which nothing answers: the first had all the time that it needed
    store.is_silent.set()
    store.num_requests = 0
    with pytest.raises(StoreLostError, match="does not answer in time"):
        opened.reader(ImageLimits()).read(rows)
    assert store.num_requests <= len(names)  # asked twice each, and that seven times, they would be 14 times as many
    with pytest.raises(TransientError, match="does not answer in time"):
        listed(opened)


@pytest.mark.parametrize("code", ["AccessDenied", "KMS.DisabledException"])
def test_a_store_that_lists_what_it_does_not_give_any_more_is_lost(
    store: Store, source: Callable[..., ManifestSource], code: str
) -> None:
    store.lists, store.code = True, code
    opened = source(["good1.jpg", "good2.jpg", "good3.jpg"])
    rows = listed(opened)
    store.refuses_all = True
    (refused,) = opened.reader(ImageLimits()).read(rows.slice(2))
    assert refused.error_class is RowErrorClass.ACCESS_DENIED, "it has given none: these may be the refused ones"
    store.refuses_all = False
    assert opened.reader(ImageLimits()).read(rows.slice(0, 1))[0].data == b"image"
    store.refuses_all = True
    with pytest.raises(StoreLostError, match="s3://bucket refused the credentials"):
        # Another reader, as for each of Ray's tasks: it is the process that knows what was read.
        pickle.loads(pickle.dumps(opened.reader(ImageLimits()))).read(rows.slice(1))


def test_objects_that_are_refused_or_gone_cost_their_rows_where_the_store_gives_another(
    store: Store, source: Callable[..., ManifestSource]
) -> None:
    store.lists = True
    opened = source(["good.jpg", "other.jpg"])
    rows, reader = listed(opened), opened.reader(ImageLimits())
    assert reader.read(rows.slice(0, 1))[0].data == b"image"
    assert reader.read(rows.slice(1))[0].error_class is RowErrorClass.ACCESS_DENIED


def test_a_store_that_stalls_in_every_body_is_given_up_after_two_waits(
    store: Store, source: Callable[..., ManifestSource]
) -> None:
    store.lists = True
    names = [f"good{number}.jpg" for number in range(16 * CONCURRENT_REQUESTS)]
    rows = listed(source(names))
    opened = source(names, timeout_s=0.4)  # in which no body comes; what does come had all the time that it needed
    Stores(opened._config.storage).has_read("s3://bucket/good0.jpg")
    store.stalls, store.num_requests = True, 0
    with pytest.raises(StoreLostError, match="does not answer in time"):
        opened.reader(ImageLimits()).read(rows)
    # Twice each of those that were under way when the first had failed, and as many after them meanwhile: of all of
    # them twice each, less than half.
    assert store.num_requests <= len(names)
