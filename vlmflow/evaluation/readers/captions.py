"""Captions: COCO's and Flickr30k's files, and the Karpathy splits that the field reports on (arXiv:1412.2306)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.dataset import Dataset, EvaluationTask, table_of
from vlmflow.evaluation.readers.files import entries, image_uri, value
from vlmflow.evaluation.readers.options import ReadOptions
from vlmflow.paths import is_file

# Images of the test splits whose figures are published.
_TEST_SIZES = {5_000: "coco", 1_000: "flickr30k"}
_FLICKR_IMAGES = 31_783  # of Flickr30k's token file; Flickr8k comes in the same form
_SPLITS = {"train": ("train", "restval")}  # COCO's training takes both


def read_caption_json(task: EvaluationTask, path: Path, content: Any, options: ReadOptions) -> Dataset:
    """Reads captions from JSON: a Karpathy split, its list form (BLIP, LAVIS), or COCO's own annotations.

    Raises:
        EvaluationError: it is none of them, a value is not what it should be, or an option says nothing of such a file.
    """
    if isinstance(content, list):
        options.check_only(("images",), str(path), "lists of captions")
        return _read_list(task, path, content, options.images)
    listed = entries(content, "images", path)
    if any("sentences" in item for item in listed):
        options.check_only(("images", "split"), str(path), "Karpathy files")
        return _read_karpathy(task, path, content, listed, options.images, options.split or "test")
    options.check_only(("images",), str(path), "COCO files")
    return _read_coco(task, path, listed, entries(content, "annotations", path), options.images)


def read_caption_tokens(task: EvaluationTask, path: Path, options: ReadOptions) -> Dataset:
    """Reads Flickr30k's token file: ``NAME#NUMBER<tab>caption``; ``split``: a file that names the images of a part.

    Raises:
        EvaluationError: a line is another, the part is not in it, or an option says nothing of such a file.
    """
    options.check_only(("images", "split"), str(path), "token files")
    split = options.split
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise EvaluationError(
                f"{path}, line {number}: {line[:60]!r} is not NAME#NUMBER, a tab and a caption",
                remedy="Is it Flickr30k's results_20130124.token?",
            )
        captions.setdefault(name.rpartition("#")[0], []).append(caption.strip())
    is_flickr30k = len(captions) == _FLICKR_IMAGES
    if split is not None:
        if not is_file(Path(split)):
            raise EvaluationError(
                f"--split {split}: no such file", remedy="Name a text file with one image name a line."
            )
        wanted = [line.strip() for line in _lines(Path(split))]
        unknown = [name for name in wanted if name not in captions]
        if unknown:
            raise EvaluationError(f"{split} names {unknown[0]}, which {path} has not", remedy="Use its names.")
        captions = {name: captions[name] for name in wanted}
    found = {image_uri(options.images, path, name): texts for name, texts in captions.items()}
    is_test = _TEST_SIZES.get(len(found)) == "flickr30k" and split is not None and "test" in Path(split).name.lower()
    return _dataset(task, path, found, "flickr30k" if is_flickr30k and is_test else None)


def _read_karpathy(
    task: EvaluationTask, path: Path, content: Any, listed: list[Mapping[str, Any]], images: str | None, split: str
) -> Dataset:
    wanted = _SPLITS.get(split, (split,))
    captions: dict[str, list[str]] = {}
    numbers: list[str | None] = []
    for at, item in enumerate(listed):
        where = f"{path}, image {at}"
        if value(item, "split", str, where) not in wanted:
            continue
        name = value(item, "filename", str, where)
        sentences = [value(each, "raw", str, where) for each in value(item, "sentences", list, where)]
        folder = value(item, "filepath", str, where) if item.get("filepath") is not None else ""
        captions[image_uri(images, path, folder, name)] = sentences
        numbers.append(None if item.get("cocoid") is None else str(item["cocoid"]))
    if not captions:
        there = ", ".join(sorted({str(item.get("split")) for item in listed}))
        raise EvaluationError(f"{path} has no split {split}; it has {there}", remedy="Name one of these with --split.")
    known = str(content.get("dataset") or path.stem) if isinstance(content, Mapping) else path.stem
    sized = _TEST_SIZES.get(len(captions)) if split == "test" else None
    ids = None if None in numbers else {str(number): row for row, number in enumerate(numbers)}
    return _dataset(task, path, captions, sized if sized and sized in known.lower() else None, ids)


def _read_list(task: EvaluationTask, path: Path, content: list[Any], images: str | None) -> Dataset:
    captions: dict[str, list[str]] = {}
    for at, item in enumerate(content):
        where = f"{path}, entry {at}"
        if not isinstance(item, Mapping):
            raise EvaluationError(f"{where} is no object", remedy="Write {image, caption} for each image.")
        texts = value(item, "caption", (str, list), where)
        uri = image_uri(images, path, value(item, "image", str, where))
        said = [texts] if isinstance(texts, str) else [value({"caption": one}, "caption", str, where) for one in texts]
        captions.setdefault(uri, []).extend(said)
    sized, name = _TEST_SIZES.get(len(captions)), path.stem.lower()
    return _dataset(task, path, captions, sized if sized and sized in name and "test" in name else None)


def _read_coco(
    task: EvaluationTask,
    path: Path,
    listed: list[Mapping[str, Any]],
    annotations: list[Mapping[str, Any]],
    images: str | None,
) -> Dataset:
    uris = {}
    for at, item in enumerate(listed):
        name = value(item, "file_name", str, f"{path}, image {at}")
        uris[value(item, "id", (int, str), f"{path}, image {at}")] = image_uri(images, path, name)
    captions: dict[str, list[str]] = {uri: [] for uri in uris.values()}
    for at, item in enumerate(annotations):
        where = f"{path}, annotation {at}"
        number = value(item, "image_id", (int, str), where)
        if number not in uris:
            raise EvaluationError(f"{where}: image_id {number} is not among the images", remedy="Download it again.")
        captions[uris[number]].append(value(item, "caption", str, where))
    rows = {uri: texts for uri, texts in captions.items() if texts}
    order = {uri: row for row, uri in enumerate(rows)}
    ids = {str(number): order[uri] for number, uri in uris.items() if uri in order}
    return _dataset(task, path, rows, None, ids)


def _dataset(
    task: EvaluationTask,
    path: Path,
    captions: dict[str, list[str]],
    benchmark: str | None,
    image_ids: dict[str, int] | None = None,
) -> Dataset:
    without = next((uri for uri, texts in captions.items() if not texts), None)
    if without is not None:
        raise EvaluationError(f"{path}: {without} has no caption", remedy="Leave the image out, or write one.")
    rows = table_of(task, {"uri": list(captions), "captions": list(captions.values())})
    return Dataset(task, path.name, rows, benchmark, image_ids=image_ids)


def _lines(path: Path) -> Iterable[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as text", remedy="Save it as UTF-8.") from error
