"""The prompts of a policy as vectors: encoded once, in float32 on the CPU, and archived beside the policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from vlmflow.errors import PolicyError
from vlmflow.models.unit import check_unit
from vlmflow.moderation.policy import Policy, prompts_digest

if TYPE_CHECKING:
    from vlmflow.models import ImageEmbedder


@dataclass(frozen=True, eq=False)
class PromptVectors:
    """What images are compared with. L: labels, P: neutral prompts, D: dimensions of the embeddings."""

    labels: NDArray[np.float32]  # (L, D): the mean over each label's prompts, in the order of `Policy.labels`
    neutral: NDArray[np.float32]  # (P, D): unit vectors
    temperature: float
    digest: str  # :func:`vlmflow.moderation.policy.prompts_digest` of the policy

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        metadata = {"prompts_digest": self.digest, "temperature": json.dumps(self.temperature)}
        return safetensors.numpy.save({"labels": self.labels, "neutral": self.neutral}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> PromptVectors:
        """Reads what :meth:`to_bytes` wrote, bit for bit.

        Raises:
            PolicyError: the bytes are no such file.
        """
        try:
            tensors = safetensors.numpy.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            return cls(
                tensors["labels"], tensors["neutral"], json.loads(header["temperature"]), header["prompts_digest"]
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise PolicyError(
                f"archived prompt vectors cannot be read: {type(error).__name__}", remedy="Encode the prompts again."
            ) from error


def encode_prompts(policy: Policy, embedder: ImageEmbedder) -> PromptVectors:
    """Encodes the policy's prompts with the text tower of the embedder, which should be in float32 on the CPU.

    A label's vector is the mean of its prompts' unit vectors and is not scaled back to unit length: its product
    with an image is then the mean of the cosines, comparable between labels with one prompt and with many.

    Raises:
        ValueError: the embedder gave something other than a unit vector for each prompt.
        FamilyError: it is of one's own family, and did, or failed.
    """
    prompts = [prompt for label in policy.each_label() for prompt in label.prompts]
    vectors = embedder.embed_texts([*prompts, *policy.neutral])
    check_unit(vectors, (len(prompts) + len(policy.neutral), embedder.dim))
    means, start = [], 0
    for label in policy.each_label():
        stop = start + len(label.prompts)
        means.append(vectors[start:stop].mean(axis=0, dtype=np.float64))
        start = stop
    return PromptVectors(
        labels=np.stack(means).astype(np.float32),
        neutral=np.ascontiguousarray(vectors[start:], dtype=np.float32),
        temperature=policy.temperature,
        digest=prompts_digest(policy),
    )
