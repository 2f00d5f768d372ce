"""A published ViLBERT pickle to a folder: pretrained, multi-task, or tuned from those."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vlmflow.errors import WeightsError
from vlmflow.models.convert import ConversionInputs, ConversionReport, find_input, read_pickle
from vlmflow.models.vilbert.config import HEADS, VilbertConfig, parse_config
from vlmflow.models.vilbert.finders import REGIONS_FILE, ColumnRegions
from vlmflow.models.vilbert.load import ANSWERS_FILE
from vlmflow.models.vilbert.model import TIED, Vilbert
from vlmflow.models.weights import check_keys, read_json
from vlmflow.paths import is_folder

_WORDS = "bert.embeddings.word_embeddings.weight"
_TASKS = "bert.embeddings.task_embeddings.weight"
_PUBLISHED_REGIONS = 100  # of an image, besides the whole


def convert_vilbert(source: Path, folder: Path, inputs: ConversionInputs) -> ConversionReport:
    """Writes the folder of a published checkpoint; its regions are columns of the source.

    Raises:
        WeightsError: a file is absent, or the tensors do not fit the configuration.
    """
    weights = find_input(None, source, ("*.bin", "*.pth", "*.pt")) if is_folder(source) else source
    config_file = find_input(inputs.config, source, ("bert_*.json", "config.json"))
    vocabulary = find_input(inputs.vocabulary, source, ("vocab.txt",))
    answers_file = find_input(inputs.answers, source, (ANSWERS_FILE,))
    for what, path, option in (
        ("pickle", weights, ""),
        ("configuration, such as bert_base_6layer_6conect.json,", config_file, " with --config"),
        ("vocabulary, the vocab.txt of bert-base-uncased,", vocabulary, " with --vocab"),
    ):
        if path is None:
            raise WeightsError(f"convert: no {what} beside {source}", remedy=f"Put it there, or name it{option}.")
    assert weights is not None
    assert config_file is not None
    assert vocabulary is not None
    tensors = {_today(name): tensor for name, tensor in read_pickle(weights).items()}
    config = parse_config(read_json(config_file) | _settings(tensors, weights), what=str(config_file))
    tensors = _checked(tensors, config, weights)
    shutil.copyfile(vocabulary, folder / "vocab.txt")
    _write(folder / "config.json", read_json(config_file) | config.model_dump(mode="json"))
    _write(folder / REGIONS_FILE, ColumnRegions(kind="columns", max_regions=_PUBLISHED_REGIONS).model_dump())
    missing = _write_answers(folder, config, answers_file)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # all that it says of a full disk
        raise OSError(str(error)) from error
    return ConversionReport(
        folder=folder,
        files=sorted(path.name for path in folder.iterdir()),
        num_tensors=len(tensors),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        missing=missing,
    )


def _today(name: str) -> str:
    """Of checkpoints that began as TensorFlow's BERT."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _settings(tensors: dict[str, torch.Tensor], weights: Path) -> dict[str, Any]:
    """What the published configuration leaves out, read off the tensors."""
    heads = [head for head in HEADS if any(name.startswith(f"{head}.") for name in tensors)]
    if not heads or _WORDS not in tensors:
        raise WeightsError(
            f"convert: {weights} holds no ViLBERT: neither {_WORDS} with one of the heads {', '.join(HEADS)}",
            remedy="Name a checkpoint of vilbert-multi-task.",
        )
    settings: dict[str, Any] = {"heads": heads}
    sizes = {
        "num_answers": "vil_prediction.logit_fc.3.weight",
        "num_gqa_answers": "vil_prediction_gqa.logit_fc.3.weight",
        "num_task_tokens": _TASKS,
    }
    return settings | {setting: len(tensors[name]) for setting, name in sizes.items() if name in tensors}


def _checked(tensors: dict[str, torch.Tensor], config: VilbertConfig, weights: Path) -> dict[str, torch.Tensor]:
    """The tensors that the model needs, each once, in memory of its own."""
    with torch.device("meta"):
        expected = Vilbert(config).state_dict()
    check_keys(weights, set(expected) - set(tensors) - {TIED}, set(tensors) - set(expected))
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name].shape:
            raise WeightsError(
                f"convert: {name} is {tuple(tensors[name].shape)}, the configuration says "
                f"{tuple(expected[name].shape)}",
                remedy="Name the configuration that the checkpoint was trained with.",
            )
    if TIED in tensors and not torch.equal(tensors[TIED], tensors[_WORDS]):
        raise WeightsError(
            f"convert: {TIED} differs from {_WORDS}, of which it should be a copy",
            remedy="Name a checkpoint of vilbert-multi-task.",
        )
    return {name: tensors[name].clone().contiguous() for name in expected if name in tensors and name != TIED}


def _write_answers(folder: Path, config: VilbertConfig, path: Path | None) -> list[str]:
    """Copies the answers; returns what is missing."""
    if "vil_prediction" not in config.heads:
        return ["a head for questions: this is a pretrained checkpoint, it can match and nothing else"]
    if path is None:
        return [f"{ANSWERS_FILE}, a JSON list of {config.num_answers} answers: without it, no questions are answered"]
    try:
        text = path.read_text(encoding="utf-8")
        answers = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except OSError as error:
        raise WeightsError(f"convert: {path}: {error.strerror}", remedy="Name a JSON list of texts.") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"convert: {path} is not JSON", remedy="Write a JSON list of texts.") from error
    if not isinstance(answers, list) or len(answers) != config.num_answers:
        raise WeightsError(
            f"convert: {path} is no list of {config.num_answers} answers, which the model chooses among",
            remedy="Use trainval_label2ans of the same release, written as a JSON list.",
        )
    _write(folder / ANSWERS_FILE, [str(answer) for answer in answers])
    return []


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
