"""A task's models on a data set: run, scored, and set beside what is published."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmflow.config import CatalogConfig, Job
from vlmflow.engine.progress import ProgressDisplay
from vlmflow.errors import EvaluationError
from vlmflow.evaluation.dataset import Dataset
from vlmflow.evaluation.metrics.retrieval import texts_of
from vlmflow.evaluation.prompts import DEFAULT_TEMPLATES, default_names, ensemble, prompts_of
from vlmflow.evaluation.published import published
from vlmflow.evaluation.readers.files import read_json
from vlmflow.evaluation.report import EvaluationReport
from vlmflow.evaluation.run import Run, scratch_catalog
from vlmflow.evaluation.score import (
    Scored,
    answers_of,
    score_answers,
    score_captions,
    score_match,
    score_moderation,
    score_retrieval,
    score_zeroshot,
)


@dataclass(frozen=True)
class Choices:
    """What is chosen for an evaluation.

    Attributes:
        catalog: kept, and the next run goes on from it; None: a scratch catalog, removed afterwards.
        scratch: where that is made; None: a temporary folder of this machine.
        class_names: of zeroshot, how the classes are called in prompts; None: by their folders' names.
        templates: of zeroshot, what prompts are made of; several are averaged.
    """

    catalog: CatalogConfig | None = None
    scratch: str | None = None
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


@dataclass(frozen=True)
class Outcome:
    """What a run gave: figures, the predictions that they are made of, and how many images have none."""

    scored: Scored
    predictions: Sequence[Any] | NDArray[np.float32]
    num_missing: int

    def num_asked(self, data: Dataset) -> int:
        """How many results there should be: of each question, of each pair, or of each image."""
        return len(self.predictions[0]) if data.task == "answer" else data.rows.num_rows


def evaluate(
    data: Dataset, job: Job, choices: Choices | None = None, *, progress: ProgressDisplay | None = None
) -> EvaluationReport:
    """Runs the job's models over a data set and measures what they say.

    Args:
        job: profile, models, policy, pools and cluster count.

    Raises:
        EvaluationError: the data cannot be used, or the job runs on a cluster and no place for a catalog was given.
        VlmflowError: as :func:`vlmflow.enrich` does.
    """
    return evaluate_with_predictions(data, job, choices, progress=progress)[0]


def evaluate_with_predictions(
    data: Dataset, job: Job, choices: Choices | None = None, *, progress: ProgressDisplay | None = None
) -> tuple[EvaluationReport, Sequence[Any] | NDArray[np.float32]]:
    """As :func:`evaluate`; also what the models said of each row: a caption, scores, a decision, answers by id."""
    chosen, start = choices or Choices(), time.monotonic()
    if chosen.catalog is None and chosen.scratch is None and job.ray.address is not None:
        raise EvaluationError(
            f"evaluate on the cluster {job.ray.address}: no place for a catalog",
            remedy="Name one that all nodes reach, with --catalog (kept) or --scratch.",
        )
    if data.task == "zeroshot" and not chosen.class_names:  # before the models run, which may take hours
        chosen = replace(chosen, class_names=default_names(data.classes))
    keep = nullcontext(chosen.catalog) if chosen.catalog else scratch_catalog(job, chosen.scratch, "evaluate")
    with keep as catalog:
        assert catalog is not None
        run = Run(job, data, catalog, progress)
        outcome = _MEASURES[data.task](run, data, chosen)
        if outcome.num_missing and outcome.num_missing == outcome.num_asked(data):
            raise run.nothing()
    report = _report(data, outcome.scored, outcome.num_missing, time.monotonic() - start).model_copy(
        update={
            "profile": job.profile,
            "models": run.prepared.model_names(),
            "catalog": chosen.catalog.uri if chosen.catalog else None,
        }
    )
    return report, outcome.predictions


def evaluate_predictions(data: Dataset, path: Path) -> EvaluationReport:
    """Measures predictions that are there already, in the field's result format; runs no model.

    Args:
        path: of caption, ``[{image_id, caption}]``, where an image without a number of the benchmark is called by the
            end of its path; of answer, ``[{question_id, answer}]``.

    Raises:
        EvaluationError: they cannot be read, the task has no such format, a name is that of two images, or one image
            or question has two that differ.
    """
    start = time.monotonic()
    if data.task not in ("caption", "answer"):
        remedy = "Leave --predictions out: the models are run."
        raise EvaluationError(f"{data.task} has no format of predictions", remedy=remedy)
    name, text = ("image_id", "caption") if data.task == "caption" else ("question_id", "answer")
    content = read_json(path)
    if not isinstance(content, list) or not all(
        isinstance(item, Mapping) and item.get(name) is not None and isinstance(item.get(text), str) for item in content
    ):
        raise EvaluationError(f"{path} is no list of {{{name}, {text}}}", remedy="Write the field's result format.")
    said: dict[str, str | None] = {}
    for item in content:
        if said.setdefault(str(item[name]), item[text]) != item[text]:
            raise EvaluationError(f"{path}: {name} {item[name]} stands twice", remedy=f"Keep one {text} for each.")
    if data.task == "caption":
        scored, missing = _given_captions(data, said, path)
    else:
        questions = data.rows["questions"].to_pylist()
        asked = [str(question["question_id"]) for several in questions for question in several]
        _some_known(said, asked, path, name)
        scored = score_answers(said, questions)
        missing = sum(question not in said for question in asked)
    return _report(data, scored, missing, time.monotonic() - start)


def _given_captions(data: Dataset, said: Mapping[str, str | None], path: Path) -> tuple[Scored, int]:
    """By the benchmark's number of an image where it has one, else by as much of the end of its path as is given."""
    uris = data.rows["uri"].to_pylist()
    places = data.image_ids or _by_path(uris, said, path)
    _some_known(said, list(places), path, "image_id")
    captions: list[str | None] = [None] * data.rows.num_rows
    for name, row in places.items():
        if name in said:
            if captions[row] not in (None, said[name]):
                raise EvaluationError(
                    f"{path}: image_id {name} is another name of an image that has a caption",
                    remedy="Keep one caption for each.",
                )
            captions[row] = said[name]
    return score_captions(captions, data.rows["captions"].to_pylist()), captions.count(None)


def _by_path(uris: Sequence[str], said: Mapping[str, object], path: Path) -> dict[str, int]:
    """By file name, by the ends of the path, and by uri: the row.

    Raises:
        EvaluationError: a name that is asked for is that of two images.
    """
    places: dict[str, int] = {}
    for row, uri in enumerate(uris):
        parts = uri.split("/")
        for start in range(len(parts)):
            name = "/".join(parts[len(parts) - 1 - start :])
            other = places.setdefault(name, row)
            if other != row and name in said:
                raise EvaluationError(
                    f"{path}: image_id {name} is that of {uris[other]} and of {uri}",
                    remedy="Write more of their paths, or their whole uris.",
                )
    return places


def _some_known(said: Mapping[str, object], known: Sequence[str], path: Path, name: str) -> None:
    if not said.keys() & set(known):
        example = next(iter(said), "nothing")
        raise EvaluationError(
            f"{path}: no {name} is of this data set, such as {example}", remedy=f"It has {known[0]}, for one."
        )


def _retrieval(run: Run, data: Dataset, _: Choices) -> Outcome:
    texts, image_of = texts_of(data.rows["captions"].to_pylist())
    vectors = run.vectors()
    scored = score_retrieval(vectors, run.texts(texts), image_of, benchmark=data.benchmark)
    return Outcome(scored, vectors, int((~np.isfinite(vectors).all(axis=1)).sum()))


def _zeroshot(run: Run, data: Dataset, choices: Choices) -> Outcome:
    assert choices.class_names is not None
    vectors = run.vectors()
    classes = ensemble(run.texts(prompts_of(choices.class_names, choices.templates)), len(choices.templates))
    truth = np.array([data.classes.index(name) for name in data.rows["class"].to_pylist()])
    similar = vectors @ classes.T
    missing = int((~np.isfinite(vectors).all(axis=1)).sum())
    return Outcome(score_zeroshot(similar, truth, data.classes), similar, missing)


def _caption(run: Run, data: Dataset, _: Choices) -> Outcome:
    captions = run.column("caption")["caption"].to_pylist()
    scored = score_captions(captions, data.rows["captions"].to_pylist())
    return Outcome(scored, captions, captions.count(None))


def _match(run: Run, data: Dataset, _: Choices) -> Outcome:
    rows = run.column("text_itm", "text_itc")
    itm, itc = (rows[name].to_numpy().astype(np.float64) for name in ("text_itm", "text_itc"))
    images = data.rows["uri"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    scored = score_match(itm, itc, data.rows["match"].to_numpy(), images)
    found = itm if np.isfinite(itm).any() else itc  # some models have the contrastive heads alone
    return Outcome(scored, found, int((~np.isfinite(found)).sum()))


def _moderate(run: Run, data: Dataset, _: Choices) -> Outcome:
    rows = run.column("decision", "labels")
    decisions = rows["decision"].to_pylist()
    flags = data.rows["flag"].to_numpy()
    setup = run.prepared.setup
    replaced = {
        (detector.name, output.label)
        for detector in (setup.policy.detectors if setup.policy and setup.binding else ())
        for output in detector.outputs.values()
        if output.combine == "replace"
    }
    truth = data.rows["labels"].to_pylist()
    scored = score_moderation(decisions, rows["labels"].to_pylist(), truth, flags, replaced)
    return Outcome(scored, decisions, decisions.count(None))


def _answer(run: Run, data: Dataset, _: Choices) -> Outcome:
    questions = data.rows["questions"].to_pylist()
    answers = answers_of(run.column("answers"), questions)
    scored = score_answers(answers, questions)
    return Outcome(scored, [answers], sum(answer is None for answer in answers.values()))


_MEASURES = {
    "retrieval": _retrieval,
    "zeroshot": _zeroshot,
    "caption": _caption,
    "match": _match,
    "moderate": _moderate,
    "answer": _answer,
}


def _report(data: Dataset, scored: Scored, num_missing: int, seconds: float) -> EvaluationReport:
    rows = published(data.benchmark, data.task)
    notes = list(scored.notes)
    if rows and data.benchmark == "vqav2":
        notes.append("published accuracies are of test-dev and test-std, which only the challenge's server scores")
    return EvaluationReport(
        task=data.task,
        dataset=data.name,
        benchmark=data.benchmark,
        profile=None,
        models={},
        num_images=data.rows.num_rows,
        num_missing=num_missing,
        figures=scored.figures,
        groups=scored.groups,
        published=rows,
        notes=tuple(notes),
        seconds=round(seconds, 2),
    )
