"""Messages that no messenger took are kept: so many, for so long, and without what was erased."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import config_of, enrich, image_id, open_catalog, references
from tests.terminal import run
from vlmflow.catalog import messages
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import to_binary
from vlmflow.catalog.messages import MOST_KEPT, MessageStore
from vlmflow.errors import StorageAccessError


def subjects(store: MessageStore) -> list[str]:
    return [kept.message.subject for kept in store.left()]


def test_a_message_is_kept_until_it_is_dropped(tmp_path: Path) -> None:
    store = MessageStore(Folder(config_of(tmp_path)))
    assert store.left() == []
    began = dt.datetime.now(dt.UTC)
    store.keep("first", "b" * 5000)
    store.keep("second", "body")
    first, second = store.left()
    assert (first.message.subject, second.message.body) == ("first", "body")
    assert len(first.message.body) == 2000
    assert began <= first.message.at <= second.message.at
    store.drop(first)
    store.drop(first)  # another flow has
    assert subjects(store) == ["second"]


def test_no_more_than_so_many_are_kept_and_none_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = MessageStore(Folder(config_of(tmp_path)))
    for number in range(MOST_KEPT + 2):
        store.keep(f"message {number}", "body")
    assert subjects(store) == [f"message {number}" for number in range(2, MOST_KEPT + 2)]
    assert caplog.text.count("1 undelivered messages to people were given up") == 2
    monkeypatch.setattr(messages, "KEPT_FOR", dt.timedelta())
    assert store.left() == []
    store.give_up()
    assert [*Folder(config_of(tmp_path)).list("messages")] == []
    assert f"{MOST_KEPT} undelivered messages to people were given up" in caplog.text


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"at": 1, "subject": "s"}', b"\xff"])
def test_a_file_that_holds_no_message_is_passed_over(
    data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(config_of(tmp_path))
    store = MessageStore(folder)
    store.keep("first", "body")
    (kept,) = store.left()
    folder.write(kept.path, data)
    folder.write("messages/readme.txt", b"not ours")
    with caplog.at_level(logging.WARNING, "vlmflow"):
        assert store.left() == []
    assert kept.path in caplog.text


def test_what_was_erased_is_in_no_message(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    enrich(catalog, "r0", [references(["a", "secret"])])
    store = MessageStore(Folder(config_of(tmp_path)))
    store.keep("vlmflow: the catalog does not verify", "images with more than one row: mem://a, mem://secret")
    result = catalog.erase(to_binary(pa.array([image_id("secret")])))
    assert result.num_records == 1
    assert [kept.message.body for kept in store.left()] == ["images with more than one row: mem://a, <erased>"]


def test_show_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    open_catalog(tmp_path)
    uri = config_of(tmp_path).uri
    run("show", uri)
    assert "could not be sent" not in capsys.readouterr().out
    MessageStore(Folder(config_of(tmp_path))).keep("nightly [red] Failed", "2 images went in")
    run("show", uri)
    shown = capsys.readouterr().out
    assert "1 message could not be sent to people" in shown
    assert " UTC  nightly [red] Failed: 2 images went in" in shown


class Refusing:
    """A store that refuses some calls below ``messages/``, as one does to a role that may use other prefixes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        for name in names:
            self._refuse(monkeypatch, name, getattr(Folder, name))

    def _refuse(self, monkeypatch: pytest.MonkeyPatch, name: str, original: Callable[..., Any]) -> None:
        def call(folder: Folder, path: str, *given: Any) -> Any:
            if path.startswith(messages.MESSAGES):
                raise StorageAccessError("s3://shop refused the credentials")
            return original(folder, path, *given)

        monkeypatch.setattr(Folder, name, call)


def test_where_they_are_refused_show_goes_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    enrich(open_catalog(tmp_path), "r0", [references(["a"])])
    Refusing(monkeypatch, "list", "read")
    run("show", config_of(tmp_path).uri)
    assert "1 images, 2 vectors" in capsys.readouterr().out
    assert "whether messages/ keeps messages that nobody was sent is not known: s3://shop refused" in caplog.text


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (("list", "read"), "messages/ is not looked through for what is erased: s3://shop refused"),
        (("read",), "may name what is erased, and stays as it is: s3://shop refused"),
        (("write",), "may name what is erased, and stays as it is: s3://shop refused"),
    ],
)
def test_where_they_are_refused_all_else_is_erased(
    refused: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    catalog = open_catalog(tmp_path)
    enrich(catalog, "r0", [references(["a", "secret"])])
    catalog.runs.finish("told", {"message": "such as mem://secret"})
    MessageStore(Folder(config_of(tmp_path))).keep("nightly Failed", "such as mem://secret")
    with monkeypatch.context() as patched:
        Refusing(patched, *refused)
        result = catalog.erase(to_binary(pa.array([image_id("secret")])))
    assert told in caplog.text
    assert (result.num_rows, result.num_records, result.num_files > 0) == (1, 1, True)
    # A message that is known to be there holds the address as far as we know: the erasure is not finished.
    (message,) = [file.path for file in Folder(config_of(tmp_path)).list("messages")]
    assert result.failed == (() if "list" in refused else (message,))
    assert (catalog.runs.get("told") or {})["message"] == "such as <erased>"
    assert "erase by address with a role that may" in caplog.text
    again = catalog.erase(to_binary(pa.array([image_id("secret")])), ["mem://secret"])
    assert (again.num_records, again.is_complete) == (1, True)
