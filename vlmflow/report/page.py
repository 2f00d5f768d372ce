"""The page as a whole: its head, its policy for the browser, the pictures and the script."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib import resources

from vlmflow.report.html import Html, join, text
from vlmflow.report.pictures import Pictures

_SECTIONS = {
    "run": "The run",
    "catalog": "The catalog",
    "scores": "Scores and decisions",
    "new": "Newly flagged",
    "lowest": "Lowest match scores",
    "labels": "Examples per label",
    "duplicates": "Duplicates",
    "rows": "Rows",
}


def page(title: str, intro: Html, sections: list[Html], pictures: Pictures, footer: Html) -> str:
    """One self-contained document: the browser is told to load nothing and to run no script but ours.

    Args:
        title: from outside.
    """
    style, script = _file("page.css"), _file("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{name}">{shown}</a></li>' for name, shown in _SECTIONS.items())
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="referrer" content="no-referrer">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Report of {text(title, 100)}</title>",
            f"<style>{style}</style></head><body>",
            '<a class="skip" href="#main">Skip to the report</a>',
            f"<header><h1>Report of {text(title)}</h1>{intro}",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
            f'<main id="main" tabindex="-1">{join(sections)}</main>',
            f"<footer>{footer}</footer>",
            f'<script type="application/json" id="pictures">{_data(pictures)}</script>',
            f"<script>{script}</script>",
            "</body></html>",
            "",
        )
    )


def _data(pictures: Pictures) -> str:
    """The pictures as JSON in which no tag can end: by number, the clear one and the blurred one or null."""
    data = json.dumps([[picture.clear, picture.blurred] for picture in pictures.found.values()], separators=(",", ":"))
    return data.replace("<", "\\u003c")


def _file(name: str) -> str:
    return (resources.files("vlmflow.report") / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
