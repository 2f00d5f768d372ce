"""Labels calibrated from verdicts: what is set, what is refused, and that decisions keep what was promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from tests.catalog_samples import image_id
from vlmflow.errors import CalibrationError
from vlmflow.models import ModelIdentity
from vlmflow.moderation.calibrate import Calibration, CalibrationReport, Targets, calibrate_labels
from vlmflow.moderation.calibration_report import calibration_html
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.fit import logistic
from vlmflow.moderation.policy import Logistic, Policy, Thresholds, bind
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.moderation.scoring import Scorer
from vlmflow.moderation.verdicts import (
    IMAGE_COLUMNS,
    Matched,
    VerdictFile,
    match_verdicts,
    read_verdicts,
    worst_margins,
)

CLIP = ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1)
GUN = {"name": "gun", "prompts": ["a gun"], "review": 0.5, "block": 0.8}
WINE = {"name": "wine", "prompts": ["wine"], "review": 0.6, "block": None}
POLICY = Policy.model_validate(
    {
        "name": "test",
        "version": "1",
        "neutral": ["a banana"],
        "categories": [{"name": "weapons", "labels": [GUN]}, {"name": "alcohol", "labels": [WINE]}],
        "logistic": {"scale": 40.0, "offset": 0.1},
    }
)
LABELS = ("gun", "wine")


def verdicts(num: int = 400, *, wine: int = 400, seed: int = 0) -> tuple[Matched, NDArray[np.float32]]:
    """Images with verdicts on gun by a known curve, and on wine for the first ``wine`` of them."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0.08, 0.06, (num, 2)).astype(np.float32)
    values = (rng.random((num, 2)) < logistic(30 * (margins.astype(np.float64) - 0.12))).astype(np.int8)
    values[wine:, 1] = -1
    ids = [f"{number:032x}" for number in range(num)]
    return Matched(ids, values, np.ones((num, 2)), False, Counter(), (0.1, 0.1)), margins


def calibrate(matched: Matched, margins: NDArray[np.float32], **options: Any) -> Calibration:
    before, targets = options.pop("before", None), options.pop("targets", Targets())
    return calibrate_labels(POLICY, CLIP, before, matched, margins, targets, **options)


def test_a_calibrated_binding_decides_as_the_report_says() -> None:
    matched, margins = verdicts()
    done = calibrate(matched, margins)
    decisions = Moderator(POLICY, done.binding, None).decide_labels(margins)
    for number, label in enumerate(done.labels):
        assert label.fit is not None
        assert (label.after["block"].num_flagged, label.after["review"].num_flagged) == (
            (decisions[:, number] == 2).sum(),
            (decisions[:, number] >= 1).sum(),
        )
        # The images that decisions block are those above the margin of the fit: no rounding moves one across.
        assert ((decisions[:, number] == 2) == (margins[:, number] > label.fit.block_margin.value)).all()
        assert ((decisions[:, number] >= 1) == (margins[:, number] > label.fit.review_margin.value)).all()
    gun = done.binding.calibration["gun"]
    assert gun.scale == pytest.approx(30, rel=0.3)
    assert gun.offset == pytest.approx(0.12, abs=0.02)


def test_targets_hold_by_label() -> None:
    matched, margins = verdicts(1000, wine=1000)
    plain = calibrate(matched, margins, targets=Targets(precision=0.8, recall=0.7))
    strict = calibrate(matched, margins, targets=Targets(precision=0.8, recall=0.7, precisions={"gun": 0.97}))
    one, other = plain.binding.thresholds, strict.binding.thresholds
    assert one["wine"] == other["wine"]
    assert (other["gun"].block or 0) > (one["gun"].block or 1)
    assert other["gun"].review == one["gun"].review
    with pytest.raises(CalibrationError, match="target for rifle: no label of test"):
        calibrate(matched, margins, targets=Targets(recalls={"rifle": 0.5}))


@pytest.mark.parametrize("num", [0, 30])
def test_a_label_with_too_few_verdicts_stays_as_it_was_where_the_policy_is_bound(num: int) -> None:
    matched, margins = verdicts(wine=num)
    kept = Thresholds(review=0.3, block=0.9)
    before = bind(POLICY, CLIP, logistic=Logistic(scale=9.0, offset=0.2), thresholds={"wine": kept})
    done = calibrate(matched, margins, before=before)
    assert done.binding.thresholds["wine"] == kept
    assert done.binding.logistic == before.logistic
    assert set(done.binding.calibration) == {"gun"}
    assert "at least 20 are needed" in (done.labels[1].refused or "")


def test_an_unbound_policy_is_not_bound_with_thresholds_never_set_for_the_model_unless_asked() -> None:
    matched, margins = verdicts(wine=30)
    with pytest.raises(CalibrationError, match="never set for it: wine: ") as caught:
        calibrate(matched, margins)
    assert "--accept-uncalibrated" in caught.value.remedy
    done = calibrate(matched, margins, accept_uncalibrated=True)
    assert set(done.binding.thresholds) == {"gun"}
    assert done.labels[1].thresholds == Thresholds(review=0.6, block=None)


def test_without_any_label_there_is_no_calibration() -> None:
    matched, margins = verdicts(24, wine=24)
    with pytest.raises(CalibrationError, match=r"no label of test can be calibrated: gun: .*; wine: "):
        calibrate(matched, margins, accept_uncalibrated=True)


def test_verdicts_of_very_different_weight_are_worth_less_than_their_number() -> None:
    matched, margins = verdicts(60, wine=60)
    values = np.repeat(np.array([[0], [1]], np.int8), 30, axis=0)
    weights = np.full((60, 2), 1.0)
    weights[0] = weights[30] = 1000
    lopsided = Matched(matched.ids, np.hstack([values, values]), weights, True, Counter(), (0, 0))
    with pytest.raises(CalibrationError, match=r"30 positive verdicts \(worth 1.1: weights differ"):
        calibrate(lopsided, margins)


def near_and_random(random_weight: float, num_random: int) -> tuple[Matched, NDArray[np.float32]]:
    """A review queue: near a threshold half of the images have the label, of those drawn at random none."""
    rng = np.random.default_rng(0)
    margins = np.append(rng.normal(0.1, 0.01, 200), rng.normal(0.0, 0.01, num_random)).astype(np.float32)
    values = np.append(margins[:200] > np.median(margins[:200]) + rng.normal(0, 0.005, 200), np.zeros(num_random))
    weights = np.append(np.ones(200), np.full(num_random, random_weight))
    both = (np.repeat(column[:, None], 2, axis=1) for column in (values.astype(np.int8), weights))
    ids = [f"{number:032x}" for number in range(len(margins))]
    return Matched(ids, *both, True, Counter(), (0.5, 0.1)), margins[:, None].repeat(2, axis=1)


def test_a_label_that_no_heavy_verdict_was_positive_of_is_refused_or_warned_of() -> None:
    with pytest.raises(CalibrationError, match="none of the 50 heaviest verdicts is positive, so up to 100% of"):
        calibrate(*near_and_random(20_000, 50))
    known = calibrate(*near_and_random(10, 500))
    assert any("none of the 500 heaviest verdicts is positive: up to" in text for text in known.labels[0].warnings)
    many = calibrate(*near_and_random(2, 2000))
    assert not any("heaviest" in text for text in many.labels[0].warnings)


def test_images_without_a_vector_count_for_nothing() -> None:
    matched, margins = verdicts()
    fewer = margins.copy()
    fewer[::2] = np.nan
    half = Matched(matched.ids[1::2], matched.values[1::2], matched.weights[1::2], False, Counter(), (0, 0))
    one, other = calibrate(matched, fewer), calibrate(half, margins[1::2])
    assert one.binding == other.binding


def test_a_sample_from_the_review_queue_is_warned_of_unless_it_is_weighted() -> None:
    matched, margins = verdicts()
    queue = Matched(matched.ids, matched.values, matched.weights, False, Counter(), (0.9, 0.1))
    assert (
        "90% of the labelled images are flagged at present, of the catalog 10%" in calibrate(queue, margins).warnings[0]
    )
    weighted = Matched(matched.ids, matched.values, matched.weights, True, Counter(), (0.9, 0.1))
    assert calibrate(weighted, margins).warnings == []
    assert calibrate(matched, margins).warnings == []


def test_review_never_starts_above_block() -> None:
    margins = np.linspace(-0.1, 0.1, 400, dtype=np.float32)[:, None].repeat(2, axis=1)
    holds = (margins > 0).astype(np.int8)  # so easy a label that a tenth of it could be missed without a false alarm
    done = calibrate(Matched(verdicts()[0].ids, holds, np.ones((400, 2)), False, Counter(), (0, 0)), margins)
    gun = done.labels[0]
    assert gun.fit is not None
    assert gun.fit.review.value > gun.fit.block.value
    assert gun.thresholds.review == gun.thresholds.block == round(gun.fit.block.value, 9)
    assert any("nothing is only reviewed" in text for text in gun.warnings)


def test_a_curve_that_does_not_fit_is_warned_of() -> None:
    matched, margins = verdicts(2000, wine=2000)
    values = matched.values.copy()
    # Half of the highest margins are negative after all, which no logistic can follow.
    top = margins[:, 0] > 0.19
    values[top, 0] = np.arange(top.sum()) % 2
    done = calibrate(Matched(matched.ids, values, matched.weights, False, Counter(), (0, 0)), margins)
    assert any("probabilities stray" in text for text in done.labels[0].warnings)
    assert not any("stray" in text or "does not fit" in text for text in done.labels[1].warnings)


def page(done: Calibration, **changes: Any) -> str:
    facts: dict[str, Any] = {"catalog": "c", "verdicts": "v", "policy": "p", "new_policy": "q", "output": "o"}
    facts |= {"model": "m", "num_images": 1, "num_verdicts": 2, "left_out": {}, "is_weighted": False, "warnings": ()}
    return calibration_html(CalibrationReport(labels=tuple(done.labels), **{**facts, **changes}))


def test_the_page_stands_alone_shows_every_label_and_escapes_every_word_from_outside() -> None:
    matched, margins = verdicts(wine=30)
    done = calibrate(matched, margins, accept_uncalibrated=True)
    evil = '"><script>alert(1)</script>'
    names = ("catalog", "verdicts", "policy", "new_policy", "output", "model")
    text = page(done, **dict.fromkeys(names, evil), left_out={evil: 1}, warnings=(evil,))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 9  # the policy stands in the title and the heading
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("<svg") == 3  # of gun; wine has no verdicts enough
    assert "weapons/gun" in text
    assert "Left as it was: " in text
    assert f"{done.binding.thresholds['gun'].review:.3f}" in text


def test_the_json_of_a_report_can_be_read_even_where_a_label_never_blocks() -> None:
    matched, margins = verdicts()
    rare = np.where(np.arange(400)[:, None] % 3, 0, matched.values).astype(np.int8)
    done = calibrate(
        Matched(matched.ids, rare, matched.weights, False, Counter(), (0, 0)), margins, targets=Targets(precision=0.999)
    )
    assert done.labels[0].thresholds.block is None
    assert any("never blocks" in text for text in done.labels[0].warnings)
    shown = done.labels[0].model_dump(mode="json")
    assert shown["thresholds"]["block"] is None
    assert "never" in page(done)


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
        ("image_id,label,value\na,gun,\n", "row 1: value"),
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
    return pa.table(
        {
            "image_id": [image_id(name) for name in decisions],
            "uri": [f"mem://{name}" for name in decisions],
            "content_hash": [f"hash-{name}" for name in decisions],
            "decision": list(decisions.values()),
        },
        pa.schema([(name, pa.string()) for name in IMAGE_COLUMNS]),
    )


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


def test_a_uri_that_stands_for_two_images_counts_for_neither(tmp_path: Path) -> None:
    twice = pa.concat_tables([images(a="allow"), images(a="allow").set_column(0, "image_id", [[image_id("key")]])])
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
