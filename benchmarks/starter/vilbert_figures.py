"""The figures of the starter's ViLBERT in its three roles, through vlmflow's own adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from benchmarks.starter.questions import KINDS, Question
from benchmarks.starter.vilbert import GROUNDED, Phrase
from vlmflow.config import ModelConfig
from vlmflow.evaluation.metrics.classes import roc_auc
from vlmflow.models.vilbert.adapter import VilbertAnswerer, VilbertGrounder, VilbertMatcher

Figures = dict[str, float]


@dataclass(frozen=True)
class Roles:
    """One folder, three times."""

    answerer: VilbertAnswerer
    matcher: VilbertMatcher
    grounder: VilbertGrounder

    @classmethod
    def load(cls, folder: Path) -> Roles:
        config = ModelConfig(family="vilbert", path=str(folder))
        answerer, matcher = (role.load(folder, config, "cpu") for role in (VilbertAnswerer, VilbertMatcher))
        return cls(answerer, matcher, VilbertGrounder.load(folder))

    def answering(self, pixels: torch.Tensor, asked: Sequence[Question]) -> Figures:
        """Share of the questions that are answered rightly, overall and by kind."""
        given = self.answerer.answer(pixels, [[question.text] for question in asked])
        hits = np.array([said[0].text == question.answer for said, question in zip(given, asked, strict=True)])
        kinds = np.array([question.kind for question in asked])
        overall = {"ViLBERT VQA overall": float(hits.mean())}
        return overall | {f"ViLBERT VQA, {kind}": float(hits[kinds == kind].mean()) for kind in KINDS}

    def matching(self, pixels: torch.Tensor, true: Sequence[str], wrong: Mapping[str, Sequence[str]]) -> Figures:
        """How often a true text scores above a wrong one, by the kind of what is wrong."""
        images = self.matcher.encode_images(pixels)
        right, figures = self.matcher.match_itm(images, true), {}
        for name, texts in wrong.items():
            scores = np.concatenate([right, self.matcher.match_itm(images, texts)])
            figures[f"ViLBERT ITM AUC, {name}"] = roc_auc(scores, np.arange(len(scores)) < len(right)) or 0.0
        return figures

    def grounding(self, pixels: torch.Tensor, phrases: Sequence[Phrase]) -> Figures:
        """Whether the likeliest region is the thing that a phrase names; whether any is; and a region at random."""
        found = self.grounder.ground(pixels, [[phrase.text] for phrase in phrases])
        shows = [
            (box_iou(torch.from_numpy(of.boxes), phrase.boxes) >= GROUNDED).any(1).numpy()
            for (of,), phrase in zip(found, phrases, strict=True)
        ]
        return {
            "ViLBERT grounding": float(np.mean([of[0] for of in shows])),
            "ViLBERT grounding, best region there is": float(np.mean([of.any() for of in shows])),
            "ViLBERT grounding, region at random": float(np.mean([of.mean() for of in shows])),
        }
