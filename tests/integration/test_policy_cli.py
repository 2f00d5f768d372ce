"""`vlmflow policy list|show|check|diff` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.catalog_samples import open_catalog
from vlmflow.cli import main
from vlmflow.engine.archive import archive_policy
from vlmflow.moderation.policy import load_policy, shipped_policies


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["policy", *map(str, arguments)])
    return int(stopped.value.code or 0)


def test_the_list_names_every_policy_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert {(row["name"], row["digest"]) for row in shown} == {(n, load_policy(n).digest) for n in shipped_policies()}
    assert run("list") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in shipped_policies())


def test_errors_fail_a_check_and_warnings_only_a_strict_one(policy: str, tmp_path: Path) -> None:
    text = Path(policy).read_text(encoding="utf-8")
    warned, wrong, broken = tmp_path / "warned.yaml", tmp_path / "wrong.yaml", tmp_path / "broken.yaml"
    warned.write_text(text.replace("a picture of a car]", "a picture of a car, A  picture of a CAR]"))
    wrong.write_text(text.replace("a bottle of wine", "Two  Guns"))
    broken.write_text(text.replace("review: 0.45", "review: 0.95"))
    assert [run("check", file) for file in (policy, warned, wrong, broken)] == [0, 0, 2, 2]
    assert [run("check", file, "--strict") for file in (policy, warned)] == [0, 2]


def test_a_check_says_what_and_what_to_do(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(Path(policy).read_text(encoding="utf-8").replace("a bottle of wine", "Two  Guns"))
    run("check", wrong)
    lines = capsys.readouterr().out
    assert "error" in lines.splitlines()[0]
    assert "'two guns'" in lines
    assert "Keep it in one place." in lines
    assert "1 errors" in lines
    run("check", wrong, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["where"] == "alcohol/bottle"


def test_the_profile_s_own_text_tower_judges_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = shipped_policies()["demo"].read_text(encoding="utf-8")
    close = tmp_path / "close.yaml"
    close.write_text(demo.replace("[a picture of a dagger, dagger]", "[a picture of a dagger, picture of a hammer]"))
    assert run("check", close, "--profile", "starter", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], 0 < report["limit"] < 1) == ("vlmflow/starter-clip", True)
    of_dagger = [finding for finding in report["findings"] if finding["where"] == "weapon/dagger"]
    assert any("'picture of a hammer' is nearer to the neutral 'a picture of a hammer'" in f["text"] for f in of_dagger)
    of_bindings = [finding["text"] for finding in report["findings"] if finding["where"] == "bindings"]
    assert any("not set for vlmflow/starter-clip" in text for text in of_bindings)
    assert run("check", "demo", "--profile", "huge") == 2
    assert "huge" in capsys.readouterr().err


def test_policies_of_files_names_and_catalogs_are_compared(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    archived = load_policy(policy)
    archive_policy(catalog, archived)
    stricter = tmp_path / "stricter.yaml"
    stricter.write_text(Path(policy).read_text(encoding="utf-8").replace("review: 0.45", "review: 0.3"))
    assert run("diff", f"{catalog.uri}@{archived.digest[:8]}", stricter, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changes"] == [{"where": "gun", "what": "review", "before": 0.45, "after": 0.3}]
    assert found["effect"] == "margins"
    assert run("diff", policy, stricter) == 0
    text = capsys.readouterr().out
    assert "0.45" in text
    assert "without any model" in " ".join(text.split())
    assert run("diff", f"{catalog.uri}@ffff", stricter) == 2
    assert "none of the archived policies" in " ".join(capsys.readouterr().err.split())
    assert run("diff", "marketplace", "family") == 0


def test_a_policy_that_a_catalog_keeps_becomes_a_file_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = open_catalog(tmp_path / "catalog")
    for name, path in shipped_policies().items():
        archived = load_policy(name)
        archive_policy(catalog, archived)
        assert run("show", name) == 0
        assert capsys.readouterr().out == path.read_text(encoding="utf-8")
        file = tmp_path / f"{name}.yaml"
        assert run("show", f"{catalog.uri}@{archived.digest[:12]}", "--output", file) == 0
        assert load_policy(str(file)) == archived
        assert list(yaml.safe_load(file.read_text(encoding="utf-8")))[-1] == "bindings"  # as calibrate wants it
    assert run("show", "nothing") == 2
    assert "no policy of this name ships" in " ".join(capsys.readouterr().err.split())
