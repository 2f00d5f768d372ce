"""The sizes of a ViLBERT, read from its published configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmflow.errors import WeightsError
from vlmflow.models.weights import read_json
from vlmflow.validation import describe_validation

Head = Literal[
    "cls",
    "vil_prediction",
    "vil_prediction_gqa",
    "vil_binary_prediction",
    "vil_logit",
    "vil_tri_prediction",
    "vision_logit",
    "linguisic_logit",
]
# Those of the published multi-task checkpoints; the pretrained ones hold `cls` alone.
HEADS: tuple[Head, ...] = (
    "cls",
    "vil_prediction",
    "vil_prediction_gqa",
    "vil_binary_prediction",
    "vil_logit",
    "vil_tri_prediction",
    "vision_logit",
    "linguisic_logit",
)
Size = Annotated[int, Field(ge=1)]

# Switches of the original's command line that change what is computed, and that no published checkpoint uses.
_REFUSED = {"dynamic_attention": True, "with_coattention": False, "model": "roberta"}


class VilbertConfig(BaseModel):
    """The keys of the published file by their own names, and below them ours.

    Keys that only training reads, such as dropout, are passed over. ``v_`` is the visual stream, ``bi_`` where the
    two streams attend to each other; the rest is the text's.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    type_vocab_size: Size
    hidden_act: Literal["gelu"]
    v_feature_size: Size
    v_target_size: Size
    v_hidden_size: Size
    v_num_hidden_layers: Size
    v_num_attention_heads: Size
    v_intermediate_size: Size
    v_hidden_act: Literal["gelu"]
    bi_hidden_size: Size
    bi_num_attention_heads: Size
    v_biattention_id: tuple[int, ...]
    t_biattention_id: tuple[int, ...]
    fusion_method: Literal["mul", "sum"] = "mul"

    # What the published file leaves to the command line and to the code; `vlmflow convert` reads it off the tensors.
    heads: tuple[Head, ...] = HEADS
    num_answers: Size = 3129  # of vil_prediction
    num_gqa_answers: Size = 1533
    num_task_tokens: Annotated[int, Field(ge=0)] = 0  # 20 in the multi-task checkpoints; 0: no token names the task

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("v_hidden_size", "v_num_attention_heads"),
            ("bi_hidden_size", "bi_num_attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is no multiple of {heads} {getattr(self, heads)}")
        if len(self.v_biattention_id) != len(self.t_biattention_id):
            raise ValueError("v_biattention_id and t_biattention_id differ in length")
        for name, layers in (("v_biattention_id", "v_num_hidden_layers"), ("t_biattention_id", "num_hidden_layers")):
            places = getattr(self, name)
            if list(places) != sorted(places) or not all(0 <= place < getattr(self, layers) for place in places):
                raise ValueError(f"{name} {list(places)} must rise, within {layers} {getattr(self, layers)}")
        return self


def read_config(path: Path) -> VilbertConfig:
    """Reads a configuration file.

    Raises:
        WeightsError: it is absent, lacks a key, or asks for a variant that is not built here.
    """
    return parse_config(read_json(path), what=str(path))


def parse_config(values: dict[str, Any], *, what: str) -> VilbertConfig:
    """Checks the content of a configuration file.

    Raises:
        WeightsError: it lacks a key, or asks for a variant that is not built here.
    """
    for key, value in _REFUSED.items():
        if values.get(key) == value:
            raise WeightsError(
                f"weights: {what}: {key} is {value}", remedy="Use a checkpoint of the published configurations."
            )
    try:
        return VilbertConfig.model_validate(values)
    except ValidationError as error:
        raise WeightsError(
            describe_validation(error, what=f"weights: {what}"), remedy="Use the published configuration file."
        ) from error
