"""VQAv2: its questions and its annotations (Goyal et al. 2017, arXiv:1612.00837)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.dataset import Dataset, table_of
from vlmflow.evaluation.readers.files import entries, image_uri, read_json, value
from vlmflow.paths import is_file


def read_vqa(path: Path, content: Mapping[str, Any], annotations: Path | None, images: str | None) -> Dataset:
    """Reads the questions and what ten people answered to each.

    Args:
        annotations: None: the file that VQA names after the questions' own.
        images: the folder that holds ``COCO_val2014_000000000042.jpg``; None: that of the questions.

    Raises:
        EvaluationError: a file is absent, or a question has no answers.
    """
    place = annotations or _annotations_of(path)
    if not is_file(place) or place == path:
        remedy = "Name it with --annotations; test splits have none that are public."
        raise EvaluationError(f"{path}: no annotations at {place}", remedy=remedy)
    answers = {}
    for at, item in enumerate(entries(read_json(place), "annotations", place)):
        answers[value(item, "question_id", (int, str), f"{place}, annotation {at}")] = item
    subtype = str(content.get("data_subtype") or "")
    grouped: dict[str, list[dict[str, Any]]] = {}
    for at, item in enumerate(entries(content, "questions", path)):
        where = f"{path}, question {at}"
        number = value(item, "question_id", (int, str), where)
        if number not in answers:
            raise EvaluationError(f"{where}: {place} has no answers to {number}", remedy="Are they of one split?")
        uri = image_uri(images, path, _file_name(item, subtype, where))
        grouped.setdefault(uri, []).append(_question(item, answers[number], number, where, f"{place}, {number}"))
    rows = table_of("answer", {"uri": list(grouped), "questions": list(grouped.values())})
    info = content.get("info")
    version = str(info.get("version") or "") if isinstance(info, Mapping) else ""
    # The first version of the questions comes in the same form.
    is_second = version.startswith("2") or path.name.startswith("v2_")
    return Dataset("answer", path.name, rows, "vqav2" if is_second and "val" in subtype else None)


def _question(
    item: Mapping[str, Any], annotation: Mapping[str, Any], number: int | str, where: str, there: str
) -> dict[str, Any]:
    given = [value(one, "answer", str, there) for one in value(annotation, "answers", list, there)]
    if not given:
        raise EvaluationError(f"{there} has no answer", remedy="Leave the question out.")
    return {
        "question_id": str(number),
        "question": value(item, "question", str, where),
        "answers": given,
        **{name: _kind(annotation.get(name)) for name in ("question_type", "answer_type")},
    }


def _kind(found: object) -> str | None:
    return None if found is None else str(found)


def _file_name(item: Mapping[str, Any], subtype: str, where: str) -> str:
    if isinstance(item.get("image"), str):  # as LAVIS writes it
        return str(item["image"])
    number = value(item, "image_id", (int, str), where)
    if isinstance(number, str):
        return number
    return f"COCO_{subtype}_{number:012d}.jpg" if subtype else f"{number:012d}.jpg"


def _annotations_of(path: Path) -> Path:
    """``v2_OpenEnded_mscoco_val2014_questions.json`` -> ``v2_mscoco_val2014_annotations.json``."""
    return path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
