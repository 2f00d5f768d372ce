"""Values put into the text of a policy file, whose comments and layout stay.

Where a value stands is asked of the YAML parser, because a version may be written in any way that YAML knows.
"""

from __future__ import annotations

import json

import yaml

Node = yaml.Node


def with_text(text: str, key: str, value: str) -> str | None:
    """The file with another text under one of its own keys; None: it has no such key.

    Raises:
        yaml.YAMLError: the file is no YAML.
    """
    node = next((node for name, node in _pairs(text) if name.value == key), None)
    if node is None:
        return None
    before = text[node.start_mark.index : node.end_mark.index]
    line_end = "\n" if before.endswith("\n") else ""  # of a text in lines of its own, `|` or `>`
    return (
        f"{text[: node.start_mark.index]}{json.dumps(value, ensure_ascii=False)}{line_end}{text[node.end_mark.index :]}"
    )


def with_last(text: str, key: str, value: object) -> str | None:
    """The file with another value under its last key, which is written in block style; None: another key is last.

    Raises:
        yaml.YAMLError: the file is no YAML.
    """
    name = next((name for name, _ in _pairs(text)[-1:] if name.value == key), None)
    if name is None:
        return None
    tail = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120)
    return text[: name.start_mark.index] + tail


def _pairs(text: str) -> list[tuple[Node, Node]]:
    root = yaml.compose(text, yaml.SafeLoader)
    return root.value if isinstance(root, yaml.MappingNode) else []
