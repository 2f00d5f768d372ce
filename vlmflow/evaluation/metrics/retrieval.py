"""Recall@K of image-text retrieval, both ways, where an image may have several texts (COCO, Flickr30k: five).

An image finds a text if one of its own is among the first K; a text finds its one image. The matrix of similarities is
made in blocks, so that memory does not grow with its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KS = (1, 5, 10)
_NEVER = np.iinfo(np.int64).max
_BLOCK_CELLS = 1 << 24  # 64 MiB of similarities at a time


@dataclass(frozen=True)
class Recalls:
    """Recall@K by K, in [0, 1]."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieval_recalls(
    images: NDArray[np.float32],
    texts: NDArray[np.float32],
    image_of: NDArray[np.int64],
    *,
    folds: int = 1,
    block_cells: int = _BLOCK_CELLS,
) -> Recalls:
    """Recall@1, 5 and 10 by the similarity of unit vectors. N: images, M: texts, D: dimensions.

    Args:
        images: (N, D); a row that is not finite stands for an image without a vector: it is found by no text and
            finds none, which counts against the recall.
        texts: (M, D).
        image_of: (M,) the image that each text belongs to.
        folds: the images are cut into so many parts of equal size, in order, and the recalls are means over them: 5
            makes COCO's 1k of its 5k.

    Raises:
        ValueError: the parts would not be of equal size.
    """
    if folds < 1 or len(images) % folds:
        raise ValueError(f"{len(images)} images do not part into {folds} folds of equal size")
    size = len(images) // folds
    parts = []
    for start in range(0, len(images), size):
        inside = (image_of >= start) & (image_of < start + size)
        ranks = text_ranks(images[start : start + size], texts[inside], image_of[inside] - start, block_cells)
        parts.append(ranks)
    return Recalls(
        image_to_text={k: float(np.mean([(of_images < k).mean() for of_images, _ in parts])) for k in KS},
        text_to_image={k: float(np.mean([(of_texts < k).mean() for _, of_texts in parts])) for k in KS},
    )


def text_ranks(
    images: NDArray[np.float32],
    texts: NDArray[np.float32],
    image_of: NDArray[np.int64],
    block_cells: int = _BLOCK_CELLS,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many come before the right one: (N,) before an image's best text, (M,) before a text's image.

    What is equally similar comes in the order in which it is listed. An image without a vector has a rank that no K
    reaches, and so has everything for it, however few the candidates are.
    """
    order = np.argsort(image_of, kind="stable")
    starts = np.searchsorted(image_of[order], np.arange(len(images) + 1))
    missing: NDArray[np.bool_] = np.asarray(~np.isfinite(images).all(axis=1))
    of_images = np.full(len(images), _NEVER, np.int64)
    for rows in _blocks(len(images), len(texts), block_cells):
        similar = images[rows] @ texts.T
        for row, number in enumerate(range(rows.start, rows.stop)):
            own = order[starts[number] : starts[number + 1]]
            if len(own) and not missing[number]:
                best = own[np.argmax(similar[row, own])]
                of_images[number] = _before(similar[row], best)
    of_texts = np.full(len(texts), _NEVER, np.int64)
    for rows in _blocks(len(texts), len(images), block_cells):
        similar = texts[rows] @ images.T
        similar[:, missing] = -np.inf
        for row, number in enumerate(range(rows.start, rows.stop)):
            if not missing[image_of[number]]:
                of_texts[number] = _before(similar[row], int(image_of[number]))
    return of_images, of_texts


def _before(similar: NDArray[np.float32], at: int) -> int:
    return int((similar > similar[at]).sum() + (similar[:at] == similar[at]).sum())


def _blocks(num: int, width: int, cells: int) -> Iterator[slice]:
    step = max(1, cells // max(1, width))
    for start in range(0, num, step):
        yield slice(start, min(num, start + step))


def texts_of(captions: Sequence[Sequence[str]]) -> tuple[list[str], NDArray[np.int64]]:
    """All captions in a row, and the image that each belongs to."""
    flat = [text for several in captions for text in several]
    return flat, np.repeat(np.arange(len(captions)), [len(several) for several in captions]).astype(np.int64)
