"""Evaluation: a task's models on a benchmark or on a table of one's own, by the field's metrics."""

from __future__ import annotations

from vlmflow.evaluation.dataset import TASKS, Dataset, EvaluationTask
from vlmflow.evaluation.measure import Choices, evaluate, evaluate_predictions
from vlmflow.evaluation.readers import ReadOptions, read_dataset
from vlmflow.evaluation.report import EvaluationReport, Figure

__all__ = [
    "TASKS",
    "Choices",
    "Dataset",
    "EvaluationReport",
    "EvaluationTask",
    "Figure",
    "ReadOptions",
    "evaluate",
    "evaluate_predictions",
    "read_dataset",
]
