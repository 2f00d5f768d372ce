"""The whole corpus of broken files through a whole run: none stops it, and each has its row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.broken import corpus
from vlmflow.catalog import Catalog
from vlmflow.config import Job
from vlmflow.engine import enrich

pytestmark = pytest.mark.usefixtures("ray_session")


def test_every_broken_file_has_a_row_that_a_person_understands(make_job: Callable[..., Job], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    named = {f"{number:04d}-{name.replace('/', '_')}": case for number, (name, case) in enumerate(corpus().items())}
    for name, (data, _) in named.items():
        (folder / name).write_bytes(data)

    report = enrich(make_job(folder, tasks=("embed",), max_error_fraction=1.0))

    assert report.status == "done"
    rows = {row["uri"].rsplit("/", 1)[-1]: row for row in Catalog.open(make_job(folder).catalog).images().to_pylist()}
    assert rows.keys() == named.keys()
    for name, (_, expected) in named.items():
        row = rows[name]
        errors = [error for error in row["errors"] if error["stage"] != "frames"]
        found = errors[0]["class"] if errors else None
        if len(errors) < len(row["errors"]):
            assert row["decision"] != "allow", "nobody has looked at all frames"
        assert found in [error_class and str(error_class) for error_class in expected], (name, row["errors"])
        assert row["status"] == ("ok" if found is None else "unreadable"), (name, row["errors"])
        assert row["decision"] == "review"  # nothing was moderated
    assert sum(report.statuses.values()) == len(named)
    assert not {"worker_died", "timed_out"} & report.errors.keys()
