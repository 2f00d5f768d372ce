"""`vlmflow show`: what its headings say of the rows below them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report_samples import put_rows
from vlmflow.cli import main
from vlmflow.config import CatalogConfig


@pytest.mark.parametrize(("policy", "heading"), [(None, "not moderated yet"), ("demo", "flagged")])
def test_images_that_no_policy_has_seen_are_not_called_flagged(
    policy: str | None, heading: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], decision=["review"], policy_name=[policy], policy_version=[policy])
    with pytest.raises(SystemExit):
        main(["show", config.uri])
    shown = capsys.readouterr().out
    assert heading in shown
    assert ("flagged" in shown) == (heading == "flagged")
