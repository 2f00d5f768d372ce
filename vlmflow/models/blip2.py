"""BLIP-2: captioning, image-text matching and contrast (Li et al. 2023, arXiv:2301.12597).

The Q-Former looks at the patches of a vision tower through a few learnt queries. For captions a language model, OPT or
T5, goes on from what the queries saw; for matching the Q-Former reads the text as well. N: images, Q: queries, T:
patches and the class token, D: dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch.nn.functional import normalize
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from vlmflow.config import Dtype, ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.models import EncodedImages
from vlmflow.models.attention import growing
from vlmflow.models.generation import STEPS, check_settings
from vlmflow.models.logits import NumberCheck
from vlmflow.models.pixels import PixelNormalizer, model_dtype
from vlmflow.models.preprocessing import read_preprocessing
from vlmflow.models.pretrained import (
    captioning,
    load_config,
    load_model,
    load_text_tokenizer,
    load_tokenizer,
    tokenize,
)
from vlmflow.models.towers import SharedTower, VisionTowers
from vlmflow.models.weights import check_keys, find_weights, read_json, section_of


class Blip2Captioner:
    """One sentence for each image, a whole batch at once."""

    def __init__(self, model: Any, tokenizer: Any, vision: SharedTower) -> None:
        """``model``: a ``Blip2ForConditionalGeneration``, whose weights are used, and whose vision tower is not."""
        self._tokenizer = tokenizer
        self._vision = vision
        self._qformer, self._queries = model.qformer, model.query_tokens
        self._projection = model.language_projection
        self._language = model.language_model
        self._begin: int = model.config.text_config.bos_token_id

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
    ) -> Blip2Captioner:
        """Loads ``Blip2ForConditionalGeneration`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit, or the configuration sets what `generate` needs more
                for than logits.
        """
        wanted = model_dtype(device, dtype)
        model, missing, unexpected = load_model(Blip2ForConditionalGeneration, folder, wanted, device)
        check_keys(folder, missing, unexpected)
        _check_untied(folder, model)
        if model.config.text_config.bos_token_id is None:
            raise WeightsError(
                f"weights: {folder / 'config.json'}: text_config.bos_token_id is missing, which begins a caption",
                remedy="Set it as the published configuration does: 2 for OPT, 1 for T5.",
            )
        check_settings(folder, model.language_model.generation_config, honoured=STEPS)
        seen, taken = model.language_projection.out_features, model.get_input_embeddings().embedding_dim
        if seen != taken:
            raise WeightsError(
                f"weights: {folder / 'config.json'}: what the queries saw has {seen} dimensions, and the words of the "
                f"language model have {taken}",
                remedy="Use a language model whose words are as wide as its layers: word_embed_proj_dim of OPT.",
            )
        preprocessing = read_preprocessing(folder, config)
        normalizer = PixelNormalizer(preprocessing, device, wanted)
        model = model.to(device)
        tokenizer = load_tokenizer(folder, model.get_input_embeddings().num_embeddings)
        captioner = cls(model, tokenizer, (towers or VisionTowers()).share(model.vision_model, normalizer))
        with captioning(folder, preprocessing.size) as pixels:
            captioner.caption(pixels, 1)
        return captioner

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, max_tokens: int, num_beams: int = 1) -> list[str]:
        """(N, 3, S, S) uint8 RGB -> N captions of at most ``max_tokens`` tokens.

        The language model is given the image and nothing else: no prompt.

        Args:
            pixels: of the model's size.
            num_beams: 1: greedy decoding; more: beam search, the best of so many captions.

        Raises:
            ValueError: the pixels are not of the model's size or dtype, there is to be no token or no beam, or the
                model gave logits that are not numbers.
        """
        if max_tokens < 1 or num_beams < 1:
            raise ValueError(f"captions of {max_tokens} tokens by {num_beams} beams; both must be at least 1")
        if len(pixels) == 0:
            return []
        images = self._vision(pixels)
        numbers = NumberCheck()
        with growing(images.device):
            seen = self._projection(look(self._qformer, self._queries, images).to(images.dtype))
            begin = torch.full((len(images), 1), self._begin, device=images.device)
            states = torch.cat([seen, self._language.get_input_embeddings()(begin)], dim=1)
            tokens = self._language.generate(
                inputs_embeds=states,
                attention_mask=torch.ones(states.shape[:2], dtype=torch.int64, device=states.device),
                do_sample=False,
                num_beams=num_beams,
                max_new_tokens=max_tokens,
                logits_processor=numbers.as_list(),
                return_dict_in_generate=False,
            )
        numbers.check()
        # OPT ends a caption with a line feed, which is no special token.
        return [text.strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class Blip2Matcher:
    """How well texts fit images, by the matching head and by the contrastive heads."""

    def __init__(self, model: Any, tokenizer: Any, vision: SharedTower) -> None:
        """``model``: a ``Blip2ForImageTextRetrieval``, whose weights are used, and whose vision tower is not."""
        self._tokenizer = tokenizer
        self._vision = vision
        self._qformer, self._queries, self._embed = model.qformer, model.query_tokens, model.embeddings
        self._itm_head = model.itm_head
        self._vision_proj, self._text_proj = model.vision_projection, model.text_projection
        self._max_tokens: int = model.config.qformer_config.max_position_embeddings

    @classmethod
    def load(
        cls, folder: Path, config: ModelConfig, device: str, dtype: Dtype = "auto", towers: VisionTowers | None = None
    ) -> Blip2Matcher:
        """Loads ``Blip2ForImageTextRetrieval`` from a folder.

        Raises:
            WeightsError: the weights are absent or do not fit.
        """
        settings = load_config(Blip2Config, folder)
        # No matching without text; the first configurations that were published name this otherwise.
        settings.qformer_config.use_qformer_text_input = True
        # The Q-Former sees 32 queries and a text where the tower sees 257 patches: float32 costs it little.
        model, missing, unexpected = load_model(Blip2ForImageTextRetrieval, folder, torch.float32, device, settings)
        check_keys(folder, missing, unexpected)
        wanted = model_dtype(device, dtype)
        normalizer = PixelNormalizer(read_preprocessing(folder, config), device, wanted)
        model.vision_model.to(wanted)
        model = model.to(device)
        tokenizer = load_text_tokenizer(folder, model.embeddings.word_embeddings.num_embeddings)
        return cls(model, tokenizer, (towers or VisionTowers()).share(model.vision_model, normalizer))

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> EncodedImages:
        """(N, 3, S, S) uint8 RGB -> N images for the two heads."""
        return EncodedImages(self._vision(pixels))

    @torch.inference_mode()
    def match_itm(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i with the matching head: the mean of what each query says.

        Returns:
            (N,) the probability of a match.

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        tokens, mask = self._tokenize(texts, images)
        queries = self._queries.expand(len(texts), -1, -1)
        states = self._qformer(
            query_embeds=self._embed(input_ids=tokens, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
            encoder_hidden_states=images.embeds,
        ).last_hidden_state
        logits = self._itm_head(states[:, : queries.shape[1]]).mean(dim=1)
        return _to_numpy(logits.softmax(dim=1)[:, 1])  # column 1 is "match"

    @torch.inference_mode()
    def match_itc(self, images: EncodedImages, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores ``texts[i]`` against image i with the contrastive heads: by the query that fits best.

        Returns:
            (N,) the cosine, in [-1, 1].

        Raises:
            ValueError: the two differ in length.
        """
        if not images.pairs_with(texts):
            return np.empty(0, np.float32)
        tokens, mask = self._tokenize(texts, images)
        states = self._qformer(query_embeds=self._embed(input_ids=tokens), query_length=0, attention_mask=mask)
        text_features = normalize(self._text_proj(states.last_hidden_state[:, 0]), dim=-1)
        seen = look(self._qformer, self._queries, images.embeds)
        image_features = normalize(self._vision_proj(seen), dim=-1)
        return _to_numpy((image_features @ text_features.unsqueeze(2)).squeeze(2).amax(dim=1))

    def _tokenize(self, texts: Sequence[str], images: EncodedImages) -> tuple[torch.Tensor, torch.Tensor]:
        return tokenize(self._tokenizer, texts, self._max_tokens, str(images.embeds.device))


def look(qformer: Any, queries: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(1, Q, D) queries, (N, T, D') patches -> (N, Q, D): what the queries see in each image."""
    outputs = qformer(query_embeds=queries.expand(len(images), -1, -1), encoder_hidden_states=images)
    return cast(torch.Tensor, outputs.last_hidden_state)


def _to_numpy(values: torch.Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", values.float().cpu().numpy())


def _check_untied(folder: Path, model: Any) -> None:
    """Refuses weights that lack one of two layers of words, where the configuration says that each has its own.

    transformers would take the other layer in its place without a word, and captions would come out wrong.

    Args:
        model: with a ``language_model``, whose configuration is the folder's ``text_config``.

    Raises:
        WeightsError: names the tensors that are missing.
    """
    path = folder / "config.json"
    settings = section_of(read_json(path), "text_config", path)
    given, made = model.language_model.get_input_embeddings(), model.language_model.get_output_embeddings()
    if settings.get("tie_word_embeddings") is not False or given.weight.data_ptr() != made.weight.data_ptr():
        return
    held: set[str] = set()
    for file in find_weights(folder, "blip2_caption"):
        with safe_open(file, "pt") as tensors:
            held.update(tensors.keys())
    names = [f"{name}.weight" for name, module in model.named_modules() if module is given or module is made]
    check_keys(folder, [name for name in names if name not in held], [])
