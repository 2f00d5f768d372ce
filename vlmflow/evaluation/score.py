"""From predictions to figures: one function a task, without a model, a catalog or Ray.

What is missing (None, or not finite) counts as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.metrics.captions import bleu, cider, rouge_l
from vlmflow.evaluation.metrics.classes import average_precision, bootstrap, mean_per_class, roc_auc, top_k
from vlmflow.evaluation.metrics.java import meteor, missing_for_meteor, missing_for_spice, spice
from vlmflow.evaluation.metrics.meteor import meteor_2005
from vlmflow.evaluation.metrics.ptb import tokenize
from vlmflow.evaluation.metrics.retrieval import KS, retrieval_recalls, text_ranks
from vlmflow.evaluation.metrics.vqa import vqa_accuracy
from vlmflow.evaluation.report import Figure
from vlmflow.moderation.fit import Sample, rates_at, wilson

Groups = dict[str, dict[str, dict[str, Figure]]]
_COCO_FOLDS, _COCO_5K = 5, 5_000
_MATCHES = 0.5  # from here on, the matching head says that image and text match


@dataclass(frozen=True)
class Scored:
    """Figures by name, figures of groups, and what could not be measured."""

    figures: dict[str, Figure]
    groups: Groups = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def score_captions(captions: Sequence[str | None], references: Sequence[Sequence[str]]) -> Scored:
    """BLEU-1 to 4, METEOR, ROUGE-L, CIDEr and SPICE; the two that are Java programs where they can run."""
    words = [tokenize(caption or "") for caption in captions]
    others = [[tokenize(one) for one in several] for several in references]
    found = {f"BLEU-{order}": value for order, value in enumerate(bleu(words, others), 1)}
    found |= {"ROUGE-L": rouge_l(words, others), "CIDEr": cider(words, others)}
    plain = [" ".join(one) for one in words]
    plain_others = [[" ".join(one) for one in several] for several in others]
    programs = {"METEOR": (missing_for_meteor(), meteor), "SPICE": (missing_for_spice(), spice)}
    notes = []
    for name, (reason, program) in programs.items():
        if reason is None:
            try:
                found[name] = program(plain, plain_others)
            except EvaluationError as error:  # one program less is no reason to lose the other figures
                reason = str(error)
        if reason is not None:
            notes.append(reason)
    if "METEOR" not in found:
        found["METEOR-2005"] = meteor_2005(words, others)
    return Scored({name: Figure(value=value, num=len(words)) for name, value in found.items()}, notes=tuple(notes))


def score_retrieval(
    images: NDArray[np.float32], texts: NDArray[np.float32], image_of: NDArray[np.int64], *, benchmark: str | None
) -> Scored:
    """Recall@1, 5 and 10 both ways; of COCO's 5,000 test images also the mean of its five folds of 1,000."""
    of_images, of_texts = text_ranks(images, texts, image_of)
    figures = {f"image-to-text R@{k}": _share(float((of_images < k).mean()), len(images)) for k in KS}
    figures |= {f"text-to-image R@{k}": _mean(of_texts < k, image_of) for k in KS}
    if benchmark == "coco" and len(images) == _COCO_5K:
        folds = retrieval_recalls(images, texts, image_of, folds=_COCO_FOLDS)
        for way, found in (("image-to-text", folds.image_to_text), ("text-to-image", folds.text_to_image)):
            figures |= {f"1k: {way} R@{k}": Figure(value=found[k]) for k in KS}
    return Scored(figures)


def score_zeroshot(similar: NDArray[np.float32], truth: NDArray[np.int64], classes: Sequence[str]) -> Scored:
    """Top-1, top-5 and mean per class.

    Args:
        similar: (N, C) to the vectors of the classes.
        truth: (N,) the right class.
    """
    first, fifth = top_k(similar, truth, 1), top_k(similar, truth, min(5, len(classes)))
    figures = {"top-1": _share(float(first.mean()), len(truth)), "top-5": _share(float(fifth.mean()), len(truth))}
    figures["mean per class"] = Figure(value=mean_per_class(first, truth), num=len(set(truth.tolist())))
    by_class = {
        name: {"top-1": _share(float(first[truth == at].mean()), int((truth == at).sum()))}
        for at, name in enumerate(classes)
        if (truth == at).any()
    }
    return Scored(figures, {"class": by_class})


def score_match(
    itm: NDArray[np.float64], itc: NDArray[np.float64], matches: NDArray[np.bool_], image_of: NDArray[np.int64]
) -> Scored:
    """ROC AUC of both heads, and the accuracy of the matching head's probability at one half.

    Args:
        itm, itc: (N,) of pairs; not finite: there is none, which is the lowest.
        image_of: (N,) the image of each pair.
    """
    figures: dict[str, Figure] = {}
    rarer = int(min(matches.sum(), (~matches).sum()))
    for name, scores in (("ITM AUC", itm), ("ITC AUC", itc)):
        if not np.isfinite(scores).any():
            continue  # the model has no such head
        known = np.where(np.isfinite(scores), scores, np.where(matches, -np.inf, np.inf))
        figures[name] = _area(roc_auc, known, matches, image_of, rarer).model_copy(update={"num": len(matches)})
    if np.isfinite(itm).any():
        right = np.isfinite(itm) & ((itm >= _MATCHES) == matches)
        figures["ITM accuracy"] = _mean(right, image_of)
    return Scored(figures)


def score_answers(answers: Mapping[str, str | None], questions: Sequence[Sequence[Mapping[str, object]]]) -> Scored:
    """The VQA challenge's accuracy: of all questions, by question type and by answer type.

    Args:
        answers: by ``question_id``; what has none, or None, is wrong.
        questions: of each image, as ``QUESTION`` in :mod:`vlmflow.evaluation.dataset`.
    """
    every: list[tuple[float, int]] = []  # accuracies, each with the image
    by: dict[str, dict[str, list[tuple[float, int]]]] = {"question type": {}, "answer type": {}}
    for image, question in ((image, question) for image, several in enumerate(questions) for question in several):
        given: Sequence[str] = question["answers"]  # type: ignore[assignment]
        accuracy = (vqa_accuracy(answers.get(str(question["question_id"])), given), image)
        every.append(accuracy)
        for name, column in (("question type", "question_type"), ("answer type", "answer_type")):
            if question.get(column) is not None:
                by[name].setdefault(str(question[column]), []).append(accuracy)
    groups = {
        name: {kind: {"accuracy": _mean(*_columns(found))} for kind, found in sorted(kinds.items())}
        for name, kinds in by.items()
        if kinds
    }
    return Scored({"accuracy": _mean(*_columns(every))}, groups)


def score_moderation(
    decisions: Sequence[str | None],
    labels: Sequence[Sequence[Mapping[str, object]] | None],
    true_labels: Sequence[Sequence[str] | None],
    flags: NDArray[np.bool_],
    replaced: Collection[tuple[str, str]] = (),
) -> Scored:
    """Precision and recall of what is flagged (review or block) and blocked, with Wilson's intervals; and AP.

    Per label too, where the truth names labels: of the gravest decision and the highest score, be they of its prompts
    or of detectors that feed it.

    Args:
        decisions: of each image; None: there is no row, and such an image is reviewed.
        labels: as in the images table; None: unscored.
        true_labels: those that are true of each image; None: only the flag is known.
        replaced: pairs of a detector and a label whose prompts do not count where the detector gave a score.
    """
    severity = np.array([_severity(decision) for decision in decisions])
    counted = [_that_count(several, replaced) for several in labels]
    best = np.array([_highest(several) for several in counted])
    figures = _rates(best, severity, flags)
    by_label: dict[str, dict[str, Figure]] = {}
    if all(names is not None for names in true_labels):
        known = sorted({str(label["label"]) for several in labels for label in several or ()})
        for name in known:
            own = [[one for one in several or () if one["label"] == name] for several in counted]
            scores = np.array([_highest(several) for several in own])
            # Without an entry it is reviewed.
            decided = np.array([max((_severity(one["decision"]) for one in several), default=1) for several in own])
            positive = np.array([name in (names or ()) for names in true_labels])
            by_label[name] = _rates(scores, decided, positive)
        unknown = sorted({name for names in true_labels for name in names or ()} - set(known))
        notes = (f"the policy has no label {', '.join(unknown)}: they count as flags alone",) if unknown else ()
        return Scored(figures, {"label": by_label}, notes)
    return Scored(figures)


def answers_of(images: pa.Table, questions: Sequence[Sequence[Mapping[str, object]]]) -> dict[str, str | None]:
    """By question id, what the catalog's column ``answers`` holds for it.

    Args:
        images: one row per image, with ``answers``: a list of struct(question, answer, score); null: none.
        questions: of each image, as ``QUESTION``.
    """
    found: dict[str, str | None] = {}
    for row, asked in zip(images["answers"].to_pylist(), questions, strict=True):
        # Sources strip questions.
        said = {answer["question"].strip(): answer["answer"] for answer in row or ()}
        found |= {str(question["question_id"]): said.get(str(question["question"]).strip()) for question in asked}
    return found


def _rates(scores: NDArray[np.float64], severity: NDArray[np.int64], positive: NDArray[np.bool_]) -> dict[str, Figure]:
    sample = Sample(scores, positive, np.ones(len(scores)))
    figures = {}
    for name, least in (("flagged", 1), ("blocked", 2)):
        rates = rates_at(sample, severity >= least)
        for kind, value, interval, num in (
            ("precision", rates.precision, rates.precision_interval, rates.num_flagged),
            ("recall", rates.recall, rates.recall_interval, int(positive.sum())),
        ):
            low, high = interval or (None, None)
            figures[f"{kind}, {name}"] = Figure(value=value, low=low, high=high, num=num)
    figures["AP"] = _area(average_precision, scores, positive, np.arange(len(scores)), int(positive.sum()))
    return figures


def _severity(decision: object) -> int:
    """0: allow, 2: block; 1: review, and whatever is no decision."""
    return {"allow": 0, "block": 2}.get(str(decision), 1)


def _that_count(
    labels: Sequence[Mapping[str, object]] | None, replaced: Collection[tuple[str, str]]
) -> list[Mapping[str, object]]:
    """What decides an image: its labels without those by prompts in whose place a detector's score counts."""
    labels = labels or ()
    by_detector = {
        one["label"] for one in labels if (one["detector"], one["label"]) in replaced and one["score"] is not None
    }
    return [one for one in labels if one["detector"] is not None or one["label"] not in by_detector]


def _highest(labels: Sequence[Mapping[str, object]]) -> float:
    """The highest score of several labels; what is unscored is reviewed, so it comes before all that is not."""
    return max((_score(label) for label in labels), default=1.0)


def _score(label: Mapping[str, object]) -> float:
    """What thresholds are compared with; 1 where there is none, for it is reviewed."""
    value = label["probability"] if label["probability"] is not None else label["score"]
    return 1.0 if value is None else float(value)  # type: ignore[arg-type]


def _share(value: float, num: int) -> Figure:
    low, high = wilson(value, num)
    return Figure(value=value, low=low, high=high, num=num)


def _columns(pairs: Sequence[tuple[float, int]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values, images = zip(*pairs, strict=True)
    return np.array(values, np.float64), np.array(images, np.int64)


def _mean(values: NDArray[np.float64] | NDArray[np.bool_], image_of: NDArray[np.int64]) -> Figure:
    """The mean of accuracies in [0, 1], several of which may be of one image, with Wilson's interval.

    What is asked of one image goes right or wrong together, so that five texts of an image say less than texts of five
    images. They count for as many independent ones as would scatter as the sums over images do (Kish's design effect),
    and for no more than there are: soft ones scatter less than shares, and their interval is rather too wide. Where
    nothing scatters, because all are right or all are wrong, they count for as many as there are images.
    """
    value, num = float(np.mean(values)), len(values)
    _, image, counts = np.unique(image_of, return_inverse=True, return_counts=True)
    several = len(counts)
    off = np.bincount(image, weights=values) - counts * value
    variance = float((off**2).sum()) / num**2 * several / max(1, several - 1)
    spread = value * (1 - value)
    worth = several if spread <= 0 or several == 1 else min(num, spread / max(variance, spread / num))
    low, high = wilson(value, worth)
    return Figure(value=value, low=low, high=high, num=num)


def _area(
    metric: Callable[[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64] | None], float | None],
    scores: NDArray[np.float64],
    positive: NDArray[np.bool_],
    image_of: NDArray[np.int64],
    num: int,
) -> Figure:
    """AUC or AP of ``num`` that count, with an interval by drawing images anew.

    That has no width where all are in order, or none is, and so is every draw. Then it is Wilson's: a few in order do
    not say that all will be.
    """
    value, interval = metric(scores, positive, None), bootstrap(metric, scores, positive, image_of)
    if value is None or interval is None:
        return Figure(value=value, num=num)
    low, high = wilson(value, num) if interval[0] == interval[1] else interval
    return Figure(value=value, low=low, high=high, num=num)
