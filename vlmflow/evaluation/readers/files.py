"""Reading the benchmarks' JSON, with errors that say where it is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmflow.errors import EvaluationError
from vlmflow.storage import parse_address


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        EvaluationError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}", remedy="Name a file that can be read.") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(f"{path} is not JSON: {reason}", remedy="Download or write it again.") from error


def entries(content: Any, name: str, path: Path) -> list[Mapping[str, Any]]:
    """The list of objects under a name.

    Raises:
        EvaluationError: there is none.
    """
    found = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise EvaluationError(f"{path} has no list of objects named {name}", remedy="Is it the right file?")
    return found


def value(item: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """One value of an object.

    Raises:
        EvaluationError: it is absent, or of another type.
    """
    found = item.get(name)
    if not isinstance(found, kind) or isinstance(found, bool):
        shown = "absent" if found is None else f"{str(found)[:60]!r}"
        raise EvaluationError(f"{where}: {name} is {shown}", remedy="Is it the right file? It may be damaged.")
    return found


def image_uri(images: str | None, path: Path, *parts: str) -> str:
    """The address of an image below the folder of images, or beside the data file."""
    name = "/".join(part.strip("/") for part in parts if part)
    root = parse_address(images if images is not None else str(path.parent))
    return root.child(name)
