"""Verdicts given in the app: undo, labels, names, two people at once; asked without a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.web_samples import Served, by_id, flush, serving, shown_ids, small_catalog, text_of
from vlmflow.catalog import Catalog
from vlmflow.moderation.verdicts import reviewed

# Verdicts


def test_a_verdict_is_kept_at_once_and_in_the_row_after_the_next_writing(served: Served) -> None:
    browser = served.browser().review_as("ada")
    row = next(row for row in by_id(served).values() if row["decision"] == "review")
    answer = browser.judge(row, "block", reason="seen")
    assert answer.status_code == 200
    assert Catalog.open(served.config).reviews.newest()["decision"].to_pylist() == ["block"]
    page = browser.get(f"/image/{row['image_id']}").text
    assert "Verdict <b>block</b> by ada" in page
    assert row["image_id"] in shown_ids(browser.get("/?decision=block&verdict=person").text)
    assert row["image_id"] not in shown_ids(browser.get("/?decision=review").text)
    assert by_id(served)[row["image_id"]]["decision"] == "review"

    flush(served)

    after = by_id(served)[row["image_id"]]
    assert (after["decision"], after["decision_reason"]) == ("block", "verdict")
    assert (after["verdict"]["reviewer"], after["verdict"]["reason"]) == ("ada", "seen")
    assert after["verdict"]["content_hash"] == row["content_hash"]
    assert after["verdict"]["model_decision"] == "review"
    others = {key: value for key, value in by_id(served).items() if key != row["image_id"]}
    assert all(value["verdict"] is None for value in others.values())
    assert "Verdict <b>block</b> by ada" in browser.get(f"/image/{row['image_id']}").text
    assert row["image_id"] in shown_ids(browser.get("/?decision=block&verdict=person").text)


def test_what_waits_is_written_when_the_app_ends(tmp_path: Path) -> None:
    config = small_catalog(tmp_path)
    with serving(config) as served:
        rows = list(by_id(served).values())[:5]
        browser = served.browser().review_as("ada")
        for row in rows:
            assert browser.judge(row, "allow").status_code == 200
        version = Catalog.open(config).version
    after = by_id(served)
    assert {after[row["image_id"]]["decision"] for row in rows} == {"allow"}
    assert Catalog.open(config).version == version + 1  # one commit for all


def test_what_a_killed_app_had_kept_is_brought_into_the_rows_by_the_next(tmp_path: Path) -> None:
    import datetime as dt

    import pyarrow as pa

    from vlmflow.catalog.reviews import EVENT

    config = small_catalog(tmp_path)
    catalog = Catalog.open(config)
    row = catalog.images().to_pylist()[0]
    event = {"image_id": row["image_id"], "content_hash": row["content_hash"], "decision": "block"}
    said = event | {"reviewer": "ada", "at": dt.datetime.now(dt.UTC)}
    catalog.reviews.add(pa.Table.from_pylist([said], schema=EVENT))
    with serving(config) as served:
        pass
    assert by_id(served)[row["image_id"]]["decision"] == "block"
    version = catalog.version
    with serving(config):
        pass
    assert catalog.version == version


def test_rows_follow_by_themselves(tmp_path: Path) -> None:
    from tests.processes import wait_for

    with serving(small_catalog(tmp_path), every_s=0.01) as served:
        row = next(iter(by_id(served).values()))
        served.browser().review_as("ada").judge(row, "review")
        wait_for(lambda: by_id(served)[row["image_id"]]["verdict"] is not None, seconds=60)


def test_undo_takes_back_to_what_was_before(served: Served) -> None:
    browser = served.browser().review_as("ada")
    row = next(row for row in by_id(served).values() if row["decision"] == "allow")
    first = browser.judge(row, "block", labels={"gun": True})
    browser.judge(row, "review", seen=first.json()["seen"])
    assert browser.write("/undo", json={}).json()["message"].startswith("Undone")
    flush(served)
    assert by_id(served)[row["image_id"]]["decision"] == "block"
    assert browser.write("/undo", json={}).status_code == 200
    flush(served)
    after = by_id(served)[row["image_id"]]
    assert (after["decision"], after["verdict"]) == ("allow", None)
    assert row["image_id"] in shown_ids(browser.get("/?verdict=nobody").text)
    events = Catalog.open(served.config).reviews.events()
    assert events["decision"].drop_null().to_pylist() == ["block", "review", "block", "none"]
    assert reviewed(events).verdicts == []  # the word on the label is taken back too
    assert browser.write("/undo", json={}).status_code == 409


def test_undo_leaves_the_verdict_of_another_person_theirs(served: Served) -> None:
    ada, bob = served.browser().review_as("ada"), served.browser().review_as("bob")
    row = next(row for row in by_id(served).values() if row["decision"] == "block")
    seen = bob.judge(row, "allow", reason="a toy").json()["seen"]
    for _ in range(2):  # the note is not put twice
        seen = ada.judge(row, "block", labels={"gun": True}, seen=seen).json()["seen"]
        seen = ada.write("/undo", json={}).json()["seen"]
        flush(served)
        verdict = by_id(served)[row["image_id"]]["verdict"]
        said = (verdict["decision"], verdict["reviewer"], verdict["reason"])
        assert said == ("allow", "bob", "a toy (restored by ada)")
    assert served.desk.judging.labels_of(row["image_id"], row["content_hash"], "ada", ["gun"]) == {}
    # It is the verdict that bob gave: he can take it back.
    assert bob.write("/undo", json={}).status_code == 200
    flush(served)
    assert by_id(served)[row["image_id"]]["verdict"] is None
    assert Catalog.open(served.config).reviews.newest()["reviewer"].to_pylist() == ["bob"]


def test_undo_of_taking_back_leaves_the_verdict_theirs_too(served: Served) -> None:
    ada, bob = served.browser().review_as("ada"), served.browser().review_as("bob")
    row = next(row for row in by_id(served).values() if row["decision"] == "block")
    seen = bob.judge(row, "allow").json()["seen"]
    ada.judge(row, "none", seen=seen)
    ada.write("/undo", json={})
    newest = Catalog.open(served.config).reviews.newest().to_pylist()[0]
    assert (newest["decision"], newest["reviewer"], newest["reason"]) == ("allow", "bob", "(restored by ada)")
    # Whoever has bob's verdict on their page has seen what stands now.
    assert served.browser().review_as("eva").judge(row, "review", seen=seen).status_code == 200
    assert ada.write("/undo", json={}).status_code == 409
    assert bob.write("/undo", json={}).status_code == 409, "it is eva's now"


def test_only_a_verdict_that_stands_can_be_taken_back(served: Served) -> None:
    browser = served.browser().review_as("ada")
    row = next(row for row in by_id(served).values() if row["decision"] == "review")
    address, button = f"/image/{row['image_id']}", "Take the verdict back"
    given = browser.judge(row, "block").json()["seen"]
    assert button in browser.get(address).text
    undone = browser.write("/undo", json={}).json()["seen"]
    page = browser.get(address).text
    assert button not in page
    assert f'data-seen="{undone}"' in page
    for seen in (given, undone):
        assert "no verdict to take back" in browser.judge(row, "none", seen=seen).json()["message"]
    assert Catalog.open(served.config).reviews.events()["decision"].to_pylist() == ["block", "none"]


def test_labels_are_said_with_the_decision_and_feed_calibrate(served: Served) -> None:
    browser = served.browser().review_as("ada")
    row = next(iter(by_id(served).values()))
    browser.judge(row, "block", labels={"gun": True, "knife": False})
    browser.judge(row, None, labels={"knife": True})
    verdicts = reviewed(Catalog.open(served.config).reviews.events()).verdicts
    assert {(verdict.label, verdict.value) for verdict in verdicts} == {("gun", True), ("knife", True)}
    page = browser.get(f"/image/{row['image_id']}").text
    assert re.search(r'data-label="knife" data-said="yes"', page)
    assert re.search(r'data-label="knife" data-said=""', served.browser().get(f"/image/{row['image_id']}").text)


def test_a_verdict_goes_by_the_name_that_its_page_shows_or_is_refused(served: Served) -> None:
    browser = served.browser().review_as("ada")
    row = next(iter(by_id(served).values()))
    browser.write("/reviewer", json={"name": "bob"})  # in another tab
    refused = browser.judge(row, "block", labels={"gun": True})
    assert refused.status_code == 409
    assert "bob reviews now" in refused.json()["error"]
    assert "seen" not in refused.json()  # the page offers no "decide as I did"
    assert Catalog.open(served.config).reviews.events().num_rows == 0


def test_undo_takes_back_what_was_said_by_whoever_said_it(served: Served) -> None:
    browser = served.browser().review_as("ada")
    row = next(row for row in by_id(served).values() if row["decision"] == "allow")
    browser.judge(row, "block", labels={"gun": True})
    browser.review_as("bob")
    assert browser.write("/undo", json={}).status_code == 200
    events = Catalog.open(served.config).reviews.events()
    assert reviewed(events).verdicts == []
    assert set(events["reviewer"].to_pylist()) == {"ada"}
    assert served.desk.judging.labels_of(row["image_id"], row["content_hash"], "ada", ["gun"]) == {}


@pytest.mark.parametrize(
    ("name", "problem"), [("", "name"), ("list:banned", "list:"), ("x" * 101, "100"), ("a\nb", "letters")]
)
def test_a_verdict_needs_a_person_with_a_name(served: Served, name: str, problem: str) -> None:
    browser = served.browser()
    row = next(iter(by_id(served).values()))
    answer = browser.write("/reviewer", json={"name": name})
    assert answer.status_code == 400
    assert problem in answer.json()["error"]
    assert browser.judge(row, "block").status_code == 400
    assert Catalog.open(served.config).reviews.events().num_rows == 0


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b'"x"', b"null", b"{}", b'{"image_id": 5, "content_hash": ""}', b"[" * 50_000,
        b'{"image_id": "%s", "content_hash": "x", "reviewer": "ada", "decision": "block"}' % (b"0" * 32),
        b'{"image_id": "x", "content_hash": "x", "decision": "block"}',
        b'{"image_id": "x", "content_hash": "x", "reviewer": "ada", "decision": "block", "more": 1}',
    ],
)  # fmt: skip
def test_what_is_no_verdict_writes_nothing(served: Served, body: bytes) -> None:
    browser = served.browser().review_as("ada")
    answer = browser.write("/verdict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "error" in answer.json()
    assert Catalog.open(served.config).reviews.events().num_rows == 0


@pytest.mark.parametrize("decision", ["ALLOW", "", "delete", "<b>"])
def test_unknown_decisions_are_refused(served: Served, decision: str) -> None:
    browser = served.browser().review_as("ada")
    assert browser.judge(next(iter(by_id(served).values())), decision).status_code == 400


def test_a_verdict_on_bytes_that_have_changed_is_refused(served: Served) -> None:
    row = next(iter(by_id(served).values()))
    answer = served.browser().review_as("ada").judge(row | {"content_hash": "other"}, "allow")
    assert answer.status_code == 409
    assert Catalog.open(served.config).reviews.events().num_rows == 0


# Two people at once


def test_nobody_overwrites_what_they_have_not_seen(served: Served) -> None:
    ada, bob = served.browser().review_as("ada"), served.browser().review_as("bob")
    row = next(iter(by_id(served).values()))
    assert ada.judge(row, "block").status_code == 200
    refused = bob.judge(row, "allow")  # he had opened it before
    assert refused.status_code == 409
    assert "ada decided block" in refused.json()["error"]
    assert "Nothing was written" in refused.json()["error"]
    assert Catalog.open(served.config).reviews.newest()["reviewer"].to_pylist() == ["ada"]
    assert bob.judge(row, "allow", seen=refused.json()["seen"]).status_code == 200
    assert ada.write("/undo", json={}).status_code == 409  # it is bob's now
    flush(served)
    after = by_id(served)[row["image_id"]]["verdict"]
    assert (after["decision"], after["reviewer"]) == ("allow", "bob")


def test_a_verdict_of_another_process_is_seen_too(served: Served, tmp_path: Path) -> None:
    from vlmflow.review import import_verdicts

    row = next(iter(by_id(served).values()))
    ada = served.browser().review_as("ada")
    ada.get(f"/image/{row['image_id']}")
    file = tmp_path / "verdicts.csv"
    file.write_text(f"image_id,verdict,reviewer\n{row['image_id']},block,carol\n")
    import_verdicts(served.config, file)
    refused = ada.judge(row, "allow")
    assert refused.status_code == 409
    assert "carol decided block" in refused.json()["error"]


def test_two_people_are_given_different_images(served: Served) -> None:
    ada, bob = served.browser().review_as("ada"), served.browser().review_as("bob")
    seen = [_queued(person.get("/review?decision=review")) for person in (ada, bob)]
    assert None not in seen
    assert seen[0] != seen[1]
    assert _queued(ada.get("/review?decision=review")) == seen[0]  # reloading keeps hers


def test_a_queue_is_worked_from_end_to_end_by_two(served: Served) -> None:
    people = {name: served.browser().review_as(name) for name in ("ada", "bob")}
    rows, done = by_id(served), []
    for turn in range(8):
        person = people["ada" if turn % 3 else "bob"]
        image_id = _queued(person.get("/review?decision=review&sort=near"))
        assert image_id is not None
        assert person.judge(rows[image_id], "allow").status_code == 200
        done.append(image_id)
    expected = [image_id for image_id, row in rows.items() if row["decision"] == "review"]
    assert sorted(done) == sorted(expected)
    assert "Nothing is left" in people["ada"].get("/review?decision=review").text
    flush(served)
    assert {by_id(served)[image_id]["decision"] for image_id in expected} == {"allow"}


def test_the_end_of_the_queue_says_what_is_left(served: Served) -> None:
    ada, bob = served.browser().review_as("ada"), served.browser().review_as("bob")
    found = by_id(served).values()
    rows = sorted((row for row in found if row["decision"] == "review"), key=lambda row: str(row["image_id"]))
    queue = "/review?decision=review&sort=random"  # by their ids

    def end() -> str:
        return text_of(ada.get(f"{queue}&after={rows[-1]['image_id']}").text)

    assert _queued(bob.get(queue)) == rows[0]["image_id"]
    assert f"{len(rows) - 1} images were passed over. Begin again with them." in end()
    for row in rows[1:]:
        assert ada.judge(row, "allow").status_code == 200
    for left in (end(), text_of(ada.get(queue).text)):
        assert "Nothing is left to decide here" in left
        assert "Somebody else is looking at 1 image." in left
        assert not re.search("passed over|has a verdict", left)
    bob.judge(rows[0], "block")
    assert "Every image that fits has a verdict." in end()
    assert not re.search("passed over|else is looking|could not be read", end())


def test_the_queue_goes_forth_and_back(served: Served) -> None:
    browser = served.browser().review_as("ada")
    page, seen = browser.get("/review?decision=block").text, []
    for _ in range(3):
        seen.append(re.search(r'data-image="([0-9a-f]{32})"', page)[1])  # type: ignore[index]
        following = re.search(r'id="skip" href="([^"]+)"', page)
        assert following is not None
        page = browser.get(following[1].replace("&amp;", "&")).text
    back = re.search(r'id="back" href="([^"]+)"', page)
    assert back is not None
    assert _queued(browser.get(back[1].replace("&amp;", "&"))) == seen[-1]
    gaps = [abs(by_id(served)[image_id]["labels"][0]["score"] - 0.5) for image_id in seen]
    nearest = [min(gap, abs(by_id(served)[i]["labels"][0]["score"] - 0.9)) for gap, i in zip(gaps, seen, strict=True)]
    assert nearest == sorted(nearest)


def _queued(answer: Any) -> str | None:
    found = re.search(r'data-image="([0-9a-f]{32})"', answer.text)
    return None if found is None else found[1]
