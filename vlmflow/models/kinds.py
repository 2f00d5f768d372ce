"""Kinds of models and ways of quantizing that transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from vlmflow.errors import WeightsError
from vlmflow.models.weights import methods_of, read_json


def check_kind(folder: Path, model_class: Any, config: Any = None) -> None:
    """Refuses a kind of model that transformers does not have, or has for other tasks.

    Args:
        model_class: of transformers, which may choose by the configuration; what others read is theirs.
        config: instead of the folder's.

    Raises:
        WeightsError: names the kind.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or "auto_map" in values:  # timm's have none; of code of a folder transformers tells
        return
    if kind not in CONFIG_MAPPING:
        raise WeightsError(
            f"weights: {path}: transformers {transformers.__version__} has no model of model_type {kind[:40]}",
            remedy="Use another model, or the release of transformers that has it. Code of the folder is never run.",
        )
    known = getattr(model_class, "_model_mapping", None)
    if known is None or (CONFIG_MAPPING[kind] if config is None else type(config)) in known:
        return
    raise WeightsError(
        f"weights: {path}: transformers has no {model_class.__name__} of model_type {kind[:40]}",
        remedy="Use a model that was made for this.",
    )


def check_method(folder: Path) -> None:
    """Refuses weights quantized by a method that transformers passes over: it would take them for plain ones.

    Raises:
        WeightsError: names the method.
    """
    path = folder / "config.json"
    for method in methods_of(read_json(path), path):
        if method.get("load_in_4bit") or method.get("load_in_8bit"):  # by bitsandbytes, whatever it is called
            continue
        if method.get("quant_method") not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise WeightsError(
                f"weights: {path}: quantization_config: transformers {transformers.__version__} does not know the "
                f"method {str(method.get('quant_method'))[:40]}",
                remedy="Use the files in float32, float16 or bfloat16 that it was made of, or a server of models that "
                "reads them (`family: vllm`, or an endpoint).",
            )
