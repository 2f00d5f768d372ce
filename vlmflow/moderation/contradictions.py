"""What in a row contradicts what: labels, caption and match scores, and detectors and prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmflow.catalog.columns import as_floats, flat
from vlmflow.catalog.masks import Mask, as_mask, equal, is_valid

_LOW, _HIGH = 0.1, 0.9  # match probabilities that say no, and yes
_LETTERS = re.compile(r"[a-z]+")


def count_contradictions(rows: pa.Table) -> NDArray[np.int64]:
    """(N,) how many :func:`contradictions` each row has.

    Args:
        rows: labels, caption, caption_itm and text_itm of images.
    """
    captions, labels = flat(rows["caption"]), flat(rows["labels"])
    caption_itm, text_itm = (as_floats(flat(rows[name])) for name in ("caption_itm", "text_itm"))
    is_trusted = is_valid(captions) & (caption_itm >= _HIGH)
    counts = (is_trusted & (text_itm <= _LOW)).astype(np.int64)
    items = pc.list_flatten(labels)
    if not len(items):
        return counts
    parents = np.asarray(pc.list_parent_indices(labels), np.int64)
    names, decisions = (_coded(pc.struct_field(items, name)) for name in ("label", "decision"))
    by_prompts = ~is_valid(pc.struct_field(items, "detector"))
    decision = pc.struct_field(items, "decision")
    is_named = _are_named(captions, names.dictionary.to_pylist())[parents, np.asarray(names.indices)]
    is_told = by_prompts & is_named & equal(decision, "allow")
    is_untold = by_prompts & ~is_named & equal(decision, "block") & is_trusted[parents]
    np.add.at(counts, parents[is_told | is_untold], 1)
    # Of each label of each row the decisions, each once: who has several differs.
    labels_of_rows = parents * len(names.dictionary) + np.asarray(names.indices)
    said = np.unique(labels_of_rows * len(decisions.dictionary) + np.asarray(decisions.indices))
    of_one, num_said = np.unique(said // len(decisions.dictionary), return_counts=True)
    np.add.at(counts, of_one[num_said > 1] // len(names.dictionary), 1)
    return counts


def contradictions(row: dict[str, Any]) -> list[str]:
    """What contradicts what in one row, in words."""
    caption, caption_itm, text_itm = row["caption"], row["caption_itm"], row["text_itm"]
    signs = []
    words = set(_LETTERS.findall((caption or "").lower()))
    is_trusted = caption is not None and caption_itm is not None and caption_itm >= _HIGH
    decisions: dict[str, set[str]] = {}
    for label in row["labels"] or []:
        is_named = not words.isdisjoint(_words_of(label["label"]))
        decisions.setdefault(label["label"], set()).add(label["decision"])
        if label["detector"] is None and is_named and label["decision"] == "allow":
            signs.append(f"the caption names {label['label']}, which is allowed")
        if label["detector"] is None and is_trusted and not is_named and label["decision"] == "block":
            signs.append(f"{label['label']} blocks, and a caption that fits does not name it")
    signs += [f"detector and prompts differ on {name}" for name, said in decisions.items() if len(said) > 1]
    if is_trusted and text_itm is not None and text_itm <= _LOW:
        signs.append("the caption fits the image, the caller's text does not")
    return signs


def _are_named(captions: pa.Array, labels: Sequence[str]) -> Mask:
    """(N, L) whether a caption has a word of a label's name."""
    lower = pc.utf8_lower(captions)
    named = np.zeros((len(captions), len(labels)), np.bool_)
    some = np.flatnonzero(_have_word(lower, {word for label in labels for word in _words_of(label)}))
    lower = lower.take(pa.array(some))
    for number, label in enumerate(labels):
        named[some, number] = _have_word(lower, _words_of(label))
    return named


def _have_word(captions: pa.Array, words: set[str]) -> Mask:
    there = "|".join(sorted(filter(_LETTERS.fullmatch, words)))  # others are no words of captions
    if not there:
        return np.zeros(len(captions), np.bool_)
    found = pc.match_substring_regex(captions, f"(?:^|[^a-z])(?:{there})(?:[^a-z]|$)")
    return as_mask(pc.fill_null(found, False))


def _words_of(label: str) -> set[str]:
    """The words of a label's name, in the singular and the plural."""
    words = {word for word in re.split(r"[-_]", label.lower()) if len(word) > 2}
    return words | {f"{word}s" for word in words}


def _coded(values: pa.Array) -> pa.DictionaryArray:
    return pc.dictionary_encode(values, null_encoding="encode")
