"""From predictions to figures: one function a task, without a model, a catalog or Ray.

What is missing (None, or not finite) counts as wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from vlmflow.evaluation.metrics.retrieval import KS, retrieval_recalls
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
    settings = {"": 1}
    if benchmark == "coco" and len(images) == _COCO_5K:
        settings["1k: "] = _COCO_FOLDS
    figures: dict[str, Figure] = {}
    for prefix, folds in settings.items():
        recalls = retrieval_recalls(images, texts, image_of, folds=folds)
        for way, found, num in (
            ("image-to-text", recalls.image_to_text, len(images)),
            ("text-to-image", recalls.text_to_image, len(texts)),
        ):
            for k in KS:
                figures[f"{prefix}{way} R@{k}"] = _share(found[k], num) if folds == 1 else Figure(value=found[k])
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


def score_match(itm: NDArray[np.float64], itc: NDArray[np.float64], matches: NDArray[np.bool_]) -> Scored:
    """ROC AUC of both heads, and the accuracy of the matching head's probability at one half.

    Args:
        itm, itc: (N,) of pairs; not finite: there is none, which is the lowest.
    """
    num = len(matches)
    figures: dict[str, Figure] = {}
    for name, scores in (("ITM AUC", itm), ("ITC AUC", itc)):
        if not np.isfinite(scores).any():
            continue  # the model has no such head
        known = np.where(np.isfinite(scores), scores, np.where(matches, -np.inf, np.inf))
        interval = bootstrap(roc_auc, known, matches)
        low, high = interval or (None, None)
        figures[name] = Figure(value=roc_auc(known, matches), low=low, high=high, num=num)
    if np.isfinite(itm).any():
        right = np.isfinite(itm) & ((itm >= _MATCHES) == matches)
        figures["ITM accuracy"] = _share(float(right.mean()), num)
    return Scored(figures)


def score_answers(answers: Mapping[str, str | None], questions: Sequence[Mapping[str, object]]) -> Scored:
    """The VQA challenge's accuracy: of all questions, by question type and by answer type.

    Args:
        answers: by ``question_id``; what has none, or None, is wrong.
        questions: as ``QUESTION`` in :mod:`vlmflow.evaluation.dataset`.
    """
    every: list[float] = []
    by: dict[str, dict[str, list[float]]] = {"question type": {}, "answer type": {}}
    for question in questions:
        given: Sequence[str] = question["answers"]  # type: ignore[assignment]
        accuracy = vqa_accuracy(answers.get(str(question["question_id"])), given)
        every.append(accuracy)
        for name, column in (("question type", "question_type"), ("answer type", "answer_type")):
            if question.get(column) is not None:
                by[name].setdefault(str(question[column]), []).append(accuracy)
    groups = {
        name: {kind: {"accuracy": _mean(found)} for kind, found in sorted(kinds.items())}
        for name, kinds in by.items()
        if kinds
    }
    return Scored({"accuracy": _mean(every)}, groups)


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
    low, high = bootstrap(average_precision, scores, positive) or (None, None)
    figures["AP"] = Figure(value=average_precision(scores, positive), low=low, high=high, num=int(positive.sum()))
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


def _mean(values: Sequence[float]) -> Figure:
    """The mean of accuracies in [0, 1], with Wilson's interval.

    Soft ones scatter less than shares do, so it is too wide rather than too narrow. By their own scatter it had no
    width where a few questions are all right, or all wrong.
    """
    return _share(float(np.mean(values)), len(values))
