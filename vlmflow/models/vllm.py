"""Any image-text-to-text checkpoint that vLLM serves, asked in words; where vLLM is installed.

``ray.data.llm`` runs the same engine as a stage of a dataset that every row passes. Here it runs inside a pool's actor:
only rows that are due are asked about, and one that fails costs itself. The engine plans the memory of a whole GPU, so
give the task a pool of its own, with ``gpus: 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from vlmflow.config import Dtype
from vlmflow.errors import ConfigError
from vlmflow.models import Answer, Usage
from vlmflow.models.pretrained import in_our_words
from vlmflow.models.prompted import rows_of
from vlmflow.models.thoughts import NO_THOUGHT


class VllmChat:
    """Writes greedily; vLLM makes batches of its own. N: images, S: side of the pixels."""

    def __init__(self, engine: Any, sampling: Any) -> None:
        """``engine``: a ``vllm.LLM``; ``sampling``: the class ``vllm.SamplingParams``."""
        self._engine, self._sampling = engine, sampling

    @classmethod
    def load(cls, folder: Path, device: str, dtype: Dtype = "auto") -> Self:
        """Starts an engine with the safetensors of a folder.

        Raises:
            ConfigError: vLLM is not installed here.
            WeightsError: it cannot run these weights.
        """
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ConfigError(
                "family vllm: the package vllm is not installed where the model is to run",
                remedy="Install it on the GPU nodes, or use the family vlm.",
            ) from error
        remedy = "Check the folder and the GPU's memory, or use the family vlm."
        with in_our_words(folder, f"a model of vLLM on {device}", remedy):
            return cls(LLM(**engine_arguments(folder, dtype)), SamplingParams)

    def write(
        self,
        pixels: torch.Tensor,
        prompts: Sequence[str],
        max_tokens: int,
        num_beams: int = 1,
        *,
        rows: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Writes what each prompt asks for of its image; see :class:`vlmflow.models.prompted.VisionChat`.

        The score is the probability of all tokens written.
        """
        assert num_beams == 1, "jobs that want more are refused"
        images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image_pil", "image_pil": images[row]}, {"type": "text", "text": prompt}],
                }
            ]
            for row, prompt in zip(rows_of(pixels, prompts, rows), prompts, strict=True)
        ]
        sampling = self._sampling(temperature=0.0, max_tokens=max_tokens, logprobs=1)
        # Of these it passes on what the chat template reads.
        options = {"sampling_params": sampling, "chat_template_kwargs": dict(NO_THOUGHT), "use_tqdm": False}
        outputs = self._engine.chat(conversations, **options)
        return [_answer(output.outputs[0]) for output in outputs]

    def take_usage(self) -> Usage | None:
        """Nothing is paid for."""
        return None


def engine_arguments(folder: Path, dtype: Dtype) -> dict[str, Any]:
    """What the engine is given: safetensors alone, no code from the folder, one image a prompt."""
    return {
        "model": str(folder),
        "dtype": dtype,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "limit_mm_per_prompt": {"image": 1},
        "seed": 0,
    }


def _answer(completion: Any) -> Answer:
    logarithm = completion.cumulative_logprob
    return Answer(completion.text.strip(), math.nan if logarithm is None else math.exp(logarithm))
