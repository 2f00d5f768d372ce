"""Words of a caption as the COCO caption scorer counts them: Penn Treebank tokens in lower case, punctuation dropped.

That scorer runs the Java tokeniser of CoreNLP 3.4.1. This is a tokeniser of its own that gives the same words; the
rules were found by comparing the two. Where words and numbers are glued together by several signs ("x'y'z",
"3/4-½") the two can differ.
"""

from __future__ import annotations

import re

# What the scorer drops after tokenising. It lists -LRB- in capitals and lowers the tokens: brackets stay.
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RESPELLED = str.maketrans(
    {
        **dict.fromkeys("\u2018\u201b\u2039\x91", "`"),
        **dict.fromkeys("\u2019\u203a\x92", "'"),
        **dict.fromkeys("\u201c\u00ab\x93", " `` "),
        **dict.fromkeys("\u201d\u00bb\x94", " '' "),
        **dict.fromkeys("\u2013\u2014\u2015\x96\x97", "--"),
        **dict.fromkeys("\u20ac\u00a4\u20a0\x80", " $ "),
        "\u2026": " ... ",
        "\u00a3": " # ",
        "\u00a2": " cents ",
        "\u00bc": " 1/4 ",
        "\u00bd": " 1/2 ",
        "\u00be": " 3/4 ",
        "\u2153": " 1/3 ",
        "\u2154": " 2/3 ",
        "\u00ad": None,
    }
)
_ENTITIES = re.compile(r"&(amp|lt|gt|quot|nbsp);", re.IGNORECASE)
_ENTITY = {"amp": " & ", "lt": " < ", "gt": " > ", "quot": " '' ", "nbsp": " "}

# Abbreviations that keep their full stop wherever they stand.
_ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|cie|cmdr|co|col|colo|"
    "conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|hon|inc|ind|insp|"
    "intl|jan|jos|jr|jul|jun|kan|kans|ky|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mme|mo|mon|mont|mr|mrs|ms|mt|mtg|natl|"
    "neb|nev|nov|oct|okla|penn|pfc|ph|plc|pres|prof|profs|pte|pty|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|"
    "spc|sq|sr|st|ste|supt|sys|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wis|wm|wyo"
)
# Those that are words in lower case, and those that need a number after them.
_CAPITAL_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERED = "art|ca|fig|figs|no|nos|op|pp|prop"
_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
_SPLIT_WORDS |= {"lemme": "lem me", "gimme": "gim me", "'tis": "'t is", "'twas": "'t was"}

# A letter, with the marks that scripts write upon it; beyond the basic plane nothing counts.
_MARKS = r"\u02b0-\u036f\u0483-\u0487\u0591-\u05bd\u0610-\u061a\u064b-\u0670\u0900-\u0903\u093a-\u0963\u0e31-\u0e4e"
_NUMERALS = r"\u00b2\u00b3\u00b9\u2070-\u209f\u2150-\u218f"
_LETTER = rf"(?:(?![{_NUMERALS}\U00010000-\U0010ffff])[^\W\d_]|[{_MARKS}\u2010\u2011\u3099\u309a])"
_ALNUM = rf"(?:{_LETTER}|(?![\U00010000-\U0010ffff])\d)"
_SYMBOL = (
    r"[\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bf\u00d7\u00f7\u060c\u061b\u061f\u066a\u06d4\u0964\u0965"
    r"\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e"
    r"\u2100-\u2109\u2114-\u2118\u211e-\u2129\u212e\u215b-\u215e\u2190-\u2bff\u3001\u3002\u30fb"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]"
)

_TOKEN = re.compile(
    "|".join(
        (
            r"(?P<tag></?[A-Za-z!?][^<>]*>)",
            r"(?:https?|ftp)://[^\s\"<>|(){}/]+\.[^\s\"<>|(){}]*[^\s\"<>|.!?(){},;:'-]",
            r"(?:www\.)(?:[^\s\"<>|.!?(){},]+\.)+[A-Za-z]{2,4}(?:/[^\s\"<>|(){}]*[^\s\"<>|.!?(){},-])?",
            r"[A-Za-z0-9][^\s\"<>|(){}@,;:]{0,80}@(?:[^\s\"<>|(){}.@,;:!?]+\.)*[A-Za-z0-9]+",
            r"[@#][A-Za-z]\w*",
            r"(?P<smile>[<>]?[:;=]['`]?[-o*]?[()DPdpO@|\[\]{}](?![A-Za-z0-9]))",
            rf"(?P<split>(?:cannot|gonna|gotta|wanna|lemme|gimme|'tis|'twas)(?!{_ALNUM}|[-_/'.&]{_ALNUM}))",
            r"c(?:\+\+|#)(?!\w)|'n'|'(?:n|em|cause|til|till|\d\d(?!'))(?!\w|[.,]\d)|'\d\ds(?!\w)|y'(?=all\b)|you'all\b",
            rf"{_LETTER}+?(?=n't(?!{_ALNUM}))|n't(?!{_ALNUM})",
            rf"'(?:s|d|m|re|ve|ll)(?!{_ALNUM})",
            r"\(\d{3}\)[ \u00a0]?\d{3}[- ]?\d{4}(?!\d)",
            r"(?-i:[A-Z]+&[A-Z]+)|(?-i:US|HK|NZ|[A-Z])\$(?=\d)|&#\d+;",
            r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:-[A-Za-z][A-Za-z0-9]*)*)+",
            # Words with hyphens; before the first one, full stops and commas are part of them.
            r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z0-9]+|[A-Za-z](?:\.[A-Za-z])+\.))+(?![^\W_])(?:\.(?=[,;:]))?",
            # Initials, such as u.s.
            rf"ph\.d\.|(?:[A-Za-z]\.){{2,}}(?!{_ALNUM})",
            rf"(?:{_NUMBERED})\.(?=\s*\d)",
            rf"(?:{_ABBREVIATIONS})\.(?!{_ALNUM})",
            rf"(?-i:{_CAPITAL_ABBREVIATIONS})\.(?!{_ALNUM})",
            r"(?<![\w.])[A-Za-z]\.(?=\s*$|\s+(?-i:[^A-Z\s])|[^\s\w'\"`)])",
            # What ends in a stop before other punctuation is taken for an abbreviation.
            rf"{_LETTER}+\.(?=[,;:])",
            # Words and numbers, some joined within by single signs.
            r"[A-Za-z]+(?:[.!?][A-Za-z]+)+",
            r"[-+]?\d*(?:[.,:]\d+)+|[-+]\d+",
            rf"[dol]'{_ALNUM}+(?:[-_]{_ALNUM}+)*",
            rf"(?:ma'am|ne'er|c'mon|o'clock)(?!{_ALNUM})",
            rf"{_ALNUM}+(?:[-_]{_ALNUM}+)*",
            r"[?!]+|\*+|<<|>>|\^_\^|-_-",
            r"\.{3,5}",
            r"-{2,}",
            r"``|''",
            r"__+",
            rf"[\"'`.,:;?!@#$%&*()\[\]{{}}<>/\\|~^_=+-]|{_SYMBOL}",
        )
    ),
    re.IGNORECASE,
)


def tokenize(caption: str) -> list[str]:
    """The words of a caption: lower case, without punctuation. An empty caption has none."""
    return [token for token in tokens(caption) if token not in _DROPPED]


def tokens(caption: str) -> list[str]:
    """All tokens of a caption, punctuation included."""
    text = _ENTITIES.sub(lambda match: _ENTITY[match[1].lower()], caption.translate(_RESPELLED))
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0].lower()
        kind = match.lastgroup
        if kind == "split":
            found += _SPLIT_WORDS[token].split()
        elif kind == "smile":
            found.append("".join(_BRACKETS.get(letter, letter) for letter in token))
        elif kind == "tag":
            found.append(re.sub(r"\s", "\u00a0", token))
        else:
            found.append(_spelled(token))
    return found


def _spelled(token: str) -> str:
    if token.startswith("(") and len(token) > 1:
        return token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\u00a0")
    if token.startswith("--"):
        return "--"
    if token.startswith("..."):
        return "..."
    if token == '"':
        return "''"
    return _BRACKETS.get(token, token)
