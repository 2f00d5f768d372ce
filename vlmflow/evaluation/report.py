"""What an evaluation found."""

from __future__ import annotations

from typing import Any

from vlmflow.config import Frozen


class Figure(Frozen):
    """One measured value.

    Attributes:
        value: a share in [0, 1], as every figure here but CIDEr, which reaches 10; None: nothing to measure it on.
        low, high: its 95% interval; None: none is given.
        num: what it was measured on: images, pairs, questions.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    num: int | None = None


class PublishedRow(Frozen):
    """What a paper reports on the same benchmark.

    Attributes:
        setting: how the model was trained and run, where that matters for comparing.
        figures: by the names of ours; shares, as ours.
        source: where the figures were read.
    """

    model: str
    setting: str
    source: str
    figures: dict[str, float]


class EvaluationReport(Frozen):
    """The figures of one task on one data set.

    Attributes:
        models: ``id@revision`` by role; empty where predictions were given.
        num_missing: images (of answer: questions) without a result: they count as wrong, none is left out.
        figures: by name.
        groups: further figures, by what they are broken down by (question type, class, label) and by name.
        published: the field's figures on the same benchmark.
        notes: what limits the comparison, and which metric could not run.
        catalog: where rows and embeddings are kept; None: they were not.
    """

    task: str
    dataset: str
    benchmark: str | None
    profile: str | None
    models: dict[str, str]
    num_images: int
    num_missing: int
    figures: dict[str, Figure]
    groups: dict[str, dict[str, dict[str, Figure]]] = {}
    published: tuple[PublishedRow, ...] = ()
    notes: tuple[str, ...] = ()
    catalog: str | None = None
    seconds: float

    def values(self) -> dict[str, Any]:
        """The bare values by name."""
        return {name: figure.value for name, figure in self.figures.items()}
