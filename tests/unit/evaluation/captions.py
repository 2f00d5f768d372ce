"""Captions as people write them, oddities included, drawn at random; and the reference scorer's tokeniser."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_NOUNS = re.findall(
    r"\S+",
    """man woman dog cat tennis-player T-shirt bus street-sign boy girl 10-year-old elephant TV O'Brien U.S. café
    firefighters' child's they're AT&T Coca-Cola Wi-Fi skateboard umbrella frisbee""",
)
_OTHERS = re.findall(
    r"\S+",
    """a the two 3 A an 1,000 his it's don't isn't 7:30 $5 50% #1 50th 1990s '90s and/or black-and-white grey “old”
    "stop" (small) b&w w/ Mr. St. no. ft. 2.5 of on with near cannot naïve 中文 — … 😀 &""",
)
_SIGNS = (",", ".", ";", ":", "!", "?", " -", " --", "...", " –", "'", " &", " /", ")")


def draw_caption(rng: random.Random) -> str:
    """A sentence of 3 to 14 words, mostly in order, with signs where people put them and where they do not."""
    words = [rng.choice(_NOUNS if rng.random() < 0.7 else _OTHERS) for _ in range(rng.randint(3, 14))]
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(words))
        words[at] += rng.choice(_SIGNS)
    return " ".join(words) + rng.choice(("", ".", ".", ".", "!", " .", "...", "?", '"'))


def vary(caption: str, rng: random.Random) -> str:
    """Another caption of the same image: words dropped, swapped or replaced."""
    words = caption.split()
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(words))
        words[at] = rng.choice(_NOUNS + words)
    if rng.random() < 0.3:
        rng.shuffle(words)
    return " ".join(words[: rng.randint(1, len(words))])


def draw_corpus(rng: random.Random, num_images: int) -> tuple[list[str], list[list[str]]]:
    """A candidate and one to five references for each image."""
    first = [draw_caption(rng) for _ in range(num_images)]
    references = [[one, *(vary(one, rng) for _ in range(rng.randint(0, 4)))] for one in first]
    candidates = [rng.choice((vary(one, rng), one, draw_caption(rng))) for one in first]
    return candidates, references


EDGE_CASES: Sequence[tuple[list[str], list[list[str]]]] = (
    ([""], [["a dog on a couch"]]),  # nothing said
    (["...!?"], [["a dog on a couch"]]),  # punctuation alone
    (["a dog on a couch"], [["a dog on a couch"]]),  # identical
    (["a dog", "a cat"], [["a dog"], ["a cat"]]),  # identical, shorter than the longest n-gram
    (["A Dog, on: a couch!", "x"], [["a dog on a couch"], ["a cat"]]),  # punctuation and case
    (["1,000 dogs at 7:30", "2 of 3"], [["1,000 dogs at 7:30 a.m."], ["two of three"]]),  # numbers
    (["café naïve 中文 привет", "é"], [["a café naïve 中文", "кафе"], ["é"]]),  # unicode
    (["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]]),  # clipping
    (["dog", "a b c d e f g"], [["cat", "dog", "dog"], ["g f e d c b a"]]),  # several equal references; reversed
    (["a dog " * 20], [["a dog"]]),  # long
    ([" \t\n a\tdog\n "], [["a dog"]]),  # white space
)
