"""Options that several commands share: what does not fit is one line that shows no secret, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report_samples import put_rows
from vlmflow.cli import main
from vlmflow.cli.search import query_job
from vlmflow.config import CatalogConfig
from vlmflow.search.duplicates import THRESHOLD

WITH_ENDPOINT = [
    ["enrich", "{tmp}", "{tmp}/catalog", "--profile", "starter"],
    ["verify", "{tmp}", "{tmp}/catalog"],
    ["verify", "{tmp}", "{tmp}/catalog", "--profile", "starter"],
    ["doctor", "--source", "{tmp}"],
    ["doctor", "--config", "{tmp}/job.yaml"],
    ["show", "{tmp}/catalog"],
    ["gate", "accept", "{tmp}", "--config", "{tmp}/job.yaml", "--accepted", "{tmp}/accepted.json"],
    ["policy", "diff", "{tmp}/catalog@0123456789abcdef", "demo"],
]


@pytest.mark.parametrize("command", WITH_ENDPOINT, ids=" ".join)
@pytest.mark.parametrize("endpoint", ["http://key:hunter2@minio:9000", "hunter2:9000"])
def test_an_endpoint_that_does_not_fit(
    command: list[str], endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text("source: {uri: a}\ncatalog: {uri: b}\nprofile: starter\n")
    with pytest.raises(SystemExit) as ended:
        main([*(word.format(tmp=tmp_path) for word in command), "--endpoint", endpoint])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.err.startswith("vlmflow: --endpoint: must ")
    assert "hunter2" not in shown.err + shown.out


CAPTIONS = "source: {uri: a}\ncatalog: {uri: b}\nprofile: starter\ntasks: [caption]\npools: [{tasks: [caption]}]\n"


def test_a_job_file_need_not_embed_to_say_how_images_are_read(tmp_path: Path) -> None:
    (file := tmp_path / "job.yaml").write_text(CAPTIONS + "limits: {max_bytes: 1234}\n")
    job = query_job("catalog", None, file, None)
    assert job is not None
    assert job.limits.max_bytes == 1234
    assert (job.catalog.uri, job.tasks) == ("catalog", ("embed",))


@pytest.mark.parametrize(
    "command",
    [
        ["report", "{catalog}", "-o", "{tmp}/page.html"],
        ["explain", "{catalog}", "mem://a"],
        ["calibrate", "{catalog}", "--policy", "demo"],
        ["remoderate", "{catalog}", "--policy", "demo", "--where", "no such thing"],
    ],
    ids=lambda command: command[0],
)
def test_pools_of_other_tasks_are_no_hindrance(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "job.yaml").write_text(CAPTIONS)
    put_rows(CatalogConfig(uri=str(tmp_path / "catalog")), ["a"], run="first")
    with pytest.raises(SystemExit):
        main([*(word.format(tmp=tmp_path, catalog=tmp_path / "catalog") for word in command), "--config", str(file)])
    assert "every task runs in exactly one pool" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["match", "x.csv", "--accept-unbound"], "--accept-unbound is not for match, which decides nothing"),
        (["caption", "x.csv", "--predictions", "x.json", "--endpoint", "http://minio:9000"], "--endpoint is not for"),
    ],
)
def test_an_option_that_an_evaluation_leaves_out_of_account_is_refused(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *command])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_threshold_of_groups_that_are_not_asked_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["duplicates", "catalog", "--kind", "exact", "--threshold", "0.9"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("vlmflow: --threshold 0.9 is of semantic groups")


def test_the_default_threshold_is_the_one_that_help_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["duplicates", "--help"])
    assert f"Default: {THRESHOLD:g}." in " ".join(capsys.readouterr().out.replace("│", " ").split())
