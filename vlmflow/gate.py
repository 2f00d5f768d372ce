"""The quality gate: a golden set is enriched into a scratch catalog and held against values that people accepted.

A checkpoint that is broken, or was exchanged by mistake, would fill a night's rows with values that look like any
others. So a few known images go through the same models first, and the run is stopped before it writes.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from vlmflow.catalog import Catalog
from vlmflow.config import Frozen, Job, SourceConfig
from vlmflow.engine import enrich
from vlmflow.engine.prepare import prepare
from vlmflow.engine.progress import ProgressDisplay
from vlmflow.engine.report import policy_name
from vlmflow.errors import ConfigError, GateError
from vlmflow.evaluation.agreement import decision_flips, differing, score_shifts
from vlmflow.evaluation.run import scratch_catalog, trial_job
from vlmflow.files import put_file
from vlmflow.moderation.detections import name_of
from vlmflow.validation import describe_validation

_COLUMNS = ("content_hash", "uri", "status", "caption", "decision", "labels")
_MAX_EXAMPLES = 5

Decision = Literal["allow", "review", "block"]


class GoldenImage(Frozen):
    """What came out for one image of the golden set.

    Attributes:
        name: the last part of its uri, for people.
        margins: by label, margin over the neutral prompts; by ``label (detector)``, the detector's score, the highest
            of its outputs that feed the label. None: not scored.
    """

    name: str
    status: str
    caption: str | None
    decision: Decision
    # Python's JSON has a NaN: against one that somebody wrote in, no shift would be too large.
    margins: dict[str, Annotated[float, Field(allow_inf_nan=False)] | None]


class GoldenValues(Frozen):
    """What came out for a golden set; the accepted file holds one of these as JSON.

    Attributes:
        format: of the file. Another number is refused, not guessed at.
        fingerprints: per task, of what computed the values.
        images: by sha256 of their bytes, so that the set may be moved.
    """

    format: Literal[1] = 1
    made_at: dt.datetime
    profile: str
    policy: str | None
    fingerprints: dict[str, str]
    images: Annotated[dict[str, GoldenImage], Field(min_length=1)]


class GateLimits(Frozen):
    """How far values may move before they count as a regression. A flip toward ``allow`` always does.

    Attributes:
        min_equal_captions: fraction of captions that must equal the accepted ones, word for word.
        max_margin_shift: of the label whose margins, or detector's scores, moved most, the mean over images of the
            absolute shift.
    """

    min_equal_captions: Annotated[float, Field(ge=0, le=1)] = 0.95
    max_margin_shift: Annotated[float, Field(ge=0)] = 0.02


class GateReport(Frozen):
    """How the values of a golden set compare with the accepted ones.

    Attributes:
        problems: what makes it a regression, one sentence each; empty: the gate is open.
        notes: what differs and decides nothing.
        equal_captions: fraction of captions that are equal; None: none were accepted.
        margin_shift: of the label whose margins, or detector's scores, moved most, the mean absolute shift; None: none
            were accepted.
        shifts: that mean by label, or by ``label (detector)``.
    """

    num_images: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    equal_captions: float | None = None
    margin_shift: float | None = None
    shifts: dict[str, float] = {}

    @property
    def passed(self) -> bool:
        """Nothing is a regression."""
        return not self.problems


class _Compared(Frozen):
    """The limits must be met by something: a set of which nothing was accepted would let everything through."""

    values: GoldenValues

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        images = self.values.images.values()
        if not any(image.status == "ok" for image in images):
            raise ValueError("none of its images is ok")
        return self


def golden_values(
    job: Job, golden: SourceConfig, *, scratch: str | None = None, progress: ProgressDisplay | None = None
) -> GoldenValues:
    """Enriches a golden set with a job's models and policy, into a scratch catalog that is removed afterwards.

    Args:
        golden: a few images; with the job's ``text_column``, its own.
        scratch: where the scratch catalog is made, in a folder of its own; None: a temporary folder, which the
            workers of a cluster on other machines cannot write to.

    Raises:
        GateError: the job runs on a cluster and no scratch place was given, or the set is empty.
        VlmflowError: as :func:`vlmflow.enrich` does.
    """
    if scratch is None and job.ray.address is not None:
        raise GateError(
            f"gate on the cluster {job.ray.address}: no scratch place given",
            remedy="Name one that all nodes reach, such as a prefix of the catalog's bucket.",
        )
    with scratch_catalog(job, scratch, "gate") as catalog:
        changes: dict[str, Any] = {"source": golden.model_dump(), "catalog": catalog.model_dump(), "limit": None}
        try:
            trial = trial_job(job, f"golden set {golden.uri}", **changes, retry=(), reuse=False)
        except ConfigError as error:
            raise GateError(str(error), remedy=error.remedy) from error
        enrich(trial, progress=progress)
        prepared = prepare(trial)
        rows = Catalog.open(catalog).images(list(_COLUMNS)).to_pylist()
        images = {row["content_hash"] or row["uri"]: _image_of(row) for row in rows}
    if not images:
        raise GateError(f"golden set {golden.uri} holds no image", remedy="Name a folder with a few images.")
    return GoldenValues(
        made_at=dt.datetime.now(dt.UTC),
        profile=job.profile,
        policy=policy_name(prepared),
        fingerprints=dict(sorted(prepared.fingerprints.items())),
        images=dict(sorted(images.items(), key=lambda item: item[1].name)),
    )


def read_accepted(path: str | Path) -> GoldenValues:
    """The accepted values.

    Raises:
        GateError: there is no such file, or it does not hold them.
    """
    remedy = "`vlmflow gate accept` writes one, once you have looked at the values."
    try:
        text = Path(path).read_text(encoding="utf-8")
        return _Compared(values=GoldenValues.model_validate_json(text)).values
    except OSError as error:
        raise GateError(f"accepted values {path}: {error.strerror}", remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise GateError(f"accepted values {path}: not a text file", remedy=remedy) from error
    except ValidationError as error:
        raise GateError(describe_validation(error, what=f"accepted values {path}"), remedy=remedy) from error


def write_accepted(path: str | Path, values: GoldenValues) -> None:
    """Writes accepted values, in lines that a review can read.

    Raises:
        GateError: none of the images is ok, so nothing could be held against them later.
        ConfigError: the file cannot be written.
    """
    try:
        _Compared(values=values)
    except ValidationError as error:
        raise GateError(
            describe_validation(error, what="values to accept"), remedy="Look at the golden set."
        ) from error
    try:
        put_file(Path(path), values.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"accepted values {path}: {error.strerror}", remedy="Name a file in a folder that is there."
        ) from error


def compare(accepted: GoldenValues, observed: GoldenValues, limits: GateLimits | None = None) -> GateReport:
    """Holds the values of a golden set against the accepted ones.

    What was accepted decides: an image, a caption or a margin that is there no more is a regression; one that is new
    is a note.
    """
    limits = limits or GateLimits()
    problems, notes = _images_that_differ(accepted, observed)
    common = [(old, observed.images[key]) for key, old in accepted.images.items() if key in observed.images]
    before, after = [old for old, _ in common], [new for _, new in common]

    laxer, stricter = decision_flips([image.decision for image in before], [image.decision for image in after])
    shown = [f"{old.name}: {old.decision} -> {new.decision}" for old, new in common]
    if laxer:
        flips = [shown[at] for at in laxer]
        problems.append(f"{len(flips)} decisions flipped toward allow, such as {_some(flips)}")
    if stricter:
        flips = [shown[at] for at in stricter]
        notes.append(f"{len(flips)} decisions became stricter, such as {_some(flips)}")

    other, equal = differing([image.caption for image in before], [image.caption for image in after])
    if equal is not None and equal < limits.min_equal_captions:
        problems.append(
            f"{equal:.1%} of the captions are equal, at least {limits.min_equal_captions:.1%} must be; "
            f"others: {_some([before[at].name for at in other])}"
        )

    shifts, missing = score_shifts([image.margins for image in before], [image.margins for image in after])
    unscored = [f"{label} of {before[at].name}" for label, at in missing]
    if unscored:
        problems.append(f"{len(unscored)} margins were accepted and are not scored now, such as {_some(unscored)}")
    moved = sorted(
        (label for label in shifts if shifts[label] > limits.max_margin_shift), key=lambda name: -shifts[name]
    )
    if moved:
        listed = _some([f"{label} {shifts[label]:.4f}" for label in moved])
        problems.append(f"margins moved by more than {limits.max_margin_shift:g} on average: {listed}")
    unknown = sorted({label for old, new in common for label in new.margins.keys() - old.margins.keys()})
    if unknown:
        notes.append(f"{len(unknown)} labels have no accepted margins yet, such as {_some(unknown)}")
    return GateReport(
        num_images=len(common),
        problems=tuple(problems),
        notes=tuple(notes),
        equal_captions=equal,
        margin_shift=max(shifts.values(), default=None),
        shifts=shifts,
    )


def _images_that_differ(accepted: GoldenValues, observed: GoldenValues) -> tuple[list[str], list[str]]:
    """What the two sets do not share, and images whose status fell."""
    problems, notes = [], []
    absent = [image.name for key, image in accepted.images.items() if key not in observed.images]
    if absent:
        problems.append(f"{len(absent)} accepted images did not come out, such as {_some(absent)}")
    fell = [
        f"{old.name}: {old.status} -> {observed.images[key].status}"
        for key, old in accepted.images.items()
        if key in observed.images and old.status == "ok" != observed.images[key].status
    ]
    if fell:
        problems.append(f"{len(fell)} images failed that were ok, such as {_some(fell)}")
    new = [image.name for key, image in observed.images.items() if key not in accepted.images]
    if new:
        notes.append(f"{len(new)} images have no accepted values yet, such as {_some(new)}")
    if accepted.policy != observed.policy:
        notes.append(f"the policy was {accepted.policy or 'none'} and is {observed.policy or 'none'}")
    for task, digest in accepted.fingerprints.items():
        if observed.fingerprints.get(task) != digest:
            notes.append(f"{task} runs with another model or other settings than were accepted")
    return problems, notes


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_EXAMPLES])
    return f"{shown}, ..." if len(names) > _MAX_EXAMPLES else shown


def _image_of(row: Mapping[str, Any]) -> GoldenImage:
    return GoldenImage(
        name=row["uri"].rstrip("/").rsplit("/", 1)[-1],
        status=row["status"],
        caption=row["caption"],
        decision=row["decision"],
        margins=_margins_of(row["labels"] or ()),
    )


def _margins_of(labels: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    margins: dict[str, float | None] = {}
    for label in labels:
        name, value = name_of(label), _finite(label["margin" if label["detector"] is None else "score"])
        if name in margins:  # by another output of the detector
            held = margins[name]
            value = None if value is None or held is None else max(value, held)
        margins[name] = value
    return margins


def _finite(value: float | None) -> float | None:
    """JSON has no NaN, and what is none was not scored."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
