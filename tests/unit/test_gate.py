"""What the quality gate compares of a label that prompts and detectors feed."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from pipelines import steps
from vlmflow.cli import gate as gate_cli
from vlmflow.config import Job, SourceConfig
from vlmflow.errors import GateError
from vlmflow.gate import GoldenValues, _image_of, compare, read_accepted, write_accepted
from vlmflow.sources import open_source


def label(margin: float | None, score: float | None, detector: str | None = None) -> dict[str, Any]:
    return {"label": "nudity", "margin": margin, "score": score, "detector": detector}


def values(*labels: dict[str, Any]) -> GoldenValues:
    row = {"uri": "golden/a.png", "status": "ok", "caption": None, "decision": "review", "labels": labels}
    return GoldenValues(
        made_at=dt.datetime.now(dt.UTC), profile="p", policy=None, fingerprints={}, images={"a": _image_of(row)}
    )


def test_margins_count_where_a_detector_feeds_the_label_too() -> None:
    accepted = values(label(0.12, 0.7), label(None, 0.9, "nsfw"))
    assert compare(accepted, accepted).passed
    assert compare(accepted, values(label(-0.5, 0.1), label(None, 0.9, "nsfw"))).shifts["nudity"] > 0.6
    assert not compare(accepted, values(label(None, None), label(None, 0.9, "nsfw"))).passed


def test_a_detector_is_held_against_its_own_scores() -> None:
    accepted = values(label(0.12, 0.7), label(None, 0.9, "nsfw"), label(None, 0.2, "nsfw"))
    assert compare(accepted, values(label(0.12, 0.7), label(None, 0.1, "nsfw"), label(None, 0.9, "nsfw"))).passed
    for low, high in ((0.1, 0.2), (None, 0.9)):  # another model, and one output without a score
        observed = values(label(0.12, 0.7), label(None, high, "nsfw"), label(None, low, "nsfw"))
        assert not compare(accepted, observed).passed


def test_labels_without_accepted_margins_are_told() -> None:
    report = compare(values(label(0.12, 0.7)), values(label(0.12, 0.7), label(None, 0.9, "nsfw")))
    assert report.passed
    assert report.notes == ("1 labels have no accepted margins yet, such as nudity (nsfw)",)


@pytest.mark.parametrize("margin", ["NaN", "Infinity", "1e999"])
def test_accepted_values_that_are_no_numbers_are_refused(tmp_path: Path, margin: str) -> None:
    """Nothing is farther than a limit from what is no number: whatever the label became, the gate stood open."""
    path = tmp_path / "accepted.json"
    write_accepted(path, values(label(0.12, 0.7)))
    path.write_text(path.read_text().replace("0.12", margin))
    with pytest.raises(GateError, match=r"images\.a\.margins\.nudity: Input should be a finite number"):
        read_accepted(path)


def test_a_golden_folder_serves_a_job_whose_rows_keep_some_columns_of_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden/a.jpg").write_bytes(b"a")
    (tmp_path / "job.yaml").write_text("source: {uri: l.csv, columns: [price]}\ncatalog: {uri: c}\nprofile: starter\n")
    job, of_command = gate_cli._job(
        str(tmp_path / "golden"), tmp_path / "job.yaml", None, None, None, None, None, False
    )
    of_flow: list[SourceConfig] = []

    def golden_values(_: Job, source: SourceConfig, **__: object) -> GoldenValues:
        of_flow.append(source)
        return values(label(0.1, 0.5))

    monkeypatch.setattr(steps, "golden_values", golden_values)
    monkeypatch.setattr(steps, "read_accepted", lambda _: values(label(0.1, 0.5)))
    golden = steps.Golden(uri=str(tmp_path / "golden"), accepted=tmp_path / "accepted.json")
    assert steps.InProcess().gate(job, golden).passed
    for source in (of_command, *of_flow):
        assert open_source(source).columns.names == []
