"""What is read off the two streams; attributes bear the names that the published checkpoints give their tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from vlmflow.models.vilbert.config import Head, VilbertConfig
from vlmflow.models.vilbert.layers import NORM_EPS


class Classifier(nn.Module):
    """One hidden layer, normalised."""

    def __init__(self, width: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.logit_fc = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=NORM_EPS), nn.Linear(hidden, num_classes)
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(N, width) -> (N, classes)."""
        logits: torch.Tensor = self.logit_fc(states)
        return logits


class Transform(nn.Module):
    """What pretraining puts before its decoders."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(N, T, D) -> (N, T, D)."""
        normed: torch.Tensor = self.LayerNorm(functional.gelu(self.dense(states)))
        return normed


class WordPredictions(nn.Module):
    """Masked words; the decoder's weight is the word embeddings'."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.transform = Transform(config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """(N, T, D) -> (N, T, vocabulary)."""
        logits: torch.Tensor = self.decoder(self.transform(words)) + self.bias
        return logits


class RegionPredictions(nn.Module):
    """The detector's classes of masked regions."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.transform = Transform(config.v_hidden_size)
        self.decoder = nn.Linear(config.v_hidden_size, config.v_target_size)

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        """(N, R, V) -> (N, R, classes)."""
        logits: torch.Tensor = self.decoder(self.transform(regions))
        return logits


class Pretraining(nn.Module):
    """The heads of pretraining. Of ``bi_seq_relationship`` (N, 2), column 0 is "the text belongs to the image"."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.predictions = WordPredictions(config)
        self.bi_seq_relationship = nn.Linear(config.bi_hidden_size, 2)
        self.imagePredictions = RegionPredictions(config)


# Read from: the pooled pair, except vil_binary_prediction (two pairs side by side: NLVR2's two images and one text),
# vision_logit (regions) and linguisic_logit (words; so spelled).
HEAD_CLASSES: dict[Head, Callable[[VilbertConfig], nn.Module]] = {
    "cls": Pretraining,
    "vil_prediction": lambda c: Classifier(c.bi_hidden_size, 2 * c.bi_hidden_size, c.num_answers),
    "vil_prediction_gqa": lambda c: Classifier(c.bi_hidden_size, 2 * c.bi_hidden_size, c.num_gqa_answers),
    "vil_binary_prediction": lambda c: Classifier(2 * c.bi_hidden_size, 2 * c.bi_hidden_size, 2),
    "vil_logit": lambda c: nn.Linear(c.bi_hidden_size, 1),
    "vil_tri_prediction": lambda c: nn.Linear(c.bi_hidden_size, 3),
    "vision_logit": lambda c: nn.Linear(c.v_hidden_size, 1),
    "linguisic_logit": lambda c: nn.Linear(c.hidden_size, 1),
}
