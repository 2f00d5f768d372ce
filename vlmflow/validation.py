"""What users write: YAML that is read strictly, and values that do not fit, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

# Of pydantic's, where its own words are for programmers.
_REASONS = {
    "extra_forbidden": "unknown key",
    "missing": "is missing",
    "model_type": "must hold keys of its own, {key: value}",
    "dict_type": "must hold keys of its own, {key: value}",
    "tuple_type": "must be a list, such as [a, b]",
    "list_type": "must be a list, such as [a, b]",
    "string_type": "must be a text, in quotes where it looks like a number or a date",
}


_MAX_DEPTH = 100  # of brackets; the parser sits for many seconds over thousands of them
# What a key can hold: the order of a set is another in each process, and with it the digest of a policy that has one.
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")


def _tag_of(node: yaml.Node) -> str:
    """A tag as people write it."""
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")


def _refused(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    what = f"the tag {_tag_of(node)} cannot be used: write texts, numbers, lists and mappings without one"
    raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently take the last, and what makes other things than
    texts, numbers, times, lists and mappings."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: maker
        for tag, maker in yaml.SafeLoader.yaml_constructors.items()
        if tag in [f"tag:yaml.org,2002:{name}" for name in _TAGS]
    } | {None: _refused}

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _MAX_DEPTH:
            what = f"more than {_MAX_DEPTH} brackets in each other"
            raise yaml.scanner.ScannerError(None, None, what, self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # `!!bool maybe`, `!!timestamp now`, `!!int ""`, `!!timestamp {=: now}`
        except (KeyError, AttributeError, IndexError, TypeError) as error:
            what = f"this is no {_tag_of(node)}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()  # `!!map [1]` is refused below
        for key_node, _ in pairs:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`, whose keys one beside it replaces
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Reads YAML, which makes data only.

    Raises:
        ValueError: it holds a date or a number that there is not.
        yaml.YAMLError: it is none, a key stands twice, it is nested too deep, or a tag makes what is no data.
    """
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deep") from error


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The first mapping with what the second says in its place; None says nothing."""
    result = dict(base)
    for name, value in over.items():
        if value is None:
            continue
        if isinstance(value, dict):
            below = {} if result.get(name) is None else result[name]
            # What holds no keys, such as `ray: auto`, stays for the check to name: replaced, it would mean the default.
            result[name] = merged(below, value) if isinstance(below, dict) else below
        else:
            result[name] = value
    return result


def describe_validation(error: ValidationError, *, what: str, of: type[BaseModel] | None = None) -> str:
    """One line that names every key that does not fit, and why. Values are not repeated: they may be secret.

    Args:
        of: the model that was to be made, so that an unknown key is told with the one that it resembles.
    """
    parts = []
    items = error.errors(include_url=False, include_input=False)
    inside = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    for item in items:
        # A list is short of what is wrong in it, so of `review: "0.5"` three keys would not fit.
        if item["type"] == "too_short" and item["loc"] in inside:
            continue
        where = ".".join(str(step) for step in item["loc"])
        reason = _REASONS.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        if of is not None and item["type"] == "extra_forbidden":
            *above, key = item["loc"]
            near = difflib.get_close_matches(str(key), _keys_at(of, above), n=1)
            reason += f", did you mean {near[0]}?" if near else ""
        parts.append(f"{where}: {reason}" if where else reason)
    return f"{what}: " + "; ".join(parts)


def missing_keys(error: ValidationError) -> set[str]:
    """The keys that are not there, with those above them: ``source.uri``."""
    return {".".join(str(step) for step in item["loc"]) for item in error.errors() if item["type"] == "missing"}


def _keys_at(model: type[BaseModel], steps: list[int | str]) -> list[str]:
    """The keys of the part of a model that the steps lead to."""
    for step in steps:  # numbers, and names in a mapping of parts, lead to no other kind of part
        field = model.model_fields.get(str(step))
        model = next(_models_in(field.annotation), model) if field is not None else model
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
