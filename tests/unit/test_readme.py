"""What the README and the help show can be done as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import vlmflow
from vlmflow.cli.run import enrich
from vlmflow.config import load_job
from vlmflow.moderation.policy import load_policy, shipped_policies

README = (Path(vlmflow.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
UNBOUND = [name for name in shipped_policies() if not load_policy(name).bindings]


@pytest.mark.parametrize("text", [README, vlmflow.__doc__, enrich.__doc__], ids=["README", "Python", "--help"])
def test_a_policy_that_is_bound_to_no_model_is_shown_with_what_lets_it_run(text: str) -> None:
    shown = list(re.finditer(rf"""policy(: |=["']| )({"|".join(UNBOUND)})\b(?! \w)""", text))
    assert shown
    for found in shown:
        assert re.search("accept.unbound", text[found.start() : found.end() + 200]), found[0]


def test_job_files_of_the_readme_can_be_loaded(tmp_path: Path) -> None:
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "source:" in block]
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "job.yaml").write_text(block)
        assert load_job(tmp_path / "job.yaml", {}).source.uri == yaml.safe_load(block)["source"]["uri"]
