"""Model cards and NOTICE of the starter models, with the figures as the evaluation printed them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.machine import save_result
from benchmarks.starter.sources import ARTISTS, EMOJIBASE, HELD_OUT

Results = dict[str, dict[str, float]]
SETS = ("unseen scenes", "unseen artist", "unseen concepts")
_FILE = "starter.json"
_MACHINE, _EARLIER = "machine", "machine of all but ViLBERT"

_NAMES = {
    "clip": ("Starter CLIP", "embeds pictures and sentences (open_clip format)"),
    "captioner": ("Starter captioner", "writes one sentence about a picture (BlipForConditionalGeneration)"),
    "matcher": ("Starter matcher", "tells whether a sentence fits a picture (BlipForImageTextRetrieval)"),
    "vilbert": ("Starter ViLBERT", "answers, matches and finds what a phrase means (ViLBERT, arXiv:1908.02265)"),
    "vqa": ("Starter VQA", "answers questions in one word (ViltForQuestionAnswering)"),
}
_OBJECTIVES = {
    "clip": "ITC (arXiv:2103.00020), the vision tower together with the captioner's LM loss (arXiv:2205.01917)",
    "captioner": "LM (arXiv:2201.12086), the vision tower together with CLIP's ITC loss",
    "matcher": "ITC and ITM with one mined negative each way (arXiv:2107.07651); the vision tower is CLIP's, unchanged",
    "vilbert": "BCE over one-word answers, over captions that fit or do not, and over the regions that a phrase means, "
    "together (arXiv:1912.02315). Its regions are found by a small head on CLIP's tower, trained before it with the "
    "true places of the things (GIoU, arXiv:1902.09630); the tower is that of `../clip`, unchanged and not copied",
    "vqa": "cross-entropy over one-word answers (arXiv:2102.03334), started from CLIP's vision tower",
}
_FIGURES = {
    "clip": ("zero-shot", "image-to-text", "text-to-image", "gallery", "moderation"),
    "captioner": ("exact noun", "noun recall", "background", "whole caption", "BLEU", "CIDEr"),
    "matcher": ("ITM",),
    "vilbert": ("ViLBERT",),
    "vqa": ("VQA",),
}
# (model, set, figure, bar)
BARS = (
    ("clip", "unseen scenes", "zero-shot top-1", 0.85),
    ("clip", "unseen scenes", "image-to-text recall@1", 0.80),
    ("captioner", "unseen scenes", "exact noun, single objects", 0.80),
    ("captioner", "unseen scenes", "noun recall, two or three", 0.60),
    ("matcher", "unseen scenes", "ITM AUC, random text", 0.95),
    ("matcher", "unseen scenes", "ITM AUC, same category", 0.85),
    ("vqa", "unseen scenes", "VQA overall", 0.85),
    ("clip", "demo catalog", "flagged of those", 0.90),
    ("matcher", "demo catalog", "wrong titles below the median right one", 0.80),
)

_TRIED = """\
What was tried: near misses in half of every batch; starting from the trained tower; more training, which is what moved
all figures: the tower has seen 1,680,000 pictures by now, the matcher 142,000, VQA 156,000 and more.
`python -m benchmarks.starter.train --stage vqa --minutes N` with a larger N goes on from the checkpoint."""

_CARD = """\
---
license: apache-2.0
---
# {title}

A tiny model that {what}. It ships with vlmflow so that the demo and the tests of behaviour run with no network.

**It knows drawings alone**: cut-out pictograms on plain backgrounds, at {side} x {side} pixels. It must not be used
on photographs, and it must not be described as moderating photographs. For a real catalog use the `base` or `large`
profile.

## Data

{num_concepts} things by {num_artists} picture sets, and sentences made from templates: what there is (one to four of
a kind, two or three kinds), and the colour of the background. Every scene is composed anew. Sources and licences are
in `../NOTICE`; the recipe is `benchmarks/starter` of the repository.

## Training

{objective}. On two CPU cores; the larger world of the recipe (`--world full`, 300 to 400 things at 96 pixels) needs a
GPU and has not been trained.

## Figures

As `python -m benchmarks.starter.evaluate` prints them: new scenes of known drawings; {held_out}, a set never trained
on; ten things never trained on. 500 scenes a figure, a gallery of 1,000 for retrieval. Bars apply to the first.

<!-- figures -->
{figures}
<!-- /figures -->

{misses}

## Limits

Names, counts (one to four), colours (ten) and questions outside its world mean nothing to it. Words outside its
vocabulary are spelled in letters: nothing fails, and nothing is understood. Unseen artists, and unseen things above
all, are hard for it: see the figures.
"""


def write_cards(starter: Path, results: Results, *, side_px: int, num_concepts: int) -> None:
    """Writes README.md of every model folder that is there, and NOTICE."""
    for model, (title, what) in _NAMES.items():
        if (starter / model).is_dir():
            text = _CARD.format(
                title=title,
                what=what,
                side=side_px,
                num_concepts=num_concepts,
                num_artists=len(ARTISTS),
                objective=_OBJECTIVES[model],
                held_out=HELD_OUT.design,
                figures=figure_table(model, results),
                misses=_bars(model, results),
            )
            (starter / model / "README.md").write_text(text)
    (starter / "NOTICE").write_text(notice())


def figure_table(model: str, results: Results) -> str:
    """The model's figures on the three sets as a Markdown table."""
    names = [name for name in results[SETS[0]] if name.startswith(_FIGURES[model])]
    lines = ["| figure | " + " | ".join(SETS) + " |", "| --- |" + " --- |" * len(SETS)]
    lines += [
        f"| {name} | " + " | ".join(_shown(name, results[part].get(name)) for part in SETS) + " |" for name in names
    ]
    return "\n".join(lines)


def misses(results: Results) -> list[tuple[str, str, str, float, float]]:
    """(model, set, figure, value, bar) of every bar that is missed."""
    return [
        (model, part, name, results[part][name], bar)
        for model, part, name, bar in BARS
        if name in results.get(part, {}) and results[part][name] < bar
    ]


def _bars(model: str, results: Results) -> str:
    mine = [bar for bar in BARS if bar[0] == model]
    missed = [
        f"- {name} ({part}): {value:.3f}, bar {bar}" for m, part, name, value, bar in misses(results) if m == model
    ]
    if missed:
        return "Bars that are missed:\n\n" + "\n".join(missed) + "\n\n" + _TRIED
    return "All bars of this model are met." if mine else ""


def notice() -> str:
    """Attributions of the pictures and names that the models were trained with, and that the demo shows."""
    lines = [
        "vlmflow starter models and demo catalog",
        "",
        "The models were trained with, and the pictures of demo/ are composed of, drawings of these sets:",
        "",
    ]
    for artist in ARTISTS:
        lines.append(f"- {artist.design}. {artist.licence}. From the npm package {artist.package}.")
    lines += [
        "",
        "Used for evaluation only:",
        "",
        f"- {HELD_OUT.design}. {HELD_OUT.licence}. From the npm package {HELD_OUT.package}.",
        "",
        f"Names and groups: {EMOJIBASE} (MIT), from the Unicode CLDR (Unicode licence v3).",
        "",
        "CC BY 4.0: https://creativecommons.org/licenses/by/4.0/ -- the drawings were cropped, resized, mirrored and",
        "composed into new pictures. Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0. MIT: the notice",
        "'Permission is hereby granted, free of charge, to any person obtaining a copy of this software...' of each",
        "package applies to its drawings. The weights themselves are under Apache-2.0.",
        "",
    ]
    return "\n".join(lines)


def read_results(folder: Path) -> Results:
    """The figures of a folder's file, without what it says of the machine."""
    found = json.loads((folder / _FILE).read_text())
    return {name: figures for name, figures in found.items() if name not in (_MACHINE, _EARLIER)}


def write_results(results: Results, folder: Path, *, only_vilbert: bool) -> None:
    """Writes the figures and the machine; where only some are new, also that of the others."""
    earlier: dict[str, object] = {}
    if only_vilbert:
        found = json.loads((folder / _FILE).read_text())
        earlier[_EARLIER] = found.get(_EARLIER) or found.get(_MACHINE) or "not recorded"
    print(save_result(Path(_FILE).stem, {**results, **earlier}, folder))


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"  # nothing in the set to measure it on
    return str(int(value)) if name == "gallery" else f"{value:.3f}"
