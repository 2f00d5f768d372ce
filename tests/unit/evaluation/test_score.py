"""From predictions to figures, task by task; what is missing counts as wrong."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.agreement import decision_flips, differing, score_shifts
from vlmflow.evaluation.dataset import Dataset, table_of
from vlmflow.evaluation.measure import Choices, _match, evaluate_predictions
from vlmflow.evaluation.metrics import java
from vlmflow.evaluation.metrics.meteor import meteor_2005
from vlmflow.evaluation.prompts import check_templates, default_names, ensemble, prompts_of, read_class_names
from vlmflow.evaluation.published import published
from vlmflow.evaluation.score import (
    _mean,
    answers_of,
    score_answers,
    score_captions,
    score_match,
    score_moderation,
    score_retrieval,
    score_zeroshot,
)
from vlmflow.moderation.fit import wilson


def question(number: int, answers: list[str], kind: str = "what") -> dict[str, object]:
    asked = {"question_id": str(number), "question": f"q{number}", "answers": answers}
    return asked | {"question_type": kind, "answer_type": "other"}


def label(name: str, score: float | None, decision: str, detector: str | None = None) -> dict[str, object]:
    return {"label": name, "score": score, "probability": None, "decision": decision, "detector": detector}


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


@pytest.mark.usefixtures("no_java")
def test_captions_without_java_say_what_is_lacking_and_name_their_meteor() -> None:
    scored = score_captions(["a cat on a mat", None], [["a cat on a mat"], ["a dog", "the dog"]])
    assert set(scored.figures) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR-2005"}
    assert scored.figures["ROUGE-L"].value == pytest.approx(0.5)
    assert len(scored.notes) == 2
    assert all("needs Java" in note for note in scored.notes)


def test_meteor_2005_of_known_captions() -> None:
    same = ["a", "cat", "is", "on", "the", "mat"]
    # One run of six words: no break, a penalty of 0.5 / 6^3.
    assert meteor_2005([same], [[same]]) == pytest.approx(1 - 0.5 / 6**3)
    # P = 2/2, R = 2/4, in one run: F = 10 * 0.5 / (0.5 + 9), a penalty of 0.5 / 8.
    assert meteor_2005([["black", "cats"]], [[["a", "black", "cat", "here"]]]) == pytest.approx(
        10 * 0.5 / 9.5 * (1 - 0.5 / 8)
    )
    # Reversed: as many runs as words.
    assert meteor_2005([["dog", "cat"]], [[["cat", "dog"]]]) == pytest.approx(0.5)
    assert meteor_2005([[]], [[["cat"]]]) == 0.0


def test_retrieval_of_the_5k_also_gives_the_1k() -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((5000, 4)).astype(np.float32)
    image_of = np.repeat(np.arange(5000), 2)
    texts = images[image_of] + 0.3 * rng.standard_normal((10000, 4)).astype(np.float32)
    figures = score_retrieval(images, texts, image_of, benchmark="coco").figures
    assert len(figures) == 12
    small, whole = figures["1k: text-to-image R@1"].value, figures["text-to-image R@1"].value
    assert small is not None
    assert whole is not None
    assert small > whole
    assert len(score_retrieval(images[:50], texts[:100], image_of[:100], benchmark=None).figures) == 6


def test_texts_of_one_image_count_as_one_where_they_go_right_together() -> None:
    """Against drawing whole images anew, as far as that has a width."""
    rng = np.random.default_rng(0)
    image_of = np.repeat(np.arange(200), 5)
    together = np.repeat(rng.random(200) < 0.7, 5)
    alone = rng.random(1000) < 0.7
    for right in (together, alone):
        figure = _mean(right, image_of)
        drawn = right.reshape(200, 5).mean(axis=1)[rng.integers(200, size=(2000, 200))].mean(axis=1)
        assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    # None is wrong: that says no more than as many images do.
    perfect = score_retrieval(
        np.eye(4), np.eye(4)[np.repeat(np.arange(4), 5)], np.repeat(np.arange(4), 5), benchmark=None
    )
    assert perfect.figures["text-to-image R@1"].low == perfect.figures["image-to-text R@1"].low == wilson(1.0, 4)[0]
    questions = [[question(number, ["yes"] * 10, "is") for number in range(start, start + 5)] for start in (0, 5)]
    assert (
        score_answers(dict.fromkeys(map(str, range(10)), "yes"), questions).figures["accuracy"].low == wilson(1.0, 2)[0]
    )


def test_pairs_of_one_image_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    scores, matches = rng.random(40), np.arange(40) % 2 == 0
    alone = score_match(scores, np.full(40, np.nan), matches, np.arange(40)).figures["ITM AUC"]
    repeated = score_match(*(np.repeat(values, 9) for values in (scores, np.full(40, np.nan), matches, np.arange(40))))
    assert (repeated.figures["ITM AUC"].low, repeated.figures["ITM AUC"].high) == (alone.low, alone.high)


def test_a_few_in_order_have_an_interval_with_a_width() -> None:
    scores, positive = np.array([0.9, 0.8, 0.7, 0.2, 0.1]), np.array([True, True, True, False, False])
    figure = score_match(scores, np.full(5, np.nan), positive, np.arange(5)).figures["ITM AUC"]
    assert (figure.value, figure.low, figure.high, figure.num) == (1.0, *wilson(1.0, 2), 5)
    labels = [[label("gun", float(score), "allow")] for score in scores]
    average = score_moderation(["allow"] * 5, labels, [None] * 5, positive).figures["AP"]
    assert (average.value, average.low, average.high) == (1.0, *wilson(1.0, 3))


def test_zeroshot_counts_an_image_without_a_vector_as_wrong() -> None:
    similar = np.array([[0.9, 0.1], [0.2, 0.8], [np.nan, np.nan], [0.7, 0.3]], np.float32)
    scored = score_zeroshot(similar, np.array([0, 1, 1, 1]), ("cat", "dog"))
    assert scored.figures["top-1"].value == 0.5
    assert scored.figures["mean per class"].value == pytest.approx((1 + 1 / 3) / 2)
    assert scored.groups["class"]["dog"]["top-1"].num == 3
    assert scored.figures["top-1"].low is not None


def test_match_takes_what_is_missing_for_wrong() -> None:
    nan, matches = np.nan, np.array([True, True, False, False])
    scored = score_match(np.array([0.9, nan, 0.2, nan]), np.array([nan] * 4), matches, np.arange(4))
    assert "ITC AUC" not in scored.figures, "the model has no such head"
    assert scored.figures["ITM AUC"].value == 0.25
    assert scored.figures["ITM accuracy"].value == 0.5
    contrastive = score_match(np.array([nan] * 4), np.array([0.9, nan, 0.2, nan]), matches, np.arange(4))
    assert list(contrastive.figures) == ["ITC AUC"], "the model has no matching head"
    assert contrastive.figures["ITC AUC"].value == scored.figures["ITM AUC"].value


def test_pairs_scored_by_the_contrastive_heads_alone_are_not_missing() -> None:
    pairs: dict[str, list[float | None]] = {"text_itm": [None] * 3, "text_itc": [0.9, None, 0.2]}
    run = SimpleNamespace(column=lambda *_: pa.table(pairs, pa.schema([(name, pa.float32()) for name in pairs])))
    data = SimpleNamespace(rows=pa.table({"match": [True, True, False], "uri": ["/a.jpg", "/b.jpg", "/b.jpg"]}))
    outcome = _match(run, data, Choices())  # type: ignore[arg-type]
    assert outcome.num_missing == 1
    np.testing.assert_allclose(outcome.predictions, [0.9, np.nan, 0.2], rtol=1e-6)


def test_answers_by_type_and_without_one() -> None:
    questions = [question(1, ["yes"] * 10, "is"), question(2, ["2"] * 10, "how many"), question(3, ["cat"] * 10)]
    scored = score_answers({"1": "Yes!", "2": "two", "9": "x"}, [questions])
    assert scored.figures["accuracy"].value == pytest.approx(2 / 3)
    assert scored.groups["question type"]["what"]["accuracy"].value == 0.0
    assert scored.groups["answer type"]["other"]["accuracy"].num == 3
    one = scored.groups["question type"]["what"]["accuracy"]
    assert one.low == pytest.approx(0.0)
    assert one.high == pytest.approx(0.7935, abs=1e-4), "one wrong answer does not say that all will be"


def test_answers_are_read_from_the_catalogs_column_by_question() -> None:
    kind = pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string()), ("score", pa.float32())]))
    said = [
        [{"question": "q2", "answer": "two", "score": 0.5}, {"question": "q1", "answer": "one", "score": 1.0}],
        None,
    ]
    images = pa.table({"answers": pa.array(said, kind)})
    asked = [[question(1, ["1"]), question(2, ["2"])], [question(3, ["3"])]]
    assert answers_of(images, asked) == {"1": "one", "2": "two", "3": None}


def test_moderation_by_label_with_intervals() -> None:
    labels = [
        [label("gun", 0.9, "block"), label("bomb", 0.1, "allow")],
        [label("gun", 0.6, "review"), label("bomb", 0.2, "allow")],
        [label("gun", 0.2, "allow"), label("bomb", 0.3, "allow")],
        None,  # unreadable: reviewed
    ]
    truth = [["gun"], ["gun", "knife"], ["bomb"], []]
    scored = score_moderation(["block", "review", "allow", None], labels, truth, np.array([True, True, True, False]))
    flagged = scored.figures["precision, flagged"]
    assert flagged.value == pytest.approx(2 / 3)
    assert flagged.num == 3
    assert scored.figures["recall, flagged"].value == pytest.approx(2 / 3)
    assert scored.figures["precision, blocked"].value == 1.0
    gun = scored.groups["label"]["gun"]
    assert gun["recall, flagged"].value == 1.0
    assert gun["recall, blocked"].value == 0.5
    assert gun["AP"].value == pytest.approx((1 / 2 + 2 / 3) / 2), "what is unscored is reviewed, and comes first"
    assert scored.groups["label"]["bomb"]["recall, flagged"].value == 0.0
    assert "knife" in scored.notes[0]
    low, high = flagged.low, flagged.high
    assert low is not None
    assert high is not None
    assert low < 2 / 3 < high


def test_labels_are_measured_with_their_detectors() -> None:
    labels = [
        [label("gun", 0.95, "block"), label("gun", 0.01, "allow", "arms")],
        [label("gun", 0.05, "allow"), label("gun", 0.99, "block", "arms")],
        [label("gun", 0.9, "block"), label("gun", None, "review", "arms")],
    ]
    decisions, truth, flags = ["allow", "block", "block"], [[], ["gun"], ["gun"]], np.array([False, True, True])
    scored = score_moderation(decisions, labels, truth, flags, {("arms", "gun")})
    for figures in (scored.figures, scored.groups["label"]["gun"]):
        assert {name: figure.value for name, figure in figures.items()} == dict.fromkeys(figures, 1.0)
    # Where the detector replaces nothing, the prompts count too, and they were wrong.
    gun = score_moderation(["block"] * 3, labels, truth, flags).groups["label"]["gun"]
    assert gun["precision, blocked"].value == pytest.approx(2 / 3)
    assert gun["recall, blocked"].value == 1.0


def test_predictions_from_a_file(tmp_path: Path) -> None:
    rows = table_of("answer", {"uri": ["a.jpg"], "questions": [[question(1, ["yes"]), question(2, ["no"])]]})
    data, path = Dataset("answer", "q.json", rows, "vqav2"), tmp_path / "results.json"
    path.write_text(json.dumps([{"question_id": 1, "answer": "yes"}]))
    report = evaluate_predictions(data, path)
    assert report.figures["accuracy"].value == 0.5
    assert report.num_missing == 1
    assert {row.model for row in report.published} >= {"BEiT-3 large", "mPLUG large", "ONE-PEACE", "VLMo large"}
    path.write_text(json.dumps([{"question_id": 7, "answer": "yes"}]))
    with pytest.raises(EvaluationError, match="no question_id is of this data set, such as 7"):
        evaluate_predictions(data, path)
    path.write_text(json.dumps({"1": "yes"}))
    with pytest.raises(EvaluationError, match=r"is no list of \{question_id, answer\}"):
        evaluate_predictions(data, path)
    path.write_text(json.dumps([{"question_id": 1, "answer": "yes"}, {"question_id": "1", "answer": "yes"}]))
    assert evaluate_predictions(data, path).figures["accuracy"].value == 0.5, "the same once more"
    path.write_text(json.dumps([{"question_id": 1, "answer": "yes"}, {"question_id": 1, "answer": "no"}]))
    with pytest.raises(EvaluationError, match="question_id 1 stands twice"):
        evaluate_predictions(data, path)


@pytest.mark.usefixtures("no_java")
def test_captions_from_a_file_by_number_or_name(tmp_path: Path) -> None:
    captions = [["a cat on a mat"], ["two dogs in a car"]]
    rows = table_of("caption", {"uri": ["/x/a.jpg", "/x/b.jpg"], "captions": captions})
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 5, "caption": "two dogs in a car"}]))
    report = evaluate_predictions(Dataset("caption", "c", rows, image_ids={"4": 0, "5": 1}), path)
    assert report.figures["ROUGE-L"].value == pytest.approx(0.5)
    assert report.num_missing == 1
    path.write_text(json.dumps([{"image_id": "b.jpg", "caption": "two dogs in a car"}]))
    assert evaluate_predictions(Dataset("caption", "c", rows), path).figures["ROUGE-L"].value == pytest.approx(0.5)
    for other, named in (("b.jpg", "b.jpg stands twice"), ("/x/b.jpg", "/x/b.jpg is another name of an image that")):
        named_twice = [{"image_id": "b.jpg", "caption": "two dogs in a car"}, {"image_id": other, "caption": "a cow"}]
        path.write_text(json.dumps(named_twice))
        with pytest.raises(EvaluationError, match=f"image_id {named}"):
            evaluate_predictions(Dataset("caption", "c", rows), path)
    match = table_of("match", {"uri": ["a"], "key": ["k"], "text": ["t"], "match": [True]})
    with pytest.raises(EvaluationError, match="match has no format of predictions"):
        evaluate_predictions(Dataset("match", "m", match), path)


@pytest.mark.usefixtures("no_java")
def test_equal_file_names_are_told_apart_by_their_paths_or_refused(tmp_path: Path) -> None:
    uris, texts = ["/x/a/1.jpg", "/x/b/1.jpg", "/x/b/2.jpg"], ["a cat on a mat", "two dogs in a car", "a cow"]
    data = Dataset("caption", "c", table_of("caption", {"uri": uris, "captions": [[text] for text in texts]}))
    path = tmp_path / "results.json"
    names = ["a/1.jpg", "/x/b/1.jpg", "2.jpg"]
    said = [{"image_id": name, "caption": text} for name, text in zip(names, texts, strict=True)]
    path.write_text(json.dumps(said))
    report = evaluate_predictions(data, path)
    assert (report.num_missing, report.figures["ROUGE-L"].value) == (0, pytest.approx(1.0))
    path.write_text(json.dumps([*said[1:], {"image_id": "1.jpg", "caption": texts[0]}]))
    with pytest.raises(EvaluationError, match=r"image_id 1\.jpg is that of /x/a/1\.jpg and of /x/b/1\.jpg") as caught:
        evaluate_predictions(data, path)
    assert "more of their paths" in caught.value.remedy


def test_every_published_row_names_a_source_and_plausible_figures() -> None:
    ours = {f"{way} R@{k}" for way in ("image-to-text", "text-to-image") for k in (1, 5, 10)}
    ours |= {"BLEU-4", "CIDEr", "METEOR", "SPICE", "accuracy", "top-1", "top-5", "mean per class"}
    places = (("coco", "retrieval"), ("flickr30k", "retrieval"), ("coco", "caption"), ("vqav2", "answer"))
    for place in (*places, ("imagenet", "zeroshot")):
        rows = published(*place)
        assert rows, place
        for row in rows:
            assert "arXiv:" in row.source or "github.com/" in row.source
            assert row.figures.keys() <= ours
            assert all(0 < value <= (2 if name == "CIDEr" else 1) for name, value in row.figures.items())
    assert published(None, "caption") == published("coco", "match") == ()


def test_prompts_and_their_mean() -> None:
    assert prompts_of(("cat", "dog"), ("a {}.", "{}")) == ["a cat.", "cat", "a dog.", "dog"]
    vectors = np.array([[1, 0], [0, 1], [0, 1], [0, 1]], np.float32)
    assert ensemble(vectors, 2) == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [0, 1]]))
    assert default_names(("t_shirt", "well-known")) == ("t shirt", "well known")
    assert default_names(("n01440764", "tench")) == ("n01440764", "tench")
    with pytest.raises(EvaluationError, match="ids of WordNet, such as n01440764") as unnamed:
        default_names(("n01440764", "n01443537"))
    assert "--classes" in unnamed.value.remedy
    with pytest.raises(EvaluationError, match=r"has no \{\}"):
        check_templates(("a photo",))


def test_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"n01": "tench", "n02": "goldfish"}))
    assert read_class_names(path, ("n01", "n02")) == ("tench", "goldfish")
    with pytest.raises(EvaluationError, match="names no n03"):
        read_class_names(path, ("n01", "n03"))
    path.write_text(json.dumps(["tench", "goldfish"]))
    assert read_class_names(path, ("n01", "n02")) == ("tench", "goldfish")
    with pytest.raises(EvaluationError, match="list of 3 names"):
        read_class_names(path, ("a", "b", "c"))


def test_agreement_asks_for_what_was_accepted() -> None:
    assert differing(["a", None, "b", "c"], ["a", "x", "y", None]) == ([2, 3], pytest.approx(1 / 3))
    assert differing([None], ["x"]) == ([], None)
    assert decision_flips(["allow", "review", "block"], ["block", "review", "allow"]) == ([2], [0])
    shifts, missing = score_shifts([{"gun": 0.5, "new": None}, {"gun": 0.1}], [{"gun": 0.2}, {"gun": None}])
    assert shifts == {"gun": pytest.approx(0.3)}
    assert missing == [("gun", 1)]


@pytest.mark.parametrize("num", [5, 20, 25, 40])
def test_limits_are_met_at_their_edges(num: int) -> None:
    for equal in range(num + 1):
        assert differing(["a"] * num, ["a"] * equal + ["b"] * (num - equal))[1] == equal / num
    for start in (-0.31, 0.1, 0.3, 0.7):
        accepted, observed = [{"gun": start}] * num, [{"gun": round(start + 0.02, 6)}] * num
        assert score_shifts(accepted, observed)[0]["gun"] == 0.02


def fake_java(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program named java: the real ones' models are not to be had here."""
    program = folder / "bin" / "java"
    program.parent.mkdir()
    program.write_text("#!/usr/bin/env python3\n" + script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


SPICE = """
import json, sys
items = json.load(open(sys.argv[5]))
found = [{"scores": {"All": {"f": float(item["test"] in item["refs"])}}} for item in items]
found[-1]["scores"]["All"]["f"] = float("nan")
json.dump(found, open(sys.argv[7], "w"))
"""


def test_spice_runs_where_its_models_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, SPICE, monkeypatch)
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    # What its manifest names and the package lacks: the program's library is another file than its models.
    absent = ["spice/spice-1.0.jar", *(f"spice/lib/stanford-corenlp-3.6.0{what}.jar" for what in ("", "-models"))]
    while absent:
        expected = f"SPICE needs {' and '.join(absent)} in the folder of pycocoevalcap"
        assert java.missing_for_spice(tmp_path) == expected
        (tmp_path / absent.pop(0)).write_bytes(b"")
    assert java.missing_for_spice(tmp_path) is None
    assert java.spice(["a", "b", "c"], [["a"], ["x"], ["c"]], tmp_path) == 0.5


def test_a_program_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, "import sys; sys.exit('out of memory')", monkeypatch)
    (tmp_path / "spice").mkdir()
    (tmp_path / "meteor").mkdir()
    with pytest.raises(EvaluationError, match="SPICE failed: out of memory"):
        java.spice(["a"], [["a"]], tmp_path)
    with pytest.raises(EvaluationError, match="METEOR failed: out of memory"):
        java.meteor(["a"], [["a"]], tmp_path)


@pytest.mark.skipif(java.missing_for_meteor() is not None, reason="without METEOR there is nothing to fail")
def test_other_figures_survive_a_program_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, "import sys; sys.exit('out of memory')", monkeypatch)
    scored = score_captions(["a cat"], [["a cat"]])
    assert "METEOR failed: out of memory" in scored.notes
    assert {"METEOR-2005", "BLEU-1"} <= scored.figures.keys()
