"""Pieces of HTML. ``Html`` is text that is safe as it stands: whatever comes from outside goes through :func:`text`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NewType

from vlmflow.search import page

Html = NewType("Html", str)
NOTHING = Html("")
MAX_CHARS = 200  # of one text from outside, where there are many


def text(value: object, max_chars: int | None = MAX_CHARS) -> Html:
    """A value from outside, as text; of a number, thousands are set apart. Null is a dash."""
    if value is None:
        return Html("–")
    if isinstance(value, int) and not isinstance(value, bool):
        return Html(f"{value:,}")
    return Html(page.shown(str(value), max_chars))


def address(uri: str, *, may_link: bool) -> Html:
    """An address; as a link only if a browser may follow it."""
    return Html(page.link(uri, MAX_CHARS)) if may_link and len(uri) <= 2_000 else text(uri)


def number(value: float | None, digits: int = 2) -> Html:
    """A number with so many digits; null and NaN are a dash."""
    return Html("–") if value is None or value != value else Html(f"{value:.{digits}f}")


def join(parts: Iterable[Html], between: str = "\n") -> Html:
    """Pieces one after the other."""
    return Html(between.join(parts))


def paragraph(*parts: Html, kind: str = "") -> Html:
    """A paragraph; ``kind``: its class."""
    return Html(f"<p{_class(kind)}>{join(parts, ' ')}</p>")


def section(name: str, title: str, *parts: Html) -> Html:
    """A section with a heading, which can be linked to as ``#name``."""
    return Html(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>\n{join(parts)}</section>'
    )


def heading(title: str) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{title}</h3>")


def facts(pairs: Mapping[str, Html]) -> Html:
    """Names with values."""
    return Html(
        "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs.items()) + "</dl>"
    )


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Html]]) -> Html:
    """A table, whose first cell of each row heads the row. Heads that start with # are numbers, to the right."""
    kinds = [' class="n"' if head.startswith("#") else "" for head in heads]
    names = "".join(
        f'<th scope="col"{kind}>{head.removeprefix("#")}</th>' for head, kind in zip(heads, kinds, strict=True)
    )
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {caption}">'
        f"<table><caption>{caption}</caption><thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(summary: str, *parts: Html) -> Html:
    """What is shown on demand."""
    return Html(f"<details><summary>{summary}</summary>{join(parts)}</details>")


def within(parts: Sequence[Html], max_bytes: int) -> tuple[list[Html], int]:
    """As many pieces as there is room for, and how many are left out."""
    kept: list[Html] = []
    size = 0
    for part in parts:
        size += len(part.encode())
        if size > max_bytes:
            break
        kept.append(part)
    return kept, len(parts) - len(kept)


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
