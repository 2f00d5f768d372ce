"""A ViLBERT folder: `config.json`, `model.safetensors`, a BERT vocabulary, `regions.json`, and `answers.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizer

from vlmflow.config import Dtype
from vlmflow.errors import WeightsError
from vlmflow.models.attention import growing
from vlmflow.models.pixels import model_dtype
from vlmflow.models.pretrained import check_numbers, check_words, in_our_words
from vlmflow.models.vilbert.config import Head, read_config
from vlmflow.models.vilbert.finders import REGIONS_FILE, load_finder, read_region_source
from vlmflow.models.vilbert.layers import Stream
from vlmflow.models.vilbert.model import TIED, Encoded, Text, Vilbert
from vlmflow.models.vilbert.regions import RegionFinder, Regions, with_whole_image
from vlmflow.models.weights import check_keys, find_weights

ANSWERS_FILE = "answers.json"


@dataclass(frozen=True)
class Parts:
    """What every role of a ViLBERT needs. N: images, M: pairs of image and text."""

    folder: Path
    model: Vilbert
    tokenizer: Any
    finder: RegionFinder | None  # None: regions are columns of the source
    max_regions: int
    device: str

    @property
    def max_tokens(self) -> int:
        """Of a text, special ones included."""
        return self.model.config.max_position_embeddings

    def regions_of(self, images: torch.Tensor | Regions) -> Regions:
        """Those that are given, or those that the finder sees in (N, 3, S, S) uint8 pixels.

        Raises:
            ValueError: they are not of the kind that the model reads, or of another number of features.
        """
        if isinstance(images, Regions):
            most = self.max_regions  # the caller's best come first
            found = Regions(images.features[:, :most], images.boxes[:, :most], images.mask[:, :most])
        elif self.finder is None:
            raise ValueError(f"{self.folder.name} reads regions from columns of the source, not pixels")
        else:
            found = self.finder(images)
        wanted = self.model.config.v_feature_size
        if len(found) and found.features.shape[-1] != wanted:
            raise ValueError(f"regions of {found.features.shape[-1]} features, the model reads {wanted}")
        return found

    def embed(self, regions: Regions) -> Stream:
        """The regions as far as no text is needed, the whole image in the first place."""
        dtype = self.model.bert.v_embeddings.image_embeddings.weight.dtype
        features, places, mask = (part.to(self.device) for part in with_whole_image(regions))
        with growing(torch.device(self.device)):
            return self.model.embed_regions(features.to(dtype), places.to(dtype), mask)

    def encode(self, regions: Stream, ids: Sequence[Sequence[int]], task: int) -> Encoded:
        """Text i, given by its tokens, with image i."""
        batch = self.tokenizer.pad({"input_ids": [list(tokens) for tokens in ids]}, return_tensors="pt")
        kinds = torch.full((len(ids),), task) if self.model.config.num_task_tokens else None
        text = Text(
            batch["input_ids"].to(self.device),
            batch["attention_mask"].to(self.device).bool(),
            None if kinds is None else kinds.to(self.device),
        )
        with growing(torch.device(self.device)):
            return self.model.encode(regions, text)


def load_parts(folder: Path, device: str, dtype: Dtype, heads: Sequence[Head]) -> Parts:
    """Loads the model with those of its heads that are wanted.

    Raises:
        WeightsError: a file is absent or does not fit the others.
    """
    kind = model_dtype(device, dtype)
    model = load_vilbert(folder)
    for name in set(model.config.heads) - set(heads):
        delattr(model, name)
    with in_our_words(folder, "BertTokenizer", "Put the vocab.txt of bert-base-uncased there, or the model's own."):
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        check_words(folder, tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        raise WeightsError(
            f"weights: {folder} has a vocabulary of {len(tokenizer)}, the model one of {model.config.vocab_size}",
            remedy="Use the vocabulary that the model was trained with.",
        )
    finder = load_finder(folder, device, kind)
    if finder is not None and finder.num_features != model.config.v_feature_size:
        raise WeightsError(
            f"weights: {folder / REGIONS_FILE} gives regions of {finder.num_features} features, "
            f"the model reads {model.config.v_feature_size}",
            remedy="Use the detector that the model was trained on, or kind columns with features made by it.",
        )
    return Parts(folder, model.to(device, kind), tokenizer, finder, read_region_source(folder).max_regions, device)


def load_vilbert(folder: Path) -> Vilbert:
    """Builds the model of `config.json` and fills in the tensors, which bear the published names.

    Raises:
        WeightsError: a file is absent, or tensors are missing, unexpected or of other shapes.
    """
    config = read_config(folder / "config.json")
    files = find_weights(folder, "vilbert")
    try:
        mapped = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise WeightsError(f"weights: {folder}: {error}", remedy="Copy the model's folder again.") from error
    # A copy: whoever wrote to a file that is mapped into memory would change the model at work.
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in mapped.items()}
    with torch.device("meta"):
        model = Vilbert(config)
    expected = model.state_dict()
    check_keys(folder, set(expected) - set(tensors) - {TIED}, set(tensors) - set(expected))
    shapes = [name for name, tensor in tensors.items() if tensor.shape != expected[name].shape]
    if shapes:
        name = shapes[0]
        raise WeightsError(
            f"weights: {folder}: {name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}",
            remedy="Use the configuration file that belongs to these weights.",
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    check_numbers(folder, model)
    return model.eval().requires_grad_(False)


def read_answers(folder: Path, num_answers: int) -> list[str]:
    """The answers that the model chooses among, in the order of its outputs.

    Raises:
        WeightsError: the file is absent, or lists others than the model has outputs for.
    """
    path = folder / ANSWERS_FILE
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"weights: {path} cannot be read: {type(error).__name__}",
            remedy="Write the answers there as a JSON list, in the order that the model was trained with.",
        ) from error
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise WeightsError(f"weights: {path} is no list of texts", remedy="Write the answers as a JSON list.")
    if len(answers) != num_answers:
        raise WeightsError(
            f"weights: {path} lists {len(answers)} answers, the model has {num_answers}",
            remedy="Use the list that the model was trained with.",
        )
    return answers
