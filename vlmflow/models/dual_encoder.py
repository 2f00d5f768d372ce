"""Dual encoders as transformers saves them: embeddings and contrastive matching.

CLIP (Radford et al. 2021, arXiv:2103.00020), SigLIP (Zhai et al. 2023, arXiv:2303.15343) and SigLIP 2 (Tschannen et al.
2025, arXiv:2502.14786), of a fixed resolution or of any (NaFlex), which is shown squares here, MetaCLIP 2 (Chuang et
al. 2025, arXiv:2507.22062), Chinese-CLIP (Yang et al. 2022, arXiv:2211.01335), AltCLIP (Chen et al. 2022,
arXiv:2211.06679), TIPSv2 (google/tipsv2-b14), and ALIGN (Jia et al. 2021, arXiv:2102.05918). An encoder of images and
one of texts meet in a contrastive space and nowhere else: there is no matching head, so that ``caption_itm`` and
``text_itm`` of rows that such a model matched are null. N: images or texts, L: tokens of a text, D: dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModel

from vlmflow.config import Dtype, ModelConfig
from vlmflow.device_errors import is_device_broken, is_out_of_memory
from vlmflow.errors import WeightsError
from vlmflow.models import EncodedImages
from vlmflow.models.attention import growing
from vlmflow.models.blocks import Block
from vlmflow.models.packed import PackedTower, linear, pack_block
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import ONE_MODEL, check_finite, load_model, load_text_tokenizer, tokenize
from vlmflow.models.sizes import in_few_sizes
from vlmflow.models.towers import SharedTower, VisionTowers, content_of
from vlmflow.models.upload import to_device
from vlmflow.models.vectors import TEXTS_AT_ONCE, cosines, to_unit
from vlmflow.models.weights import check_keys, read_json

logger = logging.getLogger("vlmflow")

_MIN_TOKENS = 3  # a word between begin and end
# By the model_type: texts of these fill up their context, as they were trained.
_FILLING = frozenset(("siglip", "siglip2"))
# By the model_type: the layers of their image encoders are not CLIP's, or see a mask.
_UNPACKED = frozenset(("align", "siglip2", "tipsv2"))


class DualEmbedder:
    """Images and texts as unit vectors of the contrastive space.

    Attributes:
        dim: D.
        tower: (N, 3, S, S) uint8 RGB -> (N, D) in the contrastive space. A matcher of a worker has the same.
    """

    def __init__(self, model: Any, tokenize_texts: TextTokenizer, normalizer: PixelNormalizer) -> None:
        """``model``: of transformers, one of the ``model_types`` of its family."""
        self._model, self._tokenize, self._normalize = model, tokenize_texts, normalizer
        self.tower = SharedTower(self._encode, keeps_batch=True)
        self.dim = _dim(model.config)

    @classmethod
    def load(
        cls,
        folder: Path,
        config: ModelConfig,
        device: str,
        dtype: Dtype = "auto",
        towers: VisionTowers | None = None,
        *,
        packs: bool | None = None,
    ) -> Self:
        """Loads a model of one of the ``model_types`` of the family from a folder.

        Args:
            packs: the layers of the image encoder, for speed. None: on processors, where it is measured; on CUDA no
                GPU has run them yet.

        Raises:
            WeightsError: the weights are absent, of a kind that the family does not read, of one encoder alone, or do
                not fit; or the model cannot embed an image and a text with what lies beside it.
        """
        wanted = model_dtype(device, dtype)
        packs = torch.device(device).type == "cpu" if packs is None else packs
        packs = packs and config.family != "align"  # whose images pass convolutions
        if towers is None:
            return cls._of_files(folder, config, device, wanted, packs=packs)
        content = content_of(folder, config, read_preprocessing(folder, config), device, wanted)
        return towers.share_model((packs, content), lambda: cls._of_files(folder, config, device, wanted, packs=packs))

    @classmethod
    def _of_files(cls, folder: Path, config: ModelConfig, device: str, dtype: torch.dtype, *, packs: bool) -> Self:
        preprocessing = read_preprocessing(folder, config)
        packs = packs and read_json(folder / "config.json").get("model_type") not in _UNPACKED
        # On a processor all of a packed encoder is in float32 but its products.
        carried = torch.float32 if packs and torch.device(device).type == "cpu" else dtype
        # What is packed is rounded once.
        model, missing, unexpected = load_model(AutoModel, folder, torch.float32 if packs else dtype, device)
        _check_encoders(folder, model, missing)
        check_keys(folder, missing, unexpected)
        tokenizer = TextTokenizer(folder, model)
        model = model.to(device)
        if packs:
            pack_layers(model, dtype, carried)
            model = model.to(carried)
        embedder = cls(model, tokenizer, PixelNormalizer(preprocessing, device, carried))
        embedder._try_out(folder, preprocessing.size)
        return embedder

    @torch.inference_mode()
    def embed_images(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """(N, 3, S, S) uint8 RGB -> (N, D) unit vectors."""
        return to_unit(self.tower(pixels))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts -> (N, D) unit vectors; a text longer than the model's context is cut."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate([to_unit(self.text_features(part)) for part in parts])

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """N texts -> (N, D) in the contrastive space."""
        inputs = {name: to_device(values, self._model.device) for name, values in self._tokenize(texts).items()}
        with growing(self._model.device):
            features: torch.Tensor = self._model.get_text_features(**inputs, return_dict=True).pooler_output
        return features

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return in_few_sizes(self._image_features, pixels, self._normalize)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        shown = self._normalize(pixels)
        config = self._model.config
        inputs = {"pixel_values": shown}
        if config.model_type == "siglip2":
            inputs = _as_patches(shown, config.vision_config.patch_size)
        found = self._model.get_image_features(**inputs, return_dict=True)
        features: torch.Tensor = found.pooler_output
        return features

    @torch.inference_mode()
    def _try_out(self, folder: Path, size: int) -> None:
        """Embeds a black image and a word: files that contradict each other would fail at every image of a run."""
        try:
            pixels = torch.zeros((1, 3, size, size), dtype=torch.uint8)
            features = self._encode(pixels), self.text_features(["a"])
            found = [vectors.shape[-1] for vectors in features]
        except Exception as error:
            if is_out_of_memory(error) or is_device_broken(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise WeightsError(
                f"weights: the model of {folder} cannot embed an image of {size} pixels a side and a word: {reason}",
                remedy="Copy the files of one model that embeds images and texts, config.json first.",
            ) from error
        check_finite(folder, self._normalize.dtype, *features)
        if found != [self.dim, self.dim]:
            raise WeightsError(
                f"weights: the model of {folder} embeds images in {found[0]} dimensions and texts in {found[1]}",
                remedy="Use a model that embeds both in one space.",
            )


class DualMatcher:
    """How well texts fit images, by the contrastive space alone."""

    def __init__(self, embedder: DualEmbedder) -> None:
        self._embedder = embedder

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
    ) -> Self:
        """Loads what :meth:`DualEmbedder.load` does; of equal files the worker's embedder is the one.

        Raises:
            WeightsError: as that.
        """
        logger.warning("match: %s has no matching head: caption_itm and text_itm stay null", folder.name)
        return cls(DualEmbedder.load(folder, config, device, dtype, towers))

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        """(N, 3, S, S) uint8 RGB -> N images for the contrastive head."""
        return EncodedImages(self._embedder.tower(pixels))

    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> None:
        """There is no matching head.

        Raises:
            ValueError: images and texts differ in number.
        """
        images.pairs_with(texts)

    @torch.inference_mode()
    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i.

        Returns:
            (N,) the cosine, in [-1, 1].

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        return cosines(images.embeds, self._embedder.text_features(texts))


class TextTokenizer:
    """Makes of texts what the model's processor in transformers makes of them."""

    def __init__(self, folder: Path, model: Any) -> None:
        """Reads the folder's tokenizer.

        Raises:
            WeightsError: it is absent, knows no words, cannot pad, or is of another model.
        """
        self._tokenizer = load_text_tokenizer(folder, model.text_model.get_input_embeddings().num_embeddings)
        kind, text = model.config.model_type, model.config.text_config
        self._fills_context = kind in _FILLING  # and is read at the last place, padding or not
        # SigLIP 2 saw nothing else: its tokenizer's file says so, but the class named there, Gemma's, leaves it to us.
        self._lowers = self._fills_context and self._tokenizer.init_kwargs.get("do_lower_case") is True
        self._max_tokens = _max_tokens(folder, model.config, self._tokenizer)
        # Read at their end, before which no padding stands, and what stands behind is not seen: no mask is needed.
        self._is_causal = kind in ("clip", "metaclip_2")
        if self._is_causal:
            self._check_end(folder, text.eos_token_id, is_highest=kind == "clip" and text.eos_token_id == 2)

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """N texts -> arguments of ``get_text_features``: (N, L) each; longer ones are cut, and end as others do."""
        if self._fills_context:
            texts = [text.lower() if self._lowers else text for text in texts]
            batch = self._tokenizer(
                texts, padding="max_length", truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
            # Without a mask, as SigLIP was trained, unless the tokenizer's file has one made.
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        else:
            tokens, mask = tokenize(self._tokenizer, texts, self._max_tokens, "cpu")
            inputs = {"input_ids": tokens} | ({} if self._is_causal else {"attention_mask": mask})
        return inputs

    def _check_end(self, folder: Path, end: object, *, is_highest: bool) -> None:
        """Makes sure that the model finds the token at which it reads a text, else it would read all at their first.

        Args:
            is_highest: it looks for the token of the highest number, as OpenAI's CLIP does.
        """
        tokens: list[int] = self._tokenizer("a")["input_ids"]
        if tokens[-1] != (max(tokens) if is_highest else end):
            raise WeightsError(
                f"weights: the tokenizer of {folder} ends texts with token {tokens[-1]}, but its model reads them at "
                f"{'the one of the highest number' if is_highest else f'token {end}'} (eos_token_id of config.json)",
                remedy=ONE_MODEL,
            )


def _dim(config: Any) -> int:
    """D, as a configuration of transformers says it."""
    if config.model_type in _FILLING:
        dim: int = config.text_config.projection_size
    elif config.model_type == "tipsv2":  # which projects neither
        dim = config.vision_config.hidden_size
    else:
        dim = config.projection_dim
    return dim


def _as_patches(shown: torch.Tensor, side: int) -> dict[str, torch.Tensor]:
    """What SigLIP 2 (NaFlex) takes of squares: all their patches, row by row, and how many there are each way.

    Args:
        shown: (N, 3, S, S).
        side: of a patch, by which S is divided.

    Returns:
        (N, P, side * side * 3) patches, channels last; (N, P) ones, as none is padding; (N, 2) int64.
    """
    num_images, channels, size, _ = shown.shape
    each_way = size // side
    patches = shown.reshape(num_images, channels, each_way, side, each_way, side)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int64, device=shown.device),
        "spatial_shapes": torch.full((num_images, 2), each_way, device=shown.device),
    }


def pack_layers(model: Any, dtype: torch.dtype, carried: torch.dtype) -> None:
    """Puts packed layers in the place of those of the image encoder.

    Args:
        model: in float32, of CLIP's kind of layers, on its device.
        dtype: of the products.
        carried: of what is added up from layer to layer.
    """
    encoder = model.vision_model.encoder
    if not encoder.layers:  # as a configuration may say
        return
    of_token_alone = model.config.model_type != "siglip"  # which attends to all of them once more
    blocks = [_packed(layer, dtype, carried) for layer in encoder.layers]
    encoder.layers = nn.ModuleList([PackedTower(blocks, of_token_alone=of_token_alone)])


def _packed(layer: Any, dtype: torch.dtype, carried: torch.dtype) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    activation = mlp.config.hidden_act
    return pack_block(
        attention.num_heads,
        (layer.layer_norm1, layer.layer_norm2),
        (
            linear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])),
            attention.out_proj,
            mlp.fc1,
            mlp.fc2,
        ),
        activation if activation in ("gelu", "quick_gelu") else mlp.activation_fn,
        dtype,
        carried,
    )


def _max_tokens(folder: Path, config: Any, tokenizer: Any) -> int:
    """How many tokens of a text the model reads, begin and end included, as transformers takes it from the files.

    They do not say that Chinese-CLIP saw no text of more than 52.

    Raises:
        WeightsError: none but those of begin and end, or the file's number is none.
    """
    limits: dict[str, float] = {"max_position_embeddings": config.text_config.max_position_embeddings}
    if config.model_type == "altclip":  # as RoBERTa's, its places begin behind the number of the padding token
        limits["max_position_embeddings"] -= (config.text_config.pad_token_id or 0) + 1
    if config.model_type != "align":  # whose processor cuts no text: its tokenizer's length is what it fills them up to
        limits["model_max_length"] = tokenizer.model_max_length
    for name, limit in limits.items():
        if not isinstance(limit, int | float) or not limit >= _MIN_TOKENS:
            raise WeightsError(
                f"weights: the model of {folder} reads texts of {limit} tokens ({name}), begin and end included",
                remedy=ONE_MODEL,
            )
    return int(min(limits.values()))


def _check_encoders(folder: Path, model: Any, missing: Sequence[str]) -> None:
    """Refuses the weights of one encoder, whatever the configuration says.

    Raises:
        WeightsError: those of the other are absent.
    """
    for part, what in (("text_model", "texts"), ("vision_model", "images")):
        names = {f"{part}.{name}" for name, _ in getattr(model, part).named_parameters()}
        if names <= set(missing):
            raise WeightsError(
                f"weights: {folder} holds no encoder of {what}",
                remedy="Use the whole model, not an encoder or a classifier that was made from it.",
            )
