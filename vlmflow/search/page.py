"""A search as one HTML file: pictures inline, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from urllib.parse import urlsplit

from vlmflow.search.results import Hit, SearchResult
from vlmflow.search.thumbnails import SIDE, Thumbnail
from vlmflow.views_search import printable

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#1a1a1a}
h1{font-size:1.3em;overflow-wrap:anywhere}p{overflow-wrap:anywhere}
ol{list-style:none;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:1em}
li{border:1px solid #ddd;border-radius:4px;padding:.6em;min-width:0}
li.flagged{border-color:#b3261e}
.p{height:192px;display:flex;align-items:center;justify-content:center;background:#f4f4f4;overflow:hidden}
.p span{color:#666;font-size:13px;padding:1em;overflow-wrap:anywhere}
dl{margin:.5em 0 0;font-size:13px}dt{color:#666;font-size:11px}
dd{margin:0;overflow-wrap:anywhere;max-height:7.5em;overflow:auto;unicode-bidi:isolate}
.w{background:#fff4d6;border-left:4px solid #c98a00;padding:.3em .8em}
"""


def search_html(result: SearchResult, thumbnails: Sequence[Thumbnail], *, show_flagged: bool = False) -> str:
    """The result as a page. Every word from outside is escaped, in full, and marks of direction are spelled out.

    Args:
        thumbnails: one per hit.
        show_flagged: the addresses of flagged images as links too.
    """
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    query = shown(result.query)
    facts = [
        f"{result.num_matching:,} of {result.num_rows:,} images were searched in {result.seconds:.2f} s.",
        f"Catalog {shown(result.catalog)}, version {result.images_version}.",
    ]
    if result.where is not None:
        facts.insert(0, f"Only images of which {shown(result.where)} is true.")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{query[:200]}</title>" if "&" not in query[:200] else "<title>Search</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{query}</h1>",
        *(f"<p>{fact}</p>" for fact in facts),
        *(f'<p class="w">{shown(note)}</p>' for note in result.notes),
        "<ol>",
        *(_item(hit, picture, show_flagged) for hit, picture in zip(result.hits, thumbnails, strict=True)),
        "</ol></body></html>",
    ]
    return "\n".join(parts)


def _item(hit: Hit, thumbnail: Thumbnail, show_flagged: bool) -> str:
    may_link = show_flagged or not hit.is_flagged
    uri = link(hit.uri) if may_link else shown(hit.uri)
    decision = hit.decision if hit.decision_reason is None else f"{hit.decision}: {hit.decision_reason}"
    facts = [("score", f"{hit.score:.4f}"), ("decision", shown(decision)), ("uri", uri)]
    if hit.caption is not None:
        facts.append(("caption", shown(hit.caption)))
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    flagged = ' class="flagged"' if hit.is_flagged else ""
    return f'<li{flagged}><div class="p">{_picture(hit, thumbnail)}</div><dl>{body}</dl></li>'


def _picture(hit: Hit, thumbnail: Thumbnail) -> str:
    if thumbnail.uri is None:
        return f"<span>{shown(thumbnail.reason)}</span>"
    width, height = hit.width or 1, hit.height or 1
    scale = SIDE / max(width, height)
    size = f'width="{max(1, round(width * scale))}" height="{max(1, round(height * scale))}"'
    alt = "blurred: flagged by moderation" if thumbnail.is_blurred else f"result {hit.rank}"
    return f'<img src="{escape(thumbnail.uri)}" {size} alt="{alt}">'


def link(uri: str, max_chars: int | None = None) -> str:
    """An address as a link if a browser may follow it: http and https alone, never javascript: or data:."""
    text = shown(uri, max_chars)
    try:
        parts = urlsplit(uri)
    except ValueError:
        return text
    if parts.scheme not in ("http", "https") or not parts.netloc or printable(uri) != uri:
        return text
    return f'<a href="{escape(uri)}" rel="noopener noreferrer">{text}</a>'


def shown(text: str, max_chars: int | None = None) -> str:
    """A text from outside as HTML: escaped, invisible characters spelled out, cut to ``max_chars`` with a note."""
    return escape(printable(text, max_chars))
