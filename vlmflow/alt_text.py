"""Alternative texts: what a page says in place of an image, made of its caption and of the text found in it.

No model is asked. What can be mended without inventing anything is mended (an opening such as "a photo of", the
capital, the full stop); what cannot is kept and named by the rule that it breaks. The rules look at one image alone,
and know English; that no two images share a text only the whole catalog tells: :mod:`vlmflow.alt_text_report`.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

MIN_CHARS, MAX_CHARS = 10, 150  # of the whole text; screen readers read much more in one breath badly

# In the order in which they are looked at; the first that is broken is named.
RULES = ("empty", "opening", "file_name", "unfinished", "too_short", "too_long")

_PICTURE = r"(?:photo|photograph|picture|image|pic|snapshot)s?"
_LEAD = r"(?:(?:this|there|here|it) is |it's )?(?:an? |the |one )?(?:close[- ]?up |stock |black and white |colou?r )*"
_SHOWS = r"(?:\s+(?:of|with|shows|showing|depicts|depicting|that\s+shows|that\s+depicts):?|:)"
_OPENING = re.compile(rf"{_LEAD}{_PICTURE}{_SHOWS}\s+", re.I)
# Things that are called by their pictures: not the picture that the text stands for.
_THINGS = r"(?:frame|book|album|booth|window|wall|shoot|studio|editor|tube|postcard|card)s?|galler(?:y|ies)"
_STILL_OPENS = re.compile(rf"{_LEAD}{_PICTURE}\b(?![ -](?:{_THINGS})\b)", re.I)
_FILE_NAME = re.compile(
    r"\b[\w%+-]+\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|heic)\b|\b(?:img|dscn?|dscf|pict|pxl|mvimg)[-_ ]?\d{3,}", re.I
)
QUOTE = ' Text in the image: "'  # before what is quoted
_HTTP = re.compile(r"https?://", re.I)
_ENDED = re.compile(r"[.!?\u2026][\"'\u201d\u2019)]*$")
# Words after which a sentence goes on: a caption that stops there was cut at its last token.
_GOES_ON = re.compile(
    r"(?:a|an|the|and|or|but|with|without|of|in|on|at|by|for|from|to|into|onto|next|beside|between"
    r"|through|against|about|as|is|are|was|were|that|which|who|while|wearing|holding|very|his|her"
    r"|their|its)",
    re.I,
)


def alt_text(caption: str | None, uri: str, found: str | None = None) -> tuple[str | None, str | None]:
    """The alternative text of an image, and the rule that it breaks.

    Args:
        uri: of the image; its file name must not stand for a description.
        found: text that stands in the image, as the caller has read it; it is quoted after the caption.

    Returns:
        The text, None without a caption or where nothing is left of it; and one of :data:`RULES`, None if all hold.
    """
    if caption is None:
        return None, None
    described = _without_opening(" ".join(caption.split()))
    if not any(character.isalnum() for character in described):
        return None, "empty"
    finished = described.rstrip(" ,;:-\u2013\u2014")
    text = finished if _ENDED.search(finished) else f"{finished}."
    text = text[0].upper() + text[1:]
    quoted = " ".join((found or "").split())
    if quoted and quoted.casefold() not in text.casefold():
        text = f'{text}{QUOTE}{quoted}".'
    return text, _broken(finished, text, uri)


def quotes(text: str, found: str | None) -> bool:
    """Whether an alternative text says what was found in the image, and quotes nothing else."""
    quoted = " ".join((found or "").split())
    if QUOTE in text:
        return bool(quoted) and text.endswith(f'{QUOTE}{quoted}".')
    return quoted.casefold() in text.casefold()


def _without_opening(text: str) -> str:
    # "a picture of a photo of" has two of them; what is all opening is left as it is.
    while (match := _OPENING.match(text)) and text[match.end() :].strip():
        text = text[match.end() :].strip()
    return text


def _broken(described: str, text: str, uri: str) -> str | None:
    """The first rule that is broken by what was described of the image, or by the whole text."""
    if _STILL_OPENS.match(described):
        return "opening"
    if _FILE_NAME.search(described) or _plain(described) == _plain(_stem(uri)):
        return "file_name"
    words = re.findall(r"[\w']+", described)
    if not _ENDED.search(described) and _GOES_ON.fullmatch(words[-1]):
        return "unfinished"
    if len(text) < MIN_CHARS:
        return "too_short"
    return "too_long" if len(text) > MAX_CHARS else None


def _stem(uri: str) -> str:
    """The name of the file, or of the member of an archive, without its extension; as people read it."""
    name = uri.rsplit("#", 1)[-1]
    return unquote(PurePosixPath(urlsplit(name).path).stem) if _HTTP.match(name) else PurePosixPath(name).stem


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()
