"""What a job file may say: all keys with what they mean, for people as YAML and for editors as a JSON schema."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import yaml

from vlmflow.config import Job

Schema: TypeAlias = Mapping[str, Any]

_WIDTH = 110
_HEAD = """\
# A job file: `vlmflow enrich --config job.yaml`; what the command line says wins over it.
# A key behind a `#` has the value that it has when it is left out. To set one, take its `#` away, and that of the key
# that it stands below, if any."""
# What has no default, and what a list or a mapping would hold.
_EXAMPLES: Mapping[str, Any] = {
    "source.uri": "photos/",
    "catalog.uri": "catalog/",
    "profile": "base",
    "models": {
        "caption": {"family": "blip_caption", "path": "models/blip"},
        "answer": {"family": "endpoint", "endpoint": {"url": "https://api.example.com/v1", "model": "qwen3-vl"}},
    },
    "pools": [{"tasks": ["embed", "moderate"], "gpus": 0.5}, {"tasks": ["caption", "match"], "gpus": 0.5}],
}
_BOUNDS = {
    "exclusiveMinimum": "above {:,}",
    "minimum": "at least {:,}",
    "maximum": "at most {:,}",
}


def job_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a job, with a description of every key."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}


def job_template() -> str:
    """A job file (YAML) with every key: those that have no default with an example, the others commented out."""
    schema = job_schema()
    return "\n".join([_HEAD, *_keys(schema, schema["$defs"], "", 0)]) + "\n"


def _keys(schema: Schema, parts: Mapping[str, Schema], path: str, depth: int) -> Iterator[str]:
    """The lines of the keys of one part of the job.

    Args:
        path: of the part, with a full stop at its end.
        depth: how deep it stands.
    """
    required = schema.get("required", ())
    for name, key in schema["properties"].items():
        is_set = name in required
        if depth == 0:
            yield ""
        yield from _described(key, parts, depth)
        if "$ref" in key:
            yield _line(f"{name}:", depth, is_set=is_set)
            yield from _keys(_part(key, parts), parts, f"{path}{name}.", depth + 1)
        elif f"{path}{name}" in _EXAMPLES and not is_set:
            example = yaml.safe_dump({name: _EXAMPLES[f"{path}{name}"]}, sort_keys=False)
            yield from (_line(line, depth, is_set=False) for line in example.splitlines())
            yield from _keys_of_items(key, parts, depth + 1)
        else:
            value = _EXAMPLES[f"{path}{name}"] if is_set else key["default"]
            yield _line(f"{name}: {_inline(value)}", depth, is_set=is_set)


def _described(key: Schema, parts: Mapping[str, Schema], depth: int, name: str = "") -> Iterator[str]:
    """What a key means, and what it may be, as comments; after its name, where that stands nowhere else."""
    indent = "  " * depth
    words = [name, str(key.get("description") or _part(key, parts).get("description", "")).replace("``", "`")]
    kind = next(kind for kind in key.get("anyOf", [key]) if kind.get("type") != "null")
    if "enum" in kind:
        words.append(f"One of {', '.join(kind['enum'])}.")
    several = kind.get("items", {}).get("enum") or kind.get("propertyNames", {}).get("enum")
    if several:
        words.append(f"Any of {', '.join(several)}.")
    if "examples" in key:
        words.append(f"Such as {', '.join(key['examples'])}.")
    bounds = [text.format(kind[bound]) for bound, text in _BOUNDS.items() if bound in kind]
    if bounds and ("maximum" in kind or kind.get("minimum") not in (None, 0)):  # nobody gives fewer than none
        words.append(f"{' and '.join(bounds).capitalize()}.")
    yield from (f"{indent}# {line}" for line in textwrap.wrap(" ".join(" ".join(words).split()), _WIDTH - len(indent)))


def _keys_of_items(key: Schema, parts: Mapping[str, Schema], depth: int) -> Iterator[str]:
    """What keys the members of a list or a mapping may have, as comments."""
    member = _part(key.get("items", key.get("additionalProperties", key)), parts)
    yield f"{'  ' * depth}# Keys of each:"
    for name, inner in member["properties"].items():
        default = inner.get("default")
        yield from _described(inner, parts, depth + 1, name + (":" if default is None else f" ({_inline(default)}):"))
        if _part(inner, parts):
            yield from _keys_of_items(inner, parts, depth + 2)


def _part(key: Schema, parts: Mapping[str, Schema]) -> Schema:
    """The part of the job that a key holds; empty: it holds a value."""
    reference = _reference(key)
    return parts[reference.rpartition("/")[2]] if reference else {}


def _reference(key: Schema) -> str:
    return next((str(one["$ref"]) for one in [key, *key.get("anyOf", ())] if "$ref" in one), "")


def _line(text: str, depth: int, *, is_set: bool) -> str:
    # Before the key, not the line: editors take the blank after a `#` away with it.
    key = text.lstrip(" ")
    return "  " * depth + " " * (len(text) - len(key)) + ("" if is_set else "#") + key


def _inline(value: Any) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
