"""ViLBERT against the published one: names and shapes at real size, numbers at small size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vilbert import (
    NUM_TASK_TOKENS,
    PUBLISHED,
    SMALL,
    read_golden,
    seeded_inputs,
    seeded_weights,
    text_of,
)
from vlmflow.errors import WeightsError
from vlmflow.models.vilbert.config import parse_config
from vlmflow.models.vilbert.model import TIED, Vilbert

HERE = Path(__file__).parent
GOLDEN = read_golden(HERE / "golden.json")

# "from approximately 3 billion parameters to 270 million": the abstract of arXiv:1912.02315.
PUBLISHED_PARAMETERS = 270_000_000


def shapes_of(model: Vilbert) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def meta(values: dict[str, Any]) -> Vilbert:
    with torch.device("meta"):
        return Vilbert(parse_config(values, what="test"))


def test_the_multi_task_model_has_the_published_tensors_and_size() -> None:
    model = meta(PUBLISHED | {"num_task_tokens": NUM_TASK_TOKENS})
    lines = (HERE / "published_tensors.txt").read_text(encoding="utf-8").splitlines()
    published = {line.split()[0]: tuple(int(side) for side in line.split()[1:]) for line in lines}
    assert shapes_of(model) == published
    count = sum(weight.numel() for weight in model.parameters())
    assert count == 268_028_859, "the tied weight counted once, as in the original"
    assert abs(count / PUBLISHED_PARAMETERS - 1) < 0.01


def test_the_pretrained_model_is_the_same_without_task_heads_and_task_tokens() -> None:
    model = meta(PUBLISHED | {"heads": ["cls"]})
    whole = shapes_of(meta(PUBLISHED | {"num_task_tokens": NUM_TASK_TOKENS}))
    own = {name: shape for name, shape in whole.items() if name.startswith(("bert.", "cls."))}
    del own["bert.embeddings.task_embeddings.weight"]
    assert shapes_of(model) == own
    assert sum(weight.numel() for weight in model.parameters()) == 250_044_029


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['fusion_method']}, task tokens {c['task_tokens']}")
def test_every_head_gives_what_the_original_gives(case: dict[str, Any]) -> None:
    has_task = case["task_tokens"]
    settings = {"fusion_method": case["fusion_method"], "num_task_tokens": NUM_TASK_TOKENS if has_task else 0}
    model = Vilbert(parse_config(SMALL | settings, what="test")).eval()
    weights = seeded_weights({name: shape for name, shape in shapes_of(model).items() if name != TIED})
    assert model.load_state_dict(weights, strict=False).missing_keys in ([], [TIED])
    model.tie_weights()
    inputs = seeded_inputs()
    shown = inputs["shown"].bool()
    with torch.inference_mode():
        regions = model.embed_regions(inputs["features"], inputs["places"], shown)
        encoded = model.encode(regions, text_of(inputs, has_task=has_task))
        reads = {
            "cls.imagePredictions": encoded.regions,
            "cls.predictions": encoded.words,
            "vision_logit": encoded.regions,
            "linguisic_logit": encoded.words,
            "vil_binary_prediction": encoded.pair.view(2, -1),
        }
        assert len(case["outputs"]) == 10
        for name, golden in case["outputs"].items():
            found = model.get_submodule(name)(reads.get(name, encoded.pair))[..., :6]
            wanted = torch.tensor(golden)
            if name == "vision_logit":  # the original puts -10,000 on padding, which is dropped here
                found, wanted = found[shown], wanted[shown]
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_one_image_serves_many_texts() -> None:
    model = Vilbert(parse_config(SMALL | {"num_task_tokens": NUM_TASK_TOKENS}, what="test")).eval()
    model.load_state_dict(seeded_weights(shapes_of(model)))
    inputs = seeded_inputs()
    with torch.inference_mode():
        regions = model.embed_regions(inputs["features"], inputs["places"], inputs["shown"].bool())
        text = text_of(inputs, has_task=True)
        alone = model.encode(regions.take([2, 2, 2, 2]), text).pair
        one_by_one = model.embed_regions(inputs["features"][2:3], inputs["places"][2:3], inputs["shown"][2:3].bool())
        again = model.encode(one_by_one.take([0, 0, 0, 0]), text).pair
    torch.testing.assert_close(alone, again)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dynamic_attention": True}, "dynamic_attention"),
        ({"with_coattention": False}, "with_coattention"),
        ({"model": "roberta"}, "roberta"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"v_biattention_id": [0, 9]}, "v_biattention_id"),
        ({"t_biattention_id": [2]}, "differ in length"),
        ({"bi_num_attention_heads": 5}, "bi_hidden_size"),
    ],
)
def test_a_variant_that_is_not_built_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        parse_config(SMALL | change, what="config.json")
