"""Verdicts beside runs: whoever commits first, a person's word on the bytes that are there decides."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.catalog_samples import (
    config_of,
    enrich,
    fingerprints,
    image_id,
    open_catalog,
    references,
    request,
    rows_by_name,
    write,
)
from tests.report_samples import put_rows
from vlmflow.catalog import Catalog
from vlmflow.catalog import commit as commit_module
from vlmflow.catalog import read as read_module
from vlmflow.catalog.due import PlanRequest
from vlmflow.catalog.folder import Folder
from vlmflow.catalog.known_images import KnownList
from vlmflow.catalog.reviews import EVENT, ReviewStore
from vlmflow.config import CatalogConfig
from vlmflow.errors import KnownImagesError
from vlmflow.known import add_list, remove_list
from vlmflow.moderation.verdicts import reviewed
from vlmflow.review import import_verdicts

NAMES = ["a", "b", "c"]
AT = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = open_catalog(tmp_path / "catalog")
    enrich(made, "r1", [references(NAMES)])
    return made


def say(catalog: Catalog, name: str, decision: str, *, content: str = "bytes", hours: int = 0) -> None:
    event = {
        "image_id": image_id(name),
        "content_hash": f"{content}-mem://{name}",
        "decision": decision,
        "reviewer": "ada",
        "at": AT + dt.timedelta(hours=hours),
    }
    catalog.reviews.add(pa.Table.from_pylist([event], schema=EVENT))


def newer_caption() -> PlanRequest:
    asked = request()
    return PlanRequest(**{**vars(asked), "fingerprints": fingerprints() | {"moderate": "another"}})


def decided(catalog: Catalog) -> dict[str, tuple[str, str | None]]:
    return {name: (row["decision"], row["decision_reason"]) for name, row in rows_by_name(catalog).items()}


def test_a_run_that_was_planned_before_a_verdict_keeps_it(catalog: Catalog) -> None:
    files = write(catalog, "r2", [references(NAMES)], newer_caption(), decision="review")
    say(catalog, "a", "block")
    assert catalog.apply_verdicts().num_changed == 1

    catalog.commit("r2", files)

    assert decided(catalog) == {"a": ("block", "verdict"), "b": ("review", "cat"), "c": ("review", "cat")}
    assert rows_by_name(catalog)["a"]["verdict"]["model_decision"] == "review"


def test_a_run_that_finds_other_bytes_drops_the_verdict(catalog: Catalog) -> None:
    say(catalog, "a", "block")
    catalog.apply_verdicts()
    enrich(catalog, "r2", [references(NAMES, version="v2")], content="others")
    assert decided(catalog)["a"] == ("allow", "cat")
    assert rows_by_name(catalog)["a"]["verdict"] is None
    # The old word waits for the old bytes.
    result = catalog.apply_verdicts()
    assert (result.num_changed, result.num_waiting) == (0, 1)
    enrich(catalog, "r3", [references(NAMES, version="v3")])
    assert catalog.apply_verdicts().num_changed == 1
    assert decided(catalog)["a"] == ("block", "verdict")


def test_an_import_that_died_between_verdicts_and_rows_is_finished_by_the_next(catalog: Catalog) -> None:
    say(catalog, "a", "block")
    say(catalog, "b", "review", hours=1)
    assert decided(catalog)["a"] == ("allow", "cat")
    assert catalog.apply_verdicts().num_changed == 2
    again = catalog.apply_verdicts()
    assert (again.num_changed, again.flips) == (0, {})


def test_verdicts_are_committed_though_another_thread_looks_for_a_newer_version(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the app: a night commits inside the verdicts' commit, and the poll moves the catalog's handle there.

    The night brings a column of the caller's, which stays in rows that are written anew for a verdict.
    """
    titles, columns = [{"title": name.upper()} for name in NAMES], pa.schema([("title", pa.string())])
    say(catalog, "a", "block")
    check = commit_module._check

    def a_night_and_a_poll(*args: Any) -> None:
        monkeypatch.setattr(commit_module, "_check", check)
        enrich(open_catalog(catalog.uri, columns), "r2", [references(NAMES, version="v2", source=titles)])
        assert catalog.version == 3
        check(*args)

    monkeypatch.setattr(commit_module, "_check", a_night_and_a_poll)
    assert catalog.apply_verdicts().num_changed == 1
    rows = rows_by_name(catalog)
    assert [(rows[name]["seen_version"], rows[name]["source"]) for name in NAMES] == [("v2", title) for title in titles]
    assert decided(catalog)["a"] == ("block", "verdict")


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, when: str, action: Callable[[Catalog], object], catalog: Catalog
) -> None:
    """Has another process do something once, when verdicts have been read, or when rows are put in place."""
    owner, name = {"read": (ReviewStore, "newest"), "swapped": (Catalog, "swap_images")}[when]
    original = getattr(owner, name)

    def beside(*args: Any) -> Any:
        out = original(*args) if when == "read" else None
        monkeypatch.setattr(owner, name, original)
        action(open_catalog(catalog.uri))
        return original(*args) if out is None else out

    monkeypatch.setattr(owner, name, beside)


@pytest.mark.parametrize("when", ["read", "swapped"])
def test_what_another_says_and_brings_in_meanwhile_stays(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def other(of: Catalog) -> None:
        say(of, "a", "block", hours=1)
        of.known_images.put(KnownList("two", "block", ("bytes-mem://b",)))
        assert of.apply_verdicts(lists_changed=True).num_changed == 3

    say(catalog, "a", "allow")
    catalog.known_images.put(KnownList("one", "block", ("bytes-mem://c",)))
    meanwhile(monkeypatch, when, other, catalog)
    result = catalog.apply_verdicts(lists_changed=True)
    assert (result.num_changed, result.num_waiting) == (0, 0)
    assert {name: row["verdict"]["reviewer"] for name, row in rows_by_name(catalog).items()} == {
        "a": "ada",
        "b": "list:two",
        "c": "list:one",
    }
    assert {decision for decision, _ in decided(catalog).values()} == {"block"}


@pytest.mark.parametrize("when", ["read", "swapped"])
def test_what_is_taken_back_before_rows_show_it_is_not_in_them(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Who takes it back finds the rows as they should be, and changes nothing."""

    def taken_back(of: Catalog) -> None:
        say(of, "a", "none", hours=1)
        of.known_images.put(banned)
        assert of.apply_verdicts(lists_changed=True).num_changed == 0

    banned = KnownList("banned", "block", ("bytes-mem://b",))
    catalog.known_images.put(banned)
    catalog.apply_verdicts(lists_changed=True)
    catalog.known_images.remove("banned")
    say(catalog, "a", "review")
    meanwhile(monkeypatch, when, taken_back, catalog)
    catalog.apply_verdicts(lists_changed=True)
    assert decided(catalog) == {"a": ("allow", "cat"), "b": ("block", "verdict"), "c": ("allow", "cat")}


def test_files_of_verdicts_are_read_by_two_threads_at_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    say(catalog, "a", "block")
    assert len(catalog.reviews.files()) == 1
    say(catalog, "b", "block")
    original = Folder.read_parquet

    def beside_one_that_listed_earlier(self: Folder, path: str, columns: object = None) -> pa.Table:
        catalog.reviews._files._read = {}
        return original(self, path, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "read_parquet", beside_one_that_listed_earlier)
    assert len(catalog.reviews.files()) == 2


def test_lists_and_people(catalog: Catalog) -> None:
    hashes = tuple(f"bytes-mem://{name}" for name in NAMES)
    catalog.known_images.put(KnownList("banned", "block", hashes))
    catalog.apply_verdicts(lists_changed=True)
    assert {decision for decision, _ in decided(catalog).values()} == {"block"}
    say(catalog, "a", "allow")
    catalog.apply_verdicts()
    assert decided(catalog)["a"] == ("allow", "verdict")
    # Taken back: the list speaks again.
    say(catalog, "a", "none", hours=1)
    catalog.apply_verdicts()
    assert rows_by_name(catalog)["a"]["verdict"]["reviewer"] == "list:banned"
    catalog.known_images.remove("banned")
    catalog.apply_verdicts(lists_changed=True)
    assert decided(catalog) == dict.fromkeys(NAMES, ("allow", "cat"))


def test_a_list_that_was_removed_before_its_rows_were_decided_anew_is_removed_by_the_same_command(
    catalog: Catalog, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "catalog")
    add_list(config, "banned", "block", ["bytes-mem://a"])
    catalog.known_images.remove("banned")  # and the command was killed, or found no room for the rows
    assert decided(catalog)["a"][0] == "block"
    assert remove_list(config, "banned").num_changed == 1
    assert decided(catalog)["a"] == ("allow", "cat")
    with pytest.raises(KnownImagesError, match="'banned' is not in the catalog"):
        remove_list(config, "banned")


def test_compaction_and_verdicts_go_together(catalog: Catalog, tmp_path: Path) -> None:
    enrich(catalog, "r2", [references(["d"])])
    say(catalog, "d", "block")
    catalog.apply_verdicts()
    catalog.compact("r3")
    found: dict[str, Any] = rows_by_name(catalog)["d"]
    assert (found["decision"], found["verdict"]["reviewer"]) == ("block", "ada")


def test_verdicts_of_some_images_are_brought_in_by_looking_at_their_files_alone(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        enrich(catalog, f"r{number + 2}", [references([f"x{number}"])])
    for name in ("a", "x3", "x5"):
        say(catalog, name, "block")
    files = {row["uri"]: path for path, row in _rows_by_file(catalog)}
    read: list[str] = []
    original = Folder.read_parquet

    def noted(self: Folder, path: str, columns: object = None) -> pa.Table:
        read.append(path)
        return original(self, path, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "read_parquet", noted)
    monkeypatch.setattr(read_module, "_SMALL_BYTES", 0)  # of small files more are read ahead than there are here
    likely = [files["mem://x3"], files["mem://a"]]
    only = [image_id("a"), image_id("x3")]
    assert catalog.apply_verdicts(only=only, first=likely).num_changed == 2
    looked_at = {path for path in read if path.startswith("images/")}
    assert len(looked_at) <= 2 + 5  # and those that were read ahead
    assert decided(catalog)["x5"] == ("allow", "cat")
    # Wrong about where they are: found all the same.
    assert catalog.apply_verdicts(only=[image_id("x5")], first=[files["mem://a"]]).num_changed == 1
    assert {decided(catalog)[name][0] for name in ("a", "x3", "x5")} == {"block"}


def _rows_by_file(catalog: Catalog) -> list[tuple[str, dict[str, Any]]]:
    folder = Folder(CatalogConfig(uri=catalog.uri))
    return [
        (path, row)
        for path in catalog.live_files("images")
        for row in folder.read_parquet(f"images/{path}", ["uri"]).to_pylist()
    ]


def test_what_was_said_of_a_label_can_be_taken_back(catalog: Catalog) -> None:
    event = {"image_id": image_id("a"), "content_hash": "bytes-mem://a", "reviewer": "ada", "label": "gun"}
    for hours, value in enumerate((True, False, None)):
        said = event | {"value": value, "at": AT + dt.timedelta(hours=hours)}
        catalog.reviews.add(pa.Table.from_pylist([said], schema=EVENT))
        found = [verdict.value for verdict in reviewed(catalog.reviews.events()).verdicts]
        assert found == ([] if value is None else [value])
    assert catalog.apply_verdicts().num_changed == 0


def test_a_row_says_when_a_verdict_or_a_list_last_changed_it(catalog: Catalog) -> None:
    """Readers who ask for what is newer than their last look get the block, and nothing twice."""

    def changed_by(action: Callable[[], object]) -> set[str]:
        before = {name: row["updated_at"] for name, row in rows_by_name(catalog).items()}
        action()
        for _ in range(2):  # brought in again, they change nothing
            catalog.apply_verdicts(lists_changed=True)
        return {name for name, row in rows_by_name(catalog).items() if row["updated_at"] > before[name]}

    assert changed_by(lambda: say(catalog, "a", "block")) == {"a"}
    assert changed_by(lambda: catalog.known_images.put(KnownList("banned", "block", ("bytes-mem://b",)))) == {"b"}
    assert changed_by(lambda: catalog.known_images.remove("banned")) == {"b"}
    assert changed_by(lambda: say(catalog, "a", "none", hours=1)) == {"a"}
    assert changed_by(lambda: None) == set()

    files = write(catalog, "r2", [references(NAMES)], newer_caption())
    assert changed_by(lambda: say(catalog, "c", "block")) == {"c"}
    assert changed_by(lambda: catalog.commit("r2", files)) == set(NAMES), "whenever they were staged"


def test_an_import_counts_as_new_what_it_brought_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a", "b"])
    files = [tmp_path / f"{name}.csv" for name in ("ada", "eve")]
    for file in files:
        file.write_text(f"uri,verdict,reviewer\nmem://a,block,{file.stem}\nmem://b,block,{file.stem}\n")
    adding = ReviewStore.add

    def add_second(self: ReviewStore, events: pa.Table) -> str:
        """Somebody else imports in between."""
        monkeypatch.setattr(ReviewStore, "add", adding)
        import_verdicts(config, files[1])
        return adding(self, events)

    monkeypatch.setattr(ReviewStore, "add", add_second)
    assert import_verdicts(config, files[0]).num_new == 2
    assert import_verdicts(config, str(files[0])).num_new == 0
