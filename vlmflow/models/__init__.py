"""Model adapters: one protocol per capability, one module per model family.

The functions here are the only way in. What they need of torch is imported when a model is loaded, so that a driver
can resolve and identify models without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from vlmflow.config import Dtype, EndpointConfig, ModelConfig
from vlmflow.errors import ConfigError
from vlmflow.families import FAMILIES, Role, check_model, family_of, is_own, told_of
from vlmflow.imaging import PixelRequest
from vlmflow.models.identity import ModelIdentity, short_digest
from vlmflow.models.own import OwnEmbedder
from vlmflow.models.preprocessing import Preprocessing, read_preprocessing
from vlmflow.models.profiles import check_family, describe_profiles, resolve_models
from vlmflow.models.prompts import prompt_of
from vlmflow.models.vilbert import region_preprocessing
from vlmflow.models.weights import locate, weights_digest

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vlmflow.models.prompted import VisionChat
    from vlmflow.models.towers import VisionTowers

__all__ = [
    "Answer",
    "Answerer",
    "Captioner",
    "EncodedImages",
    "ImageEmbedder",
    "Matcher",
    "Metered",
    "ModelIdentity",
    "Usage",
    "describe_profiles",
    "identify",
    "load_answerer",
    "load_captioner",
    "load_embedder",
    "load_matcher",
    "locate",
    "pixel_request",
    "resolve_models",
]


class ImageEmbedder(Protocol):
    """Images and texts as unit vectors of one space. N: images or texts, S: side of the pixels, D: dimensions."""

    dim: int

    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, D) unit vectors."""

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts -> (N, D) unit vectors."""


class Captioner(Protocol):
    """One sentence for each image."""

    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        """(N, 3, S, S) uint8 RGB -> N captions of at most ``max_tokens`` tokens.

        Args:
            num_beams: 1: greedy decoding; more: beam search, the best of so many captions.
        """


@dataclass(frozen=True)
class EncodedImages:
    """Images after the vision tower, so that several lists of texts share one pass of it."""

    embeds: torch.Tensor  # (N, T, D): T patches and the class token, D dimensions; of dual encoders (N, D)

    def __len__(self) -> int:
        return len(self.embeds)

    def take(self, rows: Sequence[int]) -> EncodedImages:
        """Those of the given rows."""
        from vlmflow.models.upload import numbers

        return EncodedImages(self.embeds[numbers(rows, self.embeds.device)])

    def pairs_with(self, texts: Sequence[str]) -> bool:
        """Whether there is any pair of an image and a text.

        Raises:
            ValueError: the two differ in length.
        """
        if len(self) != len(texts):
            raise ValueError(f"{len(self)} images but {len(texts)} texts")
        return len(texts) > 0


class Matcher(Protocol):
    """How well texts fit images, by two heads whose values do not compare. None: the model has no such head."""

    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        """(N, 3, S, S) uint8 RGB -> N images for the methods below.

        A model that wants no pixels (:func:`pixel_request` is None) is given regions in their place.
        """

    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32] | None:
        """(N,) the probability that ``texts[i]`` and image i match, by the matching head."""

    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32] | None:
        """(N,) the cosine of ``texts[i]`` and image i, by the contrastive heads."""


@dataclass(frozen=True)
class Answer:
    """An answer to one question about one image."""

    text: str  # empty: the model wrote nothing
    score: float  # probability that the model gives it, in [0, 1]; not a number: the model tells none


@dataclass(frozen=True)
class Usage:
    """What a model that is paid for has spent."""

    requests: int = 0  # repeated ones included
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0  # by the prices of the job; 0 without


@runtime_checkable
class Metered(Protocol):
    """A model that may be paid for."""

    def take_usage(self) -> Usage | None:
        """What was spent since it was last asked; None: nothing is paid for."""


class Answerer(Protocol):
    """Answers questions about images. N: images, S: side of the pixels."""

    def answer(self, pixels: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Answers ``questions[i]``, of which there may be any number, about image i.

        An image is encoded once for all its questions, where the architecture allows it.

        Args:
            pixels: (N, 3, S, S) uint8 RGB; for a model that wants none, regions.

        Raises:
            QuestionError: a question is longer than the model can take.
            ValueError: there are not as many lists of questions as images, or a score that the model gives is not
                finite.
        """

    def check_questions(self, questions: Sequence[str]) -> None:
        """Makes sure that the model can take these questions.

        Raises:
            QuestionError: one is longer than it can take.
        """


def identify(role: str, config: ModelConfig) -> ModelIdentity:
    """What rows remember of the model, from its files alone; the model is not built.

    Raises:
        ConfigError: the model does not belong to the family of the role.
        FamilyError: the family is one's own, and its class cannot be used.
        WeightsError: the files are absent, or cannot be used.
    """
    check_family(role, config)
    if config.endpoint is not None:
        return _identify_endpoint(config.endpoint)
    folder = locate(config)
    preprocessing = _preprocessing(folder, config)
    files = config.repo or folder.name
    return ModelIdentity(
        id=f"{config.family}({files})" if is_own(config.family) else files,
        revision=config.revision or "local",
        weights_digest=weights_digest(folder, config.family, config.architecture),
        preprocessing=preprocessing.describe() if preprocessing else "regions of the source",
        code_version=family_of(config.family).code_version,
    )


def pixel_request(role: str, config: ModelConfig, views: tuple[str, ...]) -> PixelRequest | None:
    """The pixels that the model wants: all views for `embed`, the whole image alone for the others.

    Returns:
        None: it wants none, but regions that the source has a column of.

    Raises:
        WeightsError: a configuration file is absent, or asks for what vlmflow does not do.
    """
    if config.endpoint is not None:
        return PixelRequest(config.endpoint.max_side_px, "bicubic", ("squash",))
    preprocessing = _preprocessing(locate(config), config)
    if preprocessing is None:
        return None
    others = [view for view in views if view != "squash"] if role == "embed" else []
    return PixelRequest(preprocessing.size, preprocessing.interpolation, ("squash", *others))


def _identify_endpoint(endpoint: EndpointConfig) -> ModelIdentity:
    """What is known of a model that runs elsewhere: its name and where. What runs under the name may change."""
    address = urlsplit(endpoint.url)
    return ModelIdentity(
        id=endpoint.model,
        revision=address.netloc,
        weights_digest=short_digest({"url": endpoint.url, "model": endpoint.model}),
        preprocessing=json.dumps([endpoint.max_side_px, "jpeg"]),
        code_version=FAMILIES["endpoint"].code_version,
    )


def _preprocessing(folder: Path, config: ModelConfig) -> Preprocessing | None:
    return region_preprocessing(folder) if config.family == "vilbert" else read_preprocessing(folder, config)


def load_embedder(
    config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
) -> ImageEmbedder:
    """Loads an embedder of the configuration's family.

    Args:
        dtype: `auto`: bfloat16 on CUDA devices that have it, float32 elsewhere.
        towers: of the worker; a vision tower with equal weights is shared. None: the model has its own.

    Raises:
        ConfigError: the family does something else.
        FamilyError: it is one's own, and its class cannot be used or fails.
        WeightsError: the weights are absent, unsafe to load, or do not fit.
        ModelMemoryError: the device has no memory left for it.
    """
    embedder: ImageEmbedder = _load("embed", config, device, dtype, towers)
    return OwnEmbedder(config.family, embedder) if is_own(config.family) else embedder


def load_text_embedder(config: ModelConfig) -> ImageEmbedder:
    """As :func:`load_embedder`, in float32 on a processor; ready sooner, and slower with images.

    Raises:
        WeightsError: as that.
    """
    if config.family not in ("dual_encoder", "open_clip"):
        return load_embedder(config, "cpu", "float32")
    from vlmflow.device_errors import fitting

    with fitting("the model of embed", "cpu"):
        adapter = family_of(config.family).adapter("embed")
        embedder: ImageEmbedder = adapter.load(locate(config), config, "cpu", "float32", packs=False)
    return embedder


def load_captioner(
    config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
) -> Captioner:
    """Loads a captioner of the configuration's family.

    Args:
        dtype: `auto`: bfloat16 on CUDA devices that have it, float32 elsewhere.
        towers: of the worker; a vision tower with equal weights is shared. None: the model has its own.

    Raises:
        ConfigError: the family does something else.
        FamilyError: it is one's own, and its class cannot be used or fails.
        WeightsError: the weights are absent, unsafe to load, or do not fit.
        ModelMemoryError: the device has no memory left for it.
    """
    if _is_chat(config):
        from vlmflow.models.prompted import PromptedCaptioner

        prompt = prompt_of("caption", config)
        assert prompt is not None
        return PromptedCaptioner(_load_chat("caption", config, device, dtype), prompt)
    captioner: Captioner = _load("caption", config, device, dtype, towers)
    return captioner


def load_matcher(
    config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
) -> Matcher:
    """Loads an image-text matcher of the configuration's family.

    Args:
        dtype: `auto`: bfloat16 on CUDA devices that have it, float32 elsewhere.
        towers: of the worker; a vision tower with equal weights is shared. None: the model has its own.

    Raises:
        ConfigError: the family does something else.
        FamilyError: it is one's own, and its class cannot be used or fails.
        WeightsError: the weights are absent, unsafe to load, or do not fit.
        ModelMemoryError: the device has no memory left for it.
    """
    matcher: Matcher = _load("match", config, device, dtype, towers)
    return matcher


def load_answerer(
    config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
) -> Answerer:
    """Loads a model that answers questions.

    Args:
        dtype: `auto`: bfloat16 on CUDA devices that have it, float32 elsewhere.
        towers: of the worker; a vision tower with equal weights is shared. None: the model has its own.

    Raises:
        ConfigError: the family does something else.
        FamilyError: it is one's own, and its class cannot be used or fails.
        WeightsError: the weights are absent, unsafe to load, or do not fit.
        ModelMemoryError: the device has no memory left for it.
    """
    if _is_chat(config):
        from vlmflow.models.prompted import PromptedAnswerer

        prompt = prompt_of("answer", config)
        assert prompt is not None
        chat = _load_chat("answer", config, device, dtype)
        return PromptedAnswerer(chat, prompt, config.max_answer_tokens, marks=getattr(chat, "marks", ()))
    answerer: Answerer = _load("answer", config, device, dtype, towers)
    return answerer


def _load(role: Role, config: ModelConfig, device: str, dtype: Dtype, towers: VisionTowers | None = None) -> Any:
    """Never by the adapter of another family: weights that happened to fit would compute something else."""
    family = family_of(config.family)
    if role not in family.roles:
        raise ConfigError(
            f"models.{role}: no adapter is loaded for the family {config.family}",
            remedy="Use a model of another family, or name an adapter in the table of them (vlmflow/families.py).",
        )
    folder = locate(config)
    from vlmflow.device_errors import fitting

    if not is_own(config.family):
        shared = (towers,) if family.shares_tower else ()
        with fitting(f"the model of {role}", device):
            return family.adapter(role).load(folder, config, device, dtype, *shared)
    asked = config.model_copy(update={"prompt": prompt_of(role, config)})  # as rows will say that it was asked
    with told_of(config.family, "load"), fitting(f"the model of {role}", device):
        model = family.adapter(role).load(folder, asked, device, dtype)
    check_model(config.family, role, model)
    return model


def _is_chat(config: ModelConfig) -> bool:
    """Whether the model is asked in words by an adapter of ours, whatever writes."""
    family = family_of(config.family)
    return family.takes_prompt and not family.adapters


def _load_chat(role: Role, config: ModelConfig, device: str, dtype: Dtype) -> VisionChat:
    if config.family == "vlm":
        from vlmflow.device_errors import fitting
        from vlmflow.models.vlm import TransformersChat

        with fitting(f"the model of {role}", device):
            return TransformersChat.load(locate(config), device, dtype)
    if config.family == "vllm":
        from vlmflow.models.vllm import VllmChat

        return VllmChat.load(locate(config), device, dtype)
    from vlmflow.models.endpoint import EndpointChat

    assert config.endpoint is not None
    return EndpointChat(config.endpoint)
