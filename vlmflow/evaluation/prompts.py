"""Class names as prompts for zero-shot classification (Radford et al. 2021, arXiv:2103.00020, section 3.1.4)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmflow.errors import EvaluationError
from vlmflow.evaluation.readers.files import read_json

_WORDNET_ID = re.compile(r"n\d{8}")
DEFAULT_TEMPLATES = ("a photo of a {}.",)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates that name the class once each; without any, the default one.

    Raises:
        EvaluationError: one of them does not.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise EvaluationError(f"--template {template!r} has no {{}}", remedy='Write it as "a photo of a {}."')
    return tuple(templates) or DEFAULT_TEMPLATES


def read_class_names(path: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """How each class is called in prompts: of a JSON object class -> name, or a list in the order of the classes.

    Raises:
        EvaluationError: a class has no name.
    """
    content = read_json(path)
    if isinstance(content, list) and len(content) == len(classes):
        return tuple(map(str, content))
    if not isinstance(content, Mapping):
        raise EvaluationError(
            f"{path} is neither an object nor a list of {len(classes)} names",
            remedy="Write {class: name}, or the names in the order of the sorted classes.",
        )
    missing = [name for name in classes if name not in content]
    if missing:
        raise EvaluationError(f"{path} names no {missing[0]}", remedy="Give every class a name.")
    return tuple(str(content[name]) for name in classes)


def default_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names as words.

    Raises:
        EvaluationError: they are ids of WordNet, which no model knows: ImageNet's folders are called so.
    """
    if classes and all(_WORDNET_ID.fullmatch(name) for name in classes):
        raise EvaluationError(
            f"the classes are called by ids of WordNet, such as {classes[0]}, which make no prompts",
            remedy="Name them with --classes: a JSON object {id: name}, or a list of names in the order of the ids.",
        )
    return tuple(name.replace("_", " ").replace("-", " ").strip() for name in classes)


def prompts_of(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template of every class, class by class."""
    return [template.replace("{}", name) for name in names for template in templates]


def ensemble(vectors: NDArray[np.float32], num_templates: int) -> NDArray[np.float32]:
    """(C * T, D) unit vectors of prompts -> (C, D): the mean of each class's, of unit length."""
    means = vectors.reshape(-1, num_templates, vectors.shape[1]).mean(axis=1)
    unit: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit
