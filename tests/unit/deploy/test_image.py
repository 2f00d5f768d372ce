"""The image: its Dockerfile under a linter, its entrypoint and the script that makes secrets by running them."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_hadolint_has_nothing_to_say() -> None:
    command = [Path(sys.executable).parent / "hadolint", DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_versions_are_pinned_and_the_user_is_not_root() -> None:
    (base,) = re.findall(r"^FROM (\S+) AS base$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    installs = re.findall(r"pip install .*", DOCKERFILE)
    assert installs
    assert all("-c deploy/constraints.txt" in install for install in installs)
    assert int(re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)[-1]) > 0
    assert "HEALTHCHECK" in DOCKERFILE
    # No development tools: neither their packages nor the tests.
    assert ".[dev]" not in DOCKERFILE
    assert not re.search(r"^COPY (?:.* )?(?:tests|\.) ", DOCKERFILE, re.MULTILINE)


def test_prefect_reports_no_use_to_its_makers() -> None:
    off = ("PREFECT_SERVER_ANALYTICS_ENABLED=false", "DO_NOT_TRACK=1")
    assert all(f"    {setting} \\\n" in DOCKERFILE for setting in off)
    text = (DEPLOY / "README.md").read_text(encoding="utf-8").partition("## One machine")[2].partition("\n## ")[0]
    started = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if " start" in block]
    assert [block for block in started if f"export {off[0]} {off[1]}" not in block] == []
    assert len(started) == 2


def test_the_variant_with_cuda_has_a_compiler() -> None:
    # podman does not resolve an argument in the name of a stage.
    assert not re.search(r"^FROM .*\$", DOCKERFILE, re.MULTILINE)
    run = DOCKERFILE.partition("FROM base AS run")[2]
    # Without its own ARG the stage would know no variant, and Triton would find no compiler.
    assert run.index("ARG VARIANT=cpu\n") < run.index('if [ "$VARIANT" = cuda ]; then apt-get install')


def test_all_that_is_copied_is_there_and_reaches_the_build() -> None:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in patterns
    kept = [line.removeprefix("!") for line in patterns if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE)
    for name in (word for line in copied for word in line.split()):
        assert (ROOT / name).exists(), name
        assert any(fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}/") for pattern in kept), name
    secret = ("deploy/secrets", "deploy/.env", ".git")
    assert not any(fnmatch.fnmatch(name, pattern) for name in secret for pattern in kept)


def test_the_entrypoint_turns_files_into_variables(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from the file", encoding="utf-8")
    show = 'echo "$AWS_SECRET_ACCESS_KEY|${AWS_SECRET_ACCESS_KEY_FILE-}|$1"'
    done = subprocess.run(
        ["sh", str(DEPLOY / "entrypoint.sh"), "sh", "-c", show, "-", "two words"],
        env={"PATH": os.environ["PATH"], "AWS_SECRET_ACCESS_KEY_FILE": str(tmp_path / "key")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "from the file||two words\n"


def test_the_entrypoint_stops_where_a_secret_is_absent(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(DEPLOY / "entrypoint.sh"), "true"],
        env={"PATH": os.environ["PATH"], "AWS_SECRET_ACCESS_KEY_FILE": str(tmp_path / "none")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert str(tmp_path / "none") in done.stderr


def test_the_entrypoint_stops_where_a_secret_is_empty(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("\n", encoding="utf-8")
    done = subprocess.run(
        ["sh", str(DEPLOY / "entrypoint.sh"), "echo", "started"],
        env={"PATH": os.environ["PATH"], "PREFECT_SERVER_API_AUTH_STRING_FILE": str(tmp_path / "auth")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"{tmp_path / 'auth'}, named by PREFECT_SERVER_API_AUTH_STRING_FILE, is empty" in done.stderr


def test_every_secret_file_of_the_compose_file_is_known_to_the_entrypoint() -> None:
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    ours = set(re.findall(r"((?:AWS|PREFECT)\w+)_FILE:", compose))
    entrypoint = (DEPLOY / "entrypoint.sh").read_text(encoding="utf-8")
    assert ours == set(re.findall(r"\b(?:AWS|PREFECT)_\w+", entrypoint))


# An engine that answers as a good image lets it; a line of its own before the rest spoils one answer.
_ENGINE = """#!/bin/sh
echo "$*" >> "$0.said"
{spoiled}
case "$*" in
    *"id -u") echo 10001 ;;
    *cmdline) printf 'tini\\0--\\0' ;;
    *demo*) echo 'run 1' ;;
    inspect*) echo 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("spoiled", "told"),
    [
        ("", ""),
        ('case "$*" in *"id -u") echo 0; exit ;; esac', "user is not 10001"),
        ('case "$*" in *cmdline) echo sh; exit ;; esac', "tini is not the first process"),
        ('case "$*" in *demo*) exit ;; esac', "the demo shows no run"),
        ('case "$*" in inspect*) echo 137; exit ;; esac', "had to be killed"),
        ('case "$*" in *doctor) exit 2 ;; esac', ""),
    ],
)
def test_a_bad_image_does_not_pass_for_a_good_one(spoiled: str, told: str, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text(_ENGINE.format(spoiled=spoiled), encoding="utf-8")
    engine.chmod(0o755)
    done = subprocess.run(
        ["sh", str(DEPLOY / "smoke.sh"), "an-image"], env=os.environ | {"ENGINE": str(engine)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == bool(spoiled)
    assert told in done.stderr
    said = Path(f"{engine}.said").read_text(encoding="utf-8").splitlines()
    assert said[-1].startswith("rm --force vlmflow-smoke-")  # nothing is left behind
    assert all("an-image" in line for line in said if line.startswith("run "))


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    shutil.copy(DEPLOY / "secrets.sh", tmp_path)
    subprocess.run(["sh", str(tmp_path / "secrets.sh")], check=True, capture_output=True)
    return tmp_path / "secrets"


def test_secrets_are_made_once_and_for_nobody_else(secrets: Path) -> None:
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    before = {path.name: path.read_text(encoding="utf-8") for path in secrets.iterdir()}
    assert all(len(text) >= 20 and text == text.strip() for name, text in before.items() if not name.endswith(".json"))
    assert len(set(before.values())) == len(before)
    assert f'"secretKey": "{before["aws_secret_access_key"]}"' in before["store_identities.json"]

    told = subprocess.run(["sh", str(secrets.parent / "secrets.sh")], check=True, capture_output=True, text=True)

    assert {path.name: path.read_text(encoding="utf-8") for path in secrets.iterdir()} == before
    assert not any(text in told.stdout + told.stderr for text in before.values())


def test_no_secret_is_made_without_random_bytes(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "secrets.sh", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "od").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tools / "od").chmod(0o755)
    command = ["sh", str(tmp_path / "secrets.sh")]
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "deploy/secrets/ray_token would be too short" in done.stderr
    assert not (tmp_path / "secrets" / "ray_token").exists()


def test_a_secret_that_is_empty_is_made_anew(secrets: Path) -> None:
    kept = (secrets / "postgres_password").read_text(encoding="utf-8")
    (secrets / "ray_token").unlink()
    (secrets / "ray_token").touch(mode=0o444)
    subprocess.run(["sh", str(secrets.parent / "secrets.sh")], check=True, capture_output=True)
    assert len((secrets / "ray_token").read_text(encoding="utf-8")) == 64
    assert stat.S_IMODE((secrets / "ray_token").stat().st_mode) == 0o444
    assert (secrets / "postgres_password").read_text(encoding="utf-8") == kept


def test_git_takes_no_secrets() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split("\n")
    assert {"/deploy/secrets/", "/deploy/.env"} <= set(ignored)
