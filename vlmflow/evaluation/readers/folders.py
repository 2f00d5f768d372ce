"""Images sorted into a folder for each class, as ImageNet and many others come."""

from __future__ import annotations

from pathlib import Path

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.dataset import Dataset, table_of
from vlmflow.paths import is_folder

_IMAGES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif")
)
_IMAGENET = (1_000, 50_000)  # classes and images of its validation set


def read_folders(path: Path) -> Dataset:
    """Takes every folder below ``path`` for a class, and the images in it, at any depth, for its images.

    Raises:
        EvaluationError: there are no such folders, or one class has no image.
    """
    uris: list[object] = []
    classes: list[object] = []
    names = sorted(folder.name for folder in path.iterdir() if is_folder(folder))
    if not names:
        remedy = "Sort the images into a folder for each class, or give a table with a column of classes."
        raise EvaluationError(f"{path} has no folders", remedy=remedy)
    for name in names:
        files = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in _IMAGES)
        if not files:
            raise EvaluationError(f"{path / name} holds no image", remedy="Remove the folder, or fill it.")
        uris += [str(file.absolute()) for file in files]
        classes += [name] * len(files)
    rows = table_of("zeroshot", {"uri": uris, "class": classes})
    benchmark = "imagenet" if (len(names), len(uris)) == _IMAGENET else None
    return Dataset("zeroshot", path.name, rows, benchmark, tuple(names))
