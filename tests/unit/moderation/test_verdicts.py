"""Verdicts read from files and reviews, matched with images and their margins."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.catalog_samples import image_id
from vlmflow import schema
from vlmflow.catalog.reviews import EVENT
from vlmflow.errors import CalibrationError
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.moderation.scoring import Scorer
from vlmflow.moderation.verdicts import (
    IMAGE_COLUMNS,
    Verdict,
    VerdictFile,
    match_verdicts,
    read_verdicts,
    reviewed,
    worst_margins,
)

LABELS = ("gun", "wine")
ROWS = {"image_id": ["a", "b"], "label": ["gun", "weapons/wine"], "value": [True, False]}


@pytest.mark.parametrize(
    "values", [[True, False], [1, 0], [1.0, 0.0], ["yes", "No"], ["TRUE", "false"], ["1", "0"]], ids=str
)
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_verdicts_are_read_from_parquet_and_csv(tmp_path: Path, values: list[Any], suffix: str) -> None:
    table = pa.table({**ROWS, "value": values})
    path = tmp_path / f"verdicts{suffix}"
    pq.write_table(table, path) if suffix == ".parquet" else pa.csv.write_csv(table, path)
    file = read_verdicts(path)
    assert [(v.image, v.label, v.value) for v in file.verdicts] == [("a", "gun", True), ("b", "wine", False)]
    assert (file.key, file.is_weighted) == ("image_id", False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image_id,label\na,gun\n", "no column value among image_id, label"),
        ("label,value\ngun,1\n", "no column image_id or uri among label, value"),
        ("image_id,label,value\na,gun,1\nb,gun,perhaps\n", "row 2: value 'perhaps'"),
        ("image_id,label,value\n,gun,1\n", "row 1: no image_id"),
        ("image_id,label,value,weight\na,gun,1,0\n", "row 1: weight 0"),
        ("image_id,label,value,weight\na,gun,1,much\n", "row 1: weight 'much'"),
        ("", "cannot be read"),
    ],
)
def test_verdicts_that_cannot_be_used_name_file_row_and_value(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "verdicts.csv"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=words) as caught:
        read_verdicts(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_a_file_that_is_absent_or_of_another_kind_is_named(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent.parquet", "verdicts.xlsx"):
        with pytest.raises(CalibrationError, match=name):
            read_verdicts(tmp_path / name)


def images(**decisions: str) -> pa.Table:
    """Of a decision such as ``allow: block`` a person made the second out of the model's first."""
    rows = []
    for name, decision in decisions.items():
        model, _, person = decision.partition(": ")
        verdict = {"decision": person, "reviewer": "ada", "model_decision": model} if person else None
        row = {"image_id": image_id(name), "uri": f"mem://{name}", "content_hash": f"hash-{name}", "verdict": verdict}
        rows.append(row | {"decision": person or model, "decision_reason": "verdict" if person else None})
    return pa.Table.from_pylist(rows, pa.schema([schema.IMAGES.field(name) for name in IMAGE_COLUMNS]))


def file_of(tmp_path: Path, *rows: tuple[str, str, bool, str | None]) -> VerdictFile:
    names = ("uri", "label", "value", "content_hash")
    path = tmp_path / "verdicts.parquet"
    pq.write_table(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), path)
    return read_verdicts(path)


def test_every_verdict_counts_once_or_is_left_out_with_a_reason(tmp_path: Path) -> None:
    file = file_of(
        tmp_path,
        ("mem://a", "gun", True, "hash-a"),
        ("mem://a", "gun", True, None),
        ("mem://a", "wine", True, None),
        ("mem://b", "gun", False, None),
        ("mem://b", "wine", True, None),
        ("mem://b", "wine", False, None),
        ("mem://c", "gun", True, "hash-before"),
        ("mem://gone", "gun", True, None),
        ("mem://a", "rifle", True, None),
    )
    batches = [images().slice(0, 0), images(a="allow", b="review"), images(c="block", d="allow")]
    matched = match_verdicts(file, batches, LABELS)
    found = dict(zip(matched.ids, matched.values.tolist(), strict=True))
    assert found == {image_id("a"): [1, 1], image_id("b"): [0, -1]}
    assert matched.left_out == {
        "said before": 1,
        "contradicted by another verdict": 2,
        "image has changed since (content_hash differs)": 1,
        "image is not in the catalog": 1,
        "label rifle is not in the policy": 1,
    }
    assert matched.flagged == (0.5, 0.5)


def test_an_image_of_which_all_that_was_said_is_contradicted_is_not_among_those_that_count(tmp_path: Path) -> None:
    said = [("mem://a", "gun", True, None), ("mem://a", "gun", False, None)]
    batch = images(a="block", b="allow")
    matched = match_verdicts(file_of(tmp_path, *said, ("mem://b", "gun", False, None)), [batch], LABELS)
    assert matched.ids == [image_id("b")]
    assert (matched.values.tolist(), matched.weights.shape) == ([[0, -1]], (1, 2))
    assert matched.flagged == (0.0, 0.5)
    assert match_verdicts(file_of(tmp_path, *said), [batch], LABELS).ids == []  # calibrate says why none counts


def test_a_queue_as_it_was_exported_can_be_read_and_weighs_what_its_import_would(tmp_path: Path) -> None:
    path = tmp_path / "queue.csv"
    path.write_text(
        "image_id,content_hash,queue,weight,label,value\n"
        f"{image_id('a')},hash-a,near,,gun,true\n"
        f"{image_id('b')},hash-b,random,40.5,,\n"  # nobody filled it in
        f"{image_id('c')},hash-c,random,40.5,gun,false\n"
        f"{image_id('c')},hash-c,,,wine,true\n"  # a second label, in a line of its own
        f"{image_id('d')},hash-d,random,40.5,gun,\n"
    )
    file = read_verdicts(path)
    matched = match_verdicts(file, [images(a="allow", b="allow", c="allow", d="allow")], LABELS)
    assert (matched.is_weighted, matched.left_out) == (True, {"label without a value: write true or false": 1})
    found = dict(zip(matched.ids, zip(matched.values.tolist(), matched.weights.tolist(), strict=True), strict=True))
    assert found == {image_id("a"): ([1, -1], [1.0, 1.0]), image_id("c"): ([0, 1], [40.5, 40.5])}


def test_weights_that_are_all_1_say_nothing_of_how_images_were_drawn(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.csv"
    path.write_text("image_id,label,value,weight\na,gun,1,1\nb,gun,0,1.0\n")
    assert not read_verdicts(path).is_weighted
    assert not reviewed(pa.Table.from_pylist([event("a", True, 1.0)], schema=EVENT)).is_weighted


def test_what_reviewers_decided_does_not_make_the_sample_one_that_the_model_flags(tmp_path: Path) -> None:
    file = file_of(tmp_path, ("mem://a", "gun", True, None), ("mem://b", "gun", False, None))
    batch = images(a="allow: block", b="allow: block", c="allow", d="review: allow")
    assert match_verdicts(file, [batch], LABELS).flagged == (0.0, 0.25)


def event(name: str, value: bool | None, weight: float | None = None, **more: str | None) -> dict[str, Any]:
    row = {"image_id": image_id(name), "content_hash": f"hash-{name}", "label": "gun", "value": value}
    return row | {"weight": weight, "reviewer": "ada", "at": dt.datetime(2026, 3, 1, tzinfo=dt.UTC)} | more


def test_a_weight_stays_with_the_image_that_was_drawn_whoever_says_what_of_it_later() -> None:
    events = [
        event("a", False, 1234.5),
        event("a", True),  # a correction
        event("b", True, 1234.5),
        event("b", True, reviewer="bob"),
        event("c", None, 1234.5, label=None, decision="block"),  # a word on the whole, then one on a label
        event("c", True),
        event("d", True, 99.0, content_hash="hash-before"),  # of other bytes
        event("d", True),
    ]
    file = reviewed(pa.Table.from_pylist(events, schema=EVENT))
    assert file.is_weighted
    matched = match_verdicts(file, [images(a="allow", b="allow", c="allow", d="allow")], LABELS)
    weights = dict(zip(matched.ids, matched.weights[:, 0].tolist(), strict=True))
    assert weights == {image_id(name): 1234.5 for name in "abc"} | {image_id("d"): 1.0}
    assert (matched.values[:, 0] == 1).all()


def test_a_word_on_other_bytes_takes_the_place_of_none() -> None:
    events = [event("a", True), event("a", False, content_hash="hash-before"), event("a", None, content_hash="third")]
    file = reviewed(pa.Table.from_pylist(events, schema=EVENT))
    matched = match_verdicts(file, [images(a="allow")], LABELS)
    assert (matched.ids, matched.values.tolist()) == ([image_id("a")], [[1, -1]])
    assert matched.left_out == {"image has changed since (content_hash differs)": 1}


def test_of_those_that_agree_the_greatest_weight_counts() -> None:
    said = [Verdict("mem://a", "gun", True, weight, None) for weight in (1.0, 50.0, 2.0)]
    matched = match_verdicts(VerdictFile("uri", said, True), [images(a="allow")], LABELS)
    assert (matched.weights[0, 0], matched.left_out) == (50.0, {"said before": 2})


def test_a_large_file_may_have_line_breaks_in_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.csv"
    rows = "".join(f'{number:032x},gun,true,"{"a reason " * 8}\nof two lines"\n' for number in range(20_000))
    path.write_text(f"image_id,label,value,reason\n{rows}")
    assert path.stat().st_size > 1 << 20
    assert len(read_verdicts(path).verdicts) == 20_000


def test_a_uri_that_stands_for_two_images_counts_for_neither(tmp_path: Path) -> None:
    twice = pa.concat_tables(
        [images(a="allow"), images(a="allow").set_column(0, schema.IMAGES.field("image_id"), [[image_id("key")]])]
    )
    matched = match_verdicts(file_of(tmp_path, ("mem://a", "gun", True, None)), [twice], LABELS)
    assert matched.ids == []
    assert matched.left_out == {"uri stands for several images": 1}


def vector_rows(*rows: tuple[str, list[float]], fingerprint: str = "fp") -> pa.Table:
    return pa.table(
        {
            "image_id": [image_id(name) for name, _ in rows],
            "embed_fingerprint": [fingerprint] * len(rows),
            "vector": pa.array([vector for _, vector in rows], pa.list_(pa.float32())),
        }
    )


# One axis a label, the last for the neutral prompt: the margin of a label is the entry of the vector.
AXES = Scorer(PromptVectors(np.eye(2, 3, dtype=np.float32), np.eye(1, 3, 2, dtype=np.float32), 1.0, "digest"))


def test_margins_are_those_of_the_worst_view_wherever_the_views_are_stored() -> None:
    ids = sorted(image_id(name) for name in "abcd")
    batches = [
        vector_rows(("a", [0.1, 0.5, 0.0]), ("b", [0.3, 0.2, 0.0]), ("other", [1.0, 1.0, 0.0])),
        vector_rows(("c", [0.9, 0.9, 0.0]), fingerprint="old"),
        vector_rows(("a", [0.4, 0.2, 0.0]), ("b", [float("nan"), 0.1, 0.0])),
    ]
    margins = worst_margins(ids, batches, "fp", AXES, 2)
    by_name = {name: margins[ids.index(image_id(name))].tolist() for name in "abcd"}
    assert by_name["a"] == [pytest.approx(0.4), pytest.approx(0.5)]
    assert np.isnan([by_name["b"], by_name["c"], by_name["d"]]).all()  # no number, another model's, none


def test_embeddings_of_another_model_alone_are_an_error_that_names_both() -> None:
    with pytest.raises(CalibrationError, match=r"fingerprint new.*\(old\)"):
        worst_margins([image_id("a")], [vector_rows(("a", [0.1, 0.2, 0.3]), fingerprint="old")], "new", AXES, 2)
