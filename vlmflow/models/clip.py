"""CLIP and SigLIP through open_clip (Radford et al. 2021, arXiv:2103.00020; Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.factory import load_checkpoint
from open_clip.model import convert_weights_to_lp
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors import SafetensorError
from transformers.initialization import no_init_weights

from vlmflow.config import Dtype, ModelConfig
from vlmflow.device_errors import is_device_broken, is_out_of_memory
from vlmflow.errors import WeightsError
from vlmflow.models.attention import growing
from vlmflow.models.clip_packed import can_pack, pack_image_tower, take_pixels, takes_pixels
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import (
    as_weights_error,
    check_finite,
    check_numbers,
    check_padding,
    check_words,
    for_model,
    in_our_words,
)
from vlmflow.models.sizes import in_few_sizes
from vlmflow.models.upload import to_device
from vlmflow.models.weights import check_keys, find_weights, read_open_clip_model
from vlmflow.paths import is_file

_TEXTS_AT_ONCE = 256

Tokenize = Callable[[list[str]], torch.Tensor]


class ClipEmbedder:
    """Embeds images and texts with any architecture that open_clip knows."""

    def __init__(self, model: torch.nn.Module, tokenize: Tokenize, normalize: PixelNormalizer, dim: int) -> None:
        self._model = model
        self._tokenize = tokenize
        self._normalize = normalize
        self.dim = dim

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", *, packs: bool = True
    ) -> ClipEmbedder:
        """Builds the model from its configuration and fills in the safetensors.

        Args:
            packs: the weights of the image tower, for speed.

        Raises:
            WeightsError: the weights are absent or do not fit, the configuration names what open_clip would
                download or run, or the model cannot embed an image and a text.
        """
        architecture = read_open_clip_model(folder, config.architecture)
        _refuse_remote_parts(folder, architecture)
        preprocessing = read_preprocessing(folder, config)
        wanted = model_dtype(device, dtype)
        if torch.device(device).type != "cpu":
            normalize = PixelNormalizer(preprocessing, device, wanted)
            model = build(folder, config.architecture, device, wanted, packed_for=normalize if packs else None)
        else:
            model = build(folder, config.architecture, device, torch.float32)
            if packs and pack_image_tower(model, wanted):
                wanted = torch.float32  # of all of the packed tower but its products
            elif wanted != torch.float32:
                model = build(folder, config.architecture, device, wanted)
            normalize = PixelNormalizer(preprocessing, device, wanted)
        tokenize = _load_tokenizer(folder, architecture["text_cfg"], model)
        embedder = cls(model, tokenize, normalize, architecture["embed_dim"])
        embedder._try_out(folder, preprocessing.size)
        return embedder

    @torch.inference_mode()
    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, D) unit vectors."""
        return _unit(image_features(self._model, self._normalize, pixels))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts -> (N, D) unit vectors; a text longer than the model's context is cut."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        device = next(self._model.parameters()).device
        tokens = self._tokenize(list(texts))
        with growing(device):
            parts = [
                _unit(self._model.encode_text(to_device(tokens[start : start + _TEXTS_AT_ONCE], device)))  # type: ignore[operator]
                for start in range(0, len(tokens), _TEXTS_AT_ONCE)
            ]
        return np.concatenate(parts)

    def _try_out(self, folder: Path, size: int) -> None:
        """Embeds a black image and a word: open_clip builds many a model that fails at every image."""
        what = f"the model of {folder} cannot embed an image of {size} pixels a side and a word"
        with as_weights_error(what, "Copy open_clip_config.json again from where the model was published."):
            images, texts = (
                self.embed_images(torch.zeros((1, 3, size, size), dtype=torch.uint8)),
                self.embed_texts(["a"]),
            )
            check_finite(folder, self._normalize.dtype, torch.from_numpy(images), torch.from_numpy(texts))
            if images.shape != (1, self.dim) or texts.shape != (1, self.dim):
                raise ValueError(f"image and text are no vectors of embed_dim, which is {self.dim}")


def image_features(model: Any, normalize: PixelNormalizer, pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, S, S) uint8 RGB -> (N, D) of any length, in the model's dtype."""

    def encode(given: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = model.encode_image(given if takes_pixels(model) else normalize(given))
        return features

    return in_few_sizes(encode, pixels, normalize)


def load_tower(folder: Path, config: ModelConfig, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The vision tower alone, for a model that stands on its patches.

    Raises:
        WeightsError: as :meth:`ClipEmbedder.load`.
    """
    _refuse_remote_parts(folder, read_open_clip_model(folder, config.architecture))
    model = build(folder, config.architecture, device, torch.float32)
    tower: torch.nn.Module = model.visual  # type: ignore[assignment]
    return tower.to(dtype)


def build(
    folder: Path,
    architecture: str | None,
    device: str,
    dtype: torch.dtype,
    *,
    packed_for: PixelNormalizer | None = None,
) -> torch.nn.Module:
    """The model as open_clip has it, with the weights of the folder.

    Args:
        packed_for: with packed layers in its image tower, where they can be, which then takes pixels as they are and
            normalises them so; None: as open_clip has it.

    Raises:
        WeightsError: they do not fit.
    """
    has_config = is_file(folder / "open_clip_config.json")
    name = f"local-dir:{folder}" if has_config else str(architecture)
    # Norms in float32: with "pure_bf16" scores of the starter moved by up to 0.0098, and by 0.0079 so (bar 0.01).
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    model = _create(folder, name, precision, device)
    is_packed = packed_for is not None and can_pack(model)
    if is_packed:
        model.float()  # so that what is packed is rounded once
    (weights,) = find_weights(folder, "open_clip")
    try:
        keys = load_checkpoint(model, str(weights), strict=False)
    # RuntimeError: shapes that differ; StopIteration: there is no tensor; AttributeError: a bias that nothing takes
    except (AttributeError, RuntimeError, SafetensorError, StopIteration) as error:
        if is_out_of_memory(error) or is_device_broken(error):
            raise
        reason = " ".join(str(error).split())[:200] or "it holds no tensors"
        raise WeightsError(
            f"weights: {weights} does not fit its architecture: {reason}",
            remedy="Use the configuration file that belongs to these weights.",
        ) from error
    check_keys(folder, keys.missing_keys, keys.unexpected_keys)
    check_numbers(folder, model)
    if packed_for is not None and is_packed:
        pack_image_tower(model, dtype, carried=dtype)
        take_pixels(model, packed_for, dtype)
        if dtype != torch.float32:
            convert_weights_to_lp(model, dtype)
    return model.eval().requires_grad_(False)


def _create(folder: Path, name: str, precision: str, device: str) -> torch.nn.Module:
    """The architecture; open_clip's own loading may pick a pickle beside the safetensors, and is left out."""
    what = f"open_clip cannot build the model that {folder} describes"
    wrong = as_weights_error(what, "Copy open_clip_config.json again from where the model was published.")
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "initialized randomly"
    try:
        # Random numbers for weights that are all loaded below would take seconds.
        with wrong, no_init_weights():
            model: torch.nn.Module = open_clip.create_model(
                name, load_weights=False, pretrained_text=False, precision=precision, device=device
            )
    finally:
        logging.disable(previous)
    return model


def _refuse_remote_parts(folder: Path, architecture: dict[str, Any]) -> None:
    """open_clip fetches some towers from the hub by name, at no revision, whatever the folder holds."""
    remote = architecture.get("text_cfg", {}).get("hf_model_name")
    timm_name = architecture.get("vision_cfg", {}).get("timm_model_name") or ""
    remote = remote or (timm_name if ":" in timm_name else None)
    if remote:
        raise WeightsError(
            f"weights: {folder} builds a tower from {remote}, which open_clip downloads at no fixed revision",
            remedy="Use a model whose towers open_clip defines itself.",
        )


def _load_tokenizer(folder: Path, text_config: dict[str, Any], model: torch.nn.Module) -> Tokenize:
    context_length = text_config.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = dict(text_config.get("tokenizer_kwargs") or {})
    if mask := options.get("reduction_mask"):
        raise WeightsError(
            f"weights: {folder} drops words of long texts by reduction_mask {mask!r}, at random or by a package that "
            "downloads: a text would not have one vector",
            remedy="Remove reduction_mask from tokenizer_kwargs in open_clip_config.json: longer texts are then cut at "
            f"{context_length} tokens.",
        )
    if not text_config.get("hf_tokenizer_name"):
        with in_our_words(folder, "open_clip's own tokenizer", "Correct tokenizer_kwargs in open_clip_config.json."):
            tokenize: Tokenize = SimpleTokenizer(context_length=context_length, **options)
        if (there := tokenize.vocab_size) > (known := _num_words(model)):  # type: ignore[attr-defined]
            raise WeightsError(
                f"weights: the text tower of {folder} has {known} words, and open_clip's own tokenizer {there}",
                remedy="Name the model's tokenizer as hf_tokenizer_name in open_clip_config.json, and copy its files.",
            )
        return tokenize
    # The options come from the folder: they must not switch remote code on.
    options |= {"trust_remote_code": False, "local_files_only": True}
    with in_our_words(folder, "a tokenizer", "Copy the model's tokenizer files."):
        mode = text_config.get("tokenizer_mode")
        of_folder: Tokenize = HFTokenizer(str(folder), context_length=context_length, tokenizer_mode=mode, **options)
        check_words(folder, of_folder.tokenizer)  # type: ignore[attr-defined]
    check_padding(folder, of_folder.tokenizer)  # type: ignore[attr-defined]
    of_folder.tokenizer = for_model(folder, of_folder.tokenizer, _num_words(model))  # type: ignore[attr-defined]
    return of_folder


def _num_words(model: torch.nn.Module) -> int:
    """For which a text tower of open_clip or, within one, of transformers has rows."""
    text: Any = getattr(model, "text", model)
    words = text.token_embedding if hasattr(text, "token_embedding") else text.transformer.get_input_embeddings()
    found: int = words.num_embeddings
    return found


def _unit(features: torch.Tensor) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    return vectors
