"""The status of a row whose moderation had failed, once it is moderated from what is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.catalog_samples import enrich, open_catalog, references
from vlmflow.models import ModelIdentity
from vlmflow.moderation.decide import Moderator
from vlmflow.moderation.policy import Policy, bind
from vlmflow.moderation.prompts import PromptVectors
from vlmflow.moderation.relabel import Target, relabel, wanted_rows

POLICY = Policy.model_validate(
    {
        "name": "one",
        "version": "1",
        "neutral": ["n"],
        "categories": [{"name": "c", "labels": [{"name": "l", "prompts": ["p"], "review": 0.5, "block": 0.9}]}],
        "logistic": {"scale": 1.0, "offset": 0.0},
    }
)


def target() -> Target:
    binding = bind(POLICY, ModelIdentity("org/clip", "local", "a" * 64, "[32]", 1))
    prompts = PromptVectors(np.eye(1, 4, dtype=np.float32), np.eye(1, 4, 1, dtype=np.float32), 1.0, "digest")
    return Target(POLICY, Moderator(POLICY, binding, prompts, {}), "embed-1", "moderate-1", "r3")


@pytest.mark.parametrize(
    ("problem", "others", "status"),
    [
        (("read", "missing"), (), "missing"),
        (("decode", "corrupt"), (), "unreadable"),
        (("read", "read_failed"), ("caption",), "failed"),
        (None, ("caption",), "partial"),
        (None, (), "ok"),
    ],
)
def test_an_image_that_is_gone_or_broken_since_stays_so(
    tmp_path: Path, problem: tuple[str, str] | None, others: tuple[str, ...], status: str
) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    enrich(catalog, "r1", [references(["a"])], failed=["moderate", *others])
    if problem is not None:
        enrich(catalog, "r2", [references(["a"], version="v2")], problem=problem)
    rows = catalog.images()
    new, changes = relabel(rows, wanted_rows(rows, target()), target(), ())
    assert changes.num_moved == 1
    (row,) = new.to_pylist()
    stages = [error["stage"] for error in row["errors"]]
    assert (row["status"], stages) == (status, [*([problem[0]] if problem else []), *others])
