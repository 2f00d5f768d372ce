"""The accuracy of answers as the VQA challenge counts it (Antol et al. 2015, arXiv:1505.00468): soft, normalised.

An answer counts by how many of the ten people gave it: fully from three on, averaged over leaving each of them out.
Spelling is evened out first, by the rules of the challenge's own script, its oddities included: the answer that is
judged loses punctuation and articles, and its number words become digits; people's answers lose their punctuation
alone, and where all of them agree, nothing. Readers of other files than the challenge's normalise people's answers
likewise. Where fewer than four people answered, it counts fully from as many on as are left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CACHED = 1 << 16  # answers come again and again: yes, no, 2
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_DIGITS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the script passes a flag where the number of replacements stands

# Words that lost their apostrophe; and those with two, which lost either one.
_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_TWO_APOSTROPHES = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
for _word in _TWO_APOSTROPHES.split():
    _head, _middle, _tail = _word.split("'")
    _CONTRACTIONS |= {f"{_head}{_middle}'{_tail}": _word, f"{_head}'{_middle}{_tail}": _word}
_CONTRACTIONS |= {"somebody'd": "somebodyd"}  # sic
_CONTRACTIONS |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
_CONTRACTIONS |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")


@lru_cache(_CACHED)
def normalize_answer(answer: str) -> str:
    """An answer as the challenge compares it."""
    words = [_DIGITS.get(word, word) for word in strip_punctuation(_one_line(answer)).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(_CACHED)
def strip_punctuation(answer: str) -> str:
    """What the challenge takes away of the answers that people gave."""
    has_number = _NUMBER_WITH_COMMA.search(answer) is not None
    kept = answer
    for sign in _PUNCTUATION:
        # Next to a blank, or anywhere beside a number with a comma, a sign vanishes; else it parts two words.
        beside_blank = f"{sign} " in answer or f" {sign}" in answer
        kept = kept.replace(sign, "" if beside_blank or has_number else " ")
    return _PERIOD.sub("", kept, count=_MAX_PERIODS)


def vqa_accuracy(answer: str | None, given: Sequence[str]) -> float:
    """The accuracy of one answer, in [0, 1].

    Args:
        answer: None: there is none.
        given: what people answered. Of one alone, nothing is left to leave out: then it must be the same, normalised.

    Raises:
        ValueError: nobody answered.
    """
    if not given:
        raise ValueError("a question without answers")
    if answer is None:
        return 0.0
    own = normalize_answer(answer)
    if len(given) == 1:
        return float(own == normalize_answer(given[0]))
    compared = [strip_punctuation(other) for other in given] if len(set(given)) > 1 else given
    same = [other == own for other in compared]
    enough = min(3, len(same) - 1)
    return sum(min(1.0, (sum(same) - mine) / enough) for mine in same) / len(same)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
