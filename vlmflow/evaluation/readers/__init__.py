"""Readers of the benchmarks' own files, of image folders, and of any manifest: each makes a dataset."""

from __future__ import annotations

from pathlib import Path

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.dataset import Dataset, EvaluationTask
from vlmflow.evaluation.readers.captions import read_caption_json, read_caption_tokens
from vlmflow.evaluation.readers.files import read_json
from vlmflow.evaluation.readers.folders import read_folders
from vlmflow.evaluation.readers.manifest import read_manifest
from vlmflow.evaluation.readers.options import ReadOptions
from vlmflow.evaluation.readers.vqa import read_vqa
from vlmflow.paths import is_file, is_folder

__all__ = ["ReadOptions", "read_dataset"]


_TABLES = (".csv", ".jsonl", ".ndjson", ".parquet")


def read_dataset(task: EvaluationTask, data: str, options: ReadOptions | None = None) -> Dataset:
    """Reads what DATA names, by what it is.

    Args:
        task: retrieval, caption, answer, zeroshot, match or moderate.
        data: a file or a folder on this machine.
        options: what the file itself does not say, a :class:`vlmflow.evaluation.ReadOptions`.

    Raises:
        EvaluationError: it is not there, is none of the known files, does not hold what the task needs, or an option
            says nothing of such a file.
    """
    path, options = Path(data), options or ReadOptions()
    if is_folder(path):
        _only(task, ("zeroshot",), f"{data} is a folder of images")
        options.check_only((), data, "folders of classes")
        return read_folders(path)
    if not is_file(path):
        raise EvaluationError(f"{data} does not exist", remedy="Name a file or a folder on this machine.")
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return read_manifest(task, path, options)
    if suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and "questions" in content:
            _only(task, ("answer",), f"{data} holds questions")
            options.check_only(("images", "annotations"), data, "VQA files")
            return read_vqa(path, content, options.annotations, options.images)
        _only(task, ("retrieval", "caption"), f"{data} holds captions")
        return read_caption_json(task, path, content, options)
    if suffix in (".token", ".txt", ".tsv"):
        _only(task, ("retrieval", "caption"), f"{data} holds captions")
        return read_caption_tokens(task, path, options)
    raise EvaluationError(
        f"{data}: {suffix or 'no extension'} is none of the files that can be read",
        remedy="Use .json (COCO, Karpathy, VQA), .token (Flickr30k), .csv, .jsonl, .parquet, or a folder per class.",
    )


def _only(task: EvaluationTask, tasks: tuple[EvaluationTask, ...], what: str) -> None:
    if task not in tasks:
        remedy = f"Evaluate {' or '.join(tasks)} on it, or give a table."
        raise EvaluationError(f"{what}, and {task} cannot be measured by that", remedy=remedy)
