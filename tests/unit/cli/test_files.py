"""Files that commands are to write: what cannot be written is told before the work, in one line."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report_samples import put_rows
from vlmflow import cli
from vlmflow.catalog import Catalog
from vlmflow.cli import main
from vlmflow.cli.files import check_outputs, write_output
from vlmflow.config import CatalogConfig
from vlmflow.errors import ConfigError
from vlmflow.storage import check_on_disk

# Each writes where the last argument says.
WRITERS = [
    ["export", "{catalog}"],
    ["report", "{catalog}", "-o"],
    ["review", "export", "{catalog}"],
    ["explain", "{catalog}", "a", "--heatmap"],
    ["search", "{catalog}", "a dog", "--html"],
    ["search", "{catalog}", "a dog", "--csv"],
    ["duplicates", "{catalog}", "--csv"],
    ["titles", "{catalog}", "--csv"],
    ["alt-text", "{catalog}", "--csv"],
    ["calibrate", "{catalog}", "--policy", "demo", "--profile", "starter", "--report"],
    ["gate", "accept", "{tmp}", "--profile", "starter", "--accepted"],
    ["convert", "vilbert", "{tmp}"],
]


@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_the_uri_of_a_store_is_refused_where_a_path_is_wanted(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], run="first")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    place = "s3://bucket/out.html"
    with pytest.raises(SystemExit) as ended:
        main([*(word.format(catalog=config.uri, tmp=tmp_path) for word in arguments), place])
    assert ended.value.code == 2
    assert f"{place}: only a path of this machine can be used here" in capsys.readouterr().err
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("uri", ["s3://bucket/out", "gs://b/o", "https://host/a.csv", "file:///tmp/a"])
def test_what_a_path_made_of_a_uri_is_told_by_its_uri(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"^\w+://"):
        check_on_disk(Path(uri))


def test_standard_output_is_no_file() -> None:
    with pytest.raises(ConfigError, match=r"^-: standard input and output"):
        check_on_disk(Path("-"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["profiles"], ["policy", "show", "demo"]], ids=" ".join)
def test_a_full_disk_under_standard_output_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "vlmflow", *arguments]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    assert "standard output, or a temporary file: No space left on device - Make room there" in ended.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["profiles", "--json"], ["policy", "show", "demo"]], ids=" ".join)
def test_output_of_which_only_a_part_has_room_is_not_taken_for_the_whole(
    arguments: list[str], unbuffered: str, tmp_path: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-m", "vlmflow", *arguments]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=limit
        )
    assert (tmp_path / "out").stat().st_size <= 1024
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    assert "standard output, or a temporary file: File too large - Make room there" in ended.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/a/file"), "/a/file: too many open files - Allow more"),
        (RuntimeError("can't start new thread"), "no more threads - Allow more: `ulimit -u`"),
    ],
)
def test_what_the_system_refuses_a_process_is_one_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", "catalog"])
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, told in line) == (2, True)


def test_streams_that_are_closed_end_nothing_and_their_numbers_go_to_no_file(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], run="first")
    uri = Catalog.open(config).images(["uri"])["uri"][0].as_py()
    command = [sys.executable, "-m", "vlmflow", "erase", config.uri, "--uri", uri]
    ended = subprocess.run(["sh", "-c", '"$@" <&-', "-", *command], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, "Nobody can be asked - Give --yes" in ended.stderr) == (2, True)
    told = "import os, sys; from vlmflow import cli; cli.app = lambda **_: None; cli.main([]); print('x');"
    told += "print(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) > 2, file=open(sys.argv[2], 'w'))"
    command = [sys.executable, "-c", told, str(tmp_path / "file"), str(tmp_path / "told")]
    assert subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "-", *command]).returncode == 0
    assert (tmp_path / "told").read_text() == "True\n"


@pytest.mark.parametrize("path", ["out", "/tmp/s3:/x", "a:b/c", "folder/s3:/x", ".", "s3:"])
def test_a_path_stays_one(path: str) -> None:
    check_on_disk(Path(path))


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_outputs(None, tmp_path / "new.csv", Path(os.devnull))
    with pytest.raises(ConfigError, match="is a folder"):
        check_outputs(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        check_outputs(tmp_path / "absent" / "new.csv")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anything
    with pytest.raises(ConfigError, match=r"new\.csv: Permission denied"):
        check_outputs(tmp_path / "new.csv")


def test_what_cannot_be_written_after_all_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        write_output(tmp_path, "text")


def test_an_export_from_python_refuses_the_uri_of_a_store(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], run="first")
    with pytest.raises(ConfigError, match="s3://bucket/out: only a path"):
        Catalog.open(config).export("s3://bucket/out", with_embeddings=False)


def test_an_export_is_no_file_of_another_format(tmp_path: Path) -> None:
    config = CatalogConfig(uri=str(tmp_path / "catalog"))
    put_rows(config, ["a"], run="first")
    with pytest.raises(ConfigError, match=r"rows\.csv is the name of a file") as caught:
        Catalog.open(config).export(tmp_path / "rows.csv", with_embeddings=False)
    assert "DuckDB" in caught.value.remedy
    assert not (tmp_path / "rows.csv").exists()


def test_a_policy_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine := tmp_path / "mine.yaml").write_text("my work")
    with pytest.raises(SystemExit) as ended:
        main(["policy", "show", "demo", "--output", str(mine)])
    assert ended.value.code == 2
    assert f"policy {mine}: is there already - Name another file" in capsys.readouterr().err
    assert mine.read_text() == "my work"
