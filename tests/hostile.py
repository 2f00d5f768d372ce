"""Texts that try to be more than text: for every field that comes from outside."""

from __future__ import annotations

HOSTILE = {
    "script": "</dd></title></style><script>alert(1)</script>",
    "attribute": "\" onerror=alert(1) x='",
    "image": "<img src=x onerror=alert(1)>",
    "entity": "&lt;script&gt;alert(1)&lt;/script&gt;",
    "comment": "<!-- --><![CDATA[ ]]>",
    "right to left": "abc\u202egpj.exe\u2066\u200f",
    "long": "é" * 10_000,
    "javascript": "javascript:alert(document.domain)",
    "data": "data:text/html,<script>alert(1)</script>",
    "mixed case": " JaVaScRiPt:alert(1)",
    "fake http": 'https://"><script>alert(1)</script>/',
    "newline": "java\nscript:alert(1)\x00\x1b[31m\x07",
    "formula": '=HYPERLINK("http://evil","x")',
    "markup": "[red]bold[/red] [link=http://evil]x[/link]",
    "surrogate": "a\udc80b",
}
