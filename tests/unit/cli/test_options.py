"""Options that several commands share: what does not fit is one line that shows no secret, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmflow.cli import main

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
