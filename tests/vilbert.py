"""Small ViLBERT folders with random weights, and the weights and inputs that golden outputs were made with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file

from tests.models import WORDS, write_json
from vlmflow.models.vilbert.config import parse_config
from vlmflow.models.vilbert.model import TIED, Text, Vilbert

# config/bert_base_6layer_6conect.json of facebookresearch/vilbert-multi-task.
PUBLISHED: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
    "v_feature_size": 2048,
    "v_target_size": 1601,
    "v_hidden_size": 1024,
    "v_num_hidden_layers": 6,
    "v_num_attention_heads": 8,
    "v_intermediate_size": 1024,
    "bi_hidden_size": 1024,
    "bi_num_attention_heads": 8,
    "bi_intermediate_size": 1024,
    "bi_attention_type": 1,
    "v_attention_probs_dropout_prob": 0.1,
    "v_hidden_act": "gelu",
    "v_hidden_dropout_prob": 0.1,
    "v_initializer_range": 0.02,
    "v_biattention_id": [0, 1, 2, 3, 4, 5],
    "t_biattention_id": [6, 7, 8, 9, 10, 11],
    "pooling_method": "mul",
}
# The same kind, small and uneven: layers before, between and after the connections.
SMALL = PUBLISHED | {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 5,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "v_feature_size": 12,
    "v_target_size": 9,
    "v_hidden_size": 32,
    "v_num_attention_heads": 4,
    "v_num_hidden_layers": 4,
    "v_intermediate_size": 20,
    "bi_hidden_size": 16,
    "bi_num_attention_heads": 2,
    "v_biattention_id": [1, 2],
    "t_biattention_id": [2, 4],
}
NUM_TASK_TOKENS = 20


def seeded_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors by a generator whose stream numpy promises never to change, in the order of the names."""
    rng = np.random.RandomState(0)
    weights = {}
    for name in sorted(shapes):
        values = 0.3 * rng.standard_normal(shapes[name])
        if re.search(r"(LayerNorm\d?|logit_fc\.2)\.weight$", name):
            values += 1  # as trained ones are: what texts and images differ in is to reach the heads
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def seeded_inputs() -> dict[str, torch.Tensor]:
    """Four pairs for SMALL: nine words and six regions at most, some of them padding."""
    rng = np.random.RandomState(1)
    mask, shown = np.ones((4, 9), np.int64), np.ones((4, 6), np.int64)
    mask[1, 5:], mask[3, 7:], shown[2, 3:] = 0, 0, 0
    return {
        "ids": torch.from_numpy(rng.randint(0, 97, (4, 9))),
        "mask": torch.from_numpy(mask),
        "features": torch.from_numpy(rng.standard_normal((4, 6, 12)).astype(np.float32)),
        "places": torch.from_numpy(rng.uniform(size=(4, 6, 5)).astype(np.float32)),
        "shown": torch.from_numpy(shown),
        "task": torch.from_numpy(rng.randint(0, NUM_TASK_TOKENS, 4)),
    }


def text_of(inputs: dict[str, torch.Tensor], *, has_task: bool) -> Text:
    return Text(inputs["ids"], inputs["mask"].bool(), inputs["task"] if has_task else None)


def make_vilbert(folder: Path, regions: dict[str, Any], *, num_features: int = 12, **changes: Any) -> Path:
    """Writes a folder as vlmflow loads it, with five answers and a vocabulary of words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    answers = ["yes", "no", "two", "red", "cat"]
    values = SMALL | {"vocab_size": len(vocabulary), "v_feature_size": num_features, "num_task_tokens": NUM_TASK_TOKENS}
    values |= {"num_answers": len(answers), "heads": ["vil_prediction", "vil_logit", "vision_logit"], **changes}
    model = Vilbert(parse_config(values, what="test"))
    weights = seeded_weights({name: tuple(value.shape) for name, value in model.state_dict().items() if name != TIED})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", values)
    write_json(folder / "regions.json", regions)
    write_json(folder / "answers.json", answers)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    return folder


def make_published(folder: Path, *, pretrained: bool = False, changes: dict[str, torch.Tensor] | None = None) -> Path:
    """Writes a pickle as published, of SMALL: the words' weight twice, and the files that belong to it."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"heads": ["cls"]} if pretrained else {"num_task_tokens": NUM_TASK_TOKENS}
    model = Vilbert(parse_config(SMALL | settings, what="test"))
    model.load_state_dict(seeded_weights({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    model.tie_weights()
    torch.save({**model.state_dict(), **(changes or {})}, folder / "multi_task_model.bin")
    write_json(folder / "bert_small.json", SMALL)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return folder


def make_detector(folder: Path) -> dict[str, Any]:
    """Writes the state dict of torchvision's smallest Faster R-CNN; returns the `regions.json` for it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "detector.safetensors")
    return {
        "kind": "detector",
        "architecture": name,
        "num_classes": 5,
        "size": 64,
        "max_regions": 6,
        "min_score": 0.0,
    }


def read_golden(path: Path) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return golden
