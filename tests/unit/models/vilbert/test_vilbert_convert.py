"""Published pickles become folders, or are refused; no pickle is ever run."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.vilbert import NUM_TASK_TOKENS, make_published
from vlmflow.cli import app
from vlmflow.errors import ConfigError, WeightsError
from vlmflow.models.convert import ConversionInputs, convert_weights, read_pickle
from vlmflow.models.vilbert.load import load_vilbert
from vlmflow.models.vilbert.model import TIED


def test_a_multi_task_checkpoint_keeps_every_tensor(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published")
    answers = tmp_path / "answers.txt"
    answers.write_text("\n".join(f"answer {number}" for number in range(3129)), encoding="utf-8")
    report = convert_weights("vilbert", source, tmp_path / "out", ConversionInputs(answers=answers))
    assert report.missing == []
    assert report.folder == tmp_path / "out"
    assert set(report.files) == {"answers.json", "config.json", "model.safetensors", "regions.json", "vocab.txt"}
    published = torch.load(source / "multi_task_model.bin", weights_only=True)
    loaded = load_vilbert(tmp_path / "out").state_dict()
    assert loaded.keys() == published.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in published.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_task_tokens"] == NUM_TASK_TOKENS
    assert config["pooling_method"] == "mul", "what the published file says besides is kept"
    assert len(json.loads((tmp_path / "out" / "answers.json").read_text())) == 3129


def test_answers_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    source, answers = make_published(tmp_path / "published"), tmp_path / "answers.json"
    with pytest.raises(WeightsError, match=r"answers\.json does not exist"):
        convert_weights("vilbert", source, tmp_path / "out", ConversionInputs(answers=answers))
    answers.write_text("[" * 200_000)
    with pytest.raises(WeightsError, match=r"answers\.json is not JSON"):
        convert_weights("vilbert", source, tmp_path / "out", ConversionInputs(answers=answers))


def test_the_folder_may_be_the_one_stood_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_published(tmp_path / "published")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    report = convert_weights("vilbert", Path("../published"), Path())
    assert {path.name for path in Path().iterdir()} == set(report.files) > {"model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "published"}


def test_older_names_and_wrappers_are_understood(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published")
    path = source / "multi_task_model.bin"
    tensors = torch.load(path, weights_only=True)
    older = {
        "module." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }
    torch.save({"model_state_dict": older, "global_step": 7}, path)
    report = convert_weights("vilbert", str(source), str(tmp_path / "out"))
    assert report.num_tensors == len(tensors) - 1, "the tied weight is kept once"
    assert "answers.json" in report.missing[0]
    loaded = load_vilbert(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_pretrained_checkpoint_says_what_it_cannot_do(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published", pretrained=True)
    report = convert_weights("vilbert", source, tmp_path / "out")
    assert "pretrained" in report.missing[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["heads"] == ["cls"]


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_published(tmp_path / "published")
    torch.save({"bert": Payload()}, source / "multi_task_model.bin")
    with pytest.raises(WeightsError, match="not run"):
        convert_weights("vilbert", source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"published"}, "nothing is left half-written"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello world",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 10\n",
        b"Rar!\x1a\x07",
        b"a" * 40,
        pickle.dumps({"a": list(range(100))}, 2)[:40],
        b"PK\x03\x04" + b"\0" * 60,
    ],
    ids=["empty", "text", "lfs", "rar", "letters", "cut", "zip"],
)
def test_what_is_no_whole_pickle_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(WeightsError, match=r"model\.bin"):
        read_pickle(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("vision_logit.weight", torch.zeros(1, 5), r"vision_logit.weight is \(1, 5\)"),
        ("bert.encoder.extra.weight", torch.zeros(3), "1 unexpected"),
        (TIED, torch.zeros(97, 24), "should be a copy"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str, tensor: torch.Tensor, told: str) -> None:
    source = make_published(tmp_path / "published", changes={name: tensor})
    with pytest.raises(WeightsError, match=told):
        convert_weights("vilbert", source, tmp_path / "out")


def test_missing_tensors_are_counted(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published")
    tensors = torch.load(source / "multi_task_model.bin", weights_only=True)
    del tensors["bert.t_pooler.dense.bias"], tensors["bert.v_pooler.dense.bias"]
    torch.save(tensors, source / "multi_task_model.bin")
    with pytest.raises(WeightsError, match=r"2 missing \(bert.t_pooler.dense.bias, bert.v_pooler.dense.bias\)"):
        convert_weights("vilbert", source, tmp_path / "out")


@pytest.mark.parametrize(("gone", "told"), [("bert_small.json", "--config"), ("vocab.txt", "--vocab")])
def test_a_file_that_is_absent_is_asked_for(tmp_path: Path, gone: str, told: str) -> None:
    source = make_published(tmp_path / "published")
    (source / gone).unlink()
    with pytest.raises(WeightsError) as caught:
        convert_weights("vilbert", source, tmp_path / "out")
    assert told in caught.value.remedy


def test_other_models_and_full_folders_are_refused(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published")
    with pytest.raises(ConfigError, match="blip"):
        convert_weights("blip", source, tmp_path / "out")
    torch.save({"weight": torch.zeros(2)}, source / "multi_task_model.bin")
    with pytest.raises(WeightsError, match="no ViLBERT"):
        convert_weights("vilbert", source, tmp_path / "out")
    with pytest.raises(WeightsError, match="not empty"):
        convert_weights("vilbert", source, source)


def test_the_command_says_what_it_wrote_and_what_is_missing(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published")
    result = CliRunner().invoke(app, ["convert", "vilbert", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "model.safetensors" in shown
    assert "missing: answers.json" in shown


def test_two_at_once_do_not_write_into_one_another(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published")
    (other := tmp_path / ".out.partial").mkdir()
    (other / "model.safetensors").write_bytes(b"half")
    lock = os.open(other, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match=f"another conversion is writing to {tmp_path / 'out'}"):
            convert_weights("vilbert", source, tmp_path / "out")
        assert (other / "model.safetensors").read_bytes() == b"half"
    finally:
        os.close(lock)  # as if it had been killed: what it left goes
    convert_weights("vilbert", source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "published"}


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    source = make_published(tmp_path / "published")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Files are no larger than the weights want to be; the smaller ones before them fit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(ConfigError, match=rf"convert: {tmp_path / 'out'}: .*File too large"):
            convert_weights("vilbert", source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert {path.name for path in tmp_path.iterdir()} == {"published"}
