"""Where weights come from, and which may be loaded: safetensors only, nothing pickled, no remote code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmflow.config import ModelConfig
from vlmflow.errors import WeightsError
from vlmflow.families import FAMILIES, family_of, is_own
from vlmflow.models.files import (
    check_pointer,
    check_unquantized,
    of_adapter,
    stamp,
    tensors_of,
    told_of_files,
    told_of_none,
)
from vlmflow.models.identity import short_digest
from vlmflow.paths import is_file, is_folder, is_there

_TOKENIZER_NAMES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")


def locate(config: ModelConfig) -> Path:
    """The local folder with the model's files; those of a hub repository are downloaded at the pinned revision.

    Raises:
        WeightsError: the folder is absent, no folder or revision is named, or the hub does not give the files.
    """
    if config.path is not None:
        return require_folder(config)
    if config.repo is None:
        raise WeightsError(f"model of family {config.family}: neither path nor repo", remedy="Name one of the two.")
    if config.revision is None or not _COMMIT_HASH.fullmatch(config.revision):
        raise WeightsError(
            f"{config.repo}: revision {config.revision or 'missing'} is no commit hash",
            remedy="Pin the repository: set `revision` to the 40 digits of the commit that you reviewed.",
        )
    return _download(config.repo, config.revision, config.family)


def require_folder(config: ModelConfig, *, licence: str | None = None) -> Path:
    """The model's local folder, which must be there and hold safetensors.

    Raises:
        WeightsError: it does not; the message says what belongs there.
    """
    folder = expanded(config.path or "")
    origin = f"{config.repo} ({licence})" if config.repo and licence else config.repo or f"a {config.family} model"
    with told_of_files(folder):
        if is_file(folder):
            raise WeightsError(f"weights: {folder} is a file", remedy="Name the folder that it is in.")
        if not is_folder(folder):
            raise WeightsError(f"weights: no folder {folder}", remedy=f"Put the files of {origin} there.")
        files = find_weights(folder, config.family)
        if not files:
            names = family_of(config.family).weight_names
            what = f"file {' or '.join(names)}" if is_own(config.family) else "safetensors file"
            raise told_of_none(folder, names, origin, what)
    _check_plain(folder, files, config.family)
    return folder


def expanded(path: str) -> Path:
    """A folder as a job names it, with `~` for the user's own.

    Raises:
        WeightsError: `~name` is of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WeightsError(f"weights: no folder {path}: {error}", remedy="Write the path out.") from error


def _check_plain(folder: Path, files: list[Path], family: str) -> None:
    """Refuses quantized weights and adapters, which most models would be built without: what they give is another.

    What transformers loads as it is may be quantized, if its configuration says by which method; an adapter it applies
    or not, as packages are installed. vLLM knows both.
    """
    if is_own(family) or family == "vllm":
        return
    if is_there(folder / "adapter_config.json"):
        raise of_adapter(folder)
    facts = family_of(family)
    path = folder / facts.config_name
    values = read_json(path) if is_file(path) else {}
    methods = methods_of(values, path)
    if facts.reader == "chat" and methods:
        return
    if methods:
        method = str(methods[0].get("quant_method"))[:40]
        raise WeightsError(
            f"weights: {path}: quantization_config ({method}): the family {family} reads no quantized weights",
            remedy="Use the files in float32, float16 or bfloat16 that it was made of.",
        )
    check_unquantized(files)


def methods_of(values: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """By what the weights were quantized: ``quantization_config``, which may be said of a part of the model alone.

    Args:
        path: the file that ``values`` were read from.

    Raises:
        WeightsError: one is no JSON object.
    """
    parts = (values, *(part for part in values.values() if isinstance(part, dict)))
    return [method for part in parts if (method := section_of(part, "quantization_config", path))]


def find_weights(folder: Path, family: str) -> list[Path]:
    """The safetensors files that loading would read; empty: there are none.

    Raises:
        WeightsError: a file of them is cut off or damaged, or the list of the shards is, or names one that is absent.
    """
    for name in family_of(family).weight_names:
        path = folder / name
        if not is_file(path):
            continue
        check_pointer(path)
        if path.suffix == ".json":
            names = section_of(read_json(path), "weight_map", path).values()
            if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
                raise WeightsError(
                    f"weights: {path}: weight_map names no files of the folder", remedy="Copy the model's folder again."
                )
            shards = sorted({folder / name for name in names})
            if any(shard.suffix != ".safetensors" for shard in shards):
                return []  # an index of pickles
            absent = [shard.name for shard in shards if not is_file(shard)]
            if absent:
                some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
                raise WeightsError(
                    f"weights: {folder} lacks {len(absent)} of the {len(shards)} files that {name} names: {some}",
                    remedy="Copy those files too.",
                )
            for shard in shards:
                tensors_of(shard)
            return shards
        if path.suffix == ".safetensors":
            tensors_of(path)
        return [path]
    return []


def weights_digest(folder: Path, family: str, architecture: str | None = None) -> str:
    """SHA-256 over names and contents of the files that loading reads: weights, configuration, tokenizer.

    Args:
        family: one's own counts by its name too.
        architecture: open_clip's name; its configuration counts where the folder has none of its own.

    Raises:
        WeightsError: open_clip has no such architecture, or a file cannot be read.
    """
    facts = family_of(family)
    names = [facts.config_name, *_TOKENIZER_NAMES, *facts.companion_names]
    files = [*find_weights(folder, family), *(folder / name for name in names if is_file(folder / name))]
    total = hashlib.sha256()
    with told_of_files(folder):
        for path in sorted(files):
            check_pointer(path)
            total.update(f"{path.name} {_file_digest(*stamp(path))}\n".encode())
    if architecture is not None and family == "open_clip" and not is_file(folder / facts.config_name):
        # By its content: equal weights are another model with another activation, which no tensor tells.
        total.update(f"architecture {short_digest(read_open_clip_model(folder, architecture))}\n".encode())
    if is_own(family):  # another class makes other outputs of equal files: thresholds and prompts' vectors are not its
        total.update(f"family {family}\n".encode())
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of the model's configuration files.

    Raises:
        WeightsError: it is absent, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"weights: {path}: {error.strerror}", remedy="Copy the model's whole folder.") from error
    except (ValueError, RecursionError) as error:
        with told_of_files(path.parent):
            check_pointer(path)
        reason = f": {error}"[:100] if isinstance(error, ValueError) else ""
        raise WeightsError(f"weights: {path} is not JSON{reason}", remedy="Copy the model's folder again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"weights: {path} holds no JSON object", remedy="Copy the model's folder again.")
    return content


def section_of(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A part of a configuration file; empty: it has none of this name, or null.

    Args:
        path: the file that ``values`` were read from.

    Raises:
        WeightsError: it is no JSON object.
    """
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise WeightsError(f"weights: {path}: {name} is no JSON object", remedy="Copy the model's folder again.")
    return found


def read_open_clip_model(folder: Path, architecture: str | None) -> dict[str, Any]:
    """The model part of open_clip's configuration: the folder's own, else that of the architecture named.

    Raises:
        WeightsError: there is neither, or open_clip has no such architecture.
    """
    _refuse_other_format(folder)
    path = folder / "open_clip_config.json"
    if is_file(path):
        model = read_json(path).get("model_cfg")
        parts = [model.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else [None]
        if not isinstance(model, dict) or "embed_dim" not in model or not all(isinstance(part, dict) for part in parts):
            raise WeightsError(f"weights: {path} has no whole model_cfg", remedy="Copy open_clip's own file.")
        return model
    if architecture is None:
        raise WeightsError(
            f"weights: no {path.name} in {folder}", remedy="Put it there, or set `architecture` to open_clip's name."
        )
    spec = find_spec("open_clip")  # its own list of architectures; importing it would import torch
    assert spec is not None
    assert spec.origin is not None
    known = Path(spec.origin).parent / "model_configs" / f"{architecture.replace('/', '-')}.json"
    if not is_file(known):
        raise WeightsError(
            f"architecture {architecture}: open_clip knows none of this name",
            remedy="See open_clip.list_models(), or put an open_clip_config.json into the folder.",
        )
    return read_json(known)


def _refuse_other_format(folder: Path) -> None:
    """A CLIP is often at hand as transformers saves it, and no file that could be put there makes it open_clip's."""
    names: list[str] = []
    remedy = (
        "Use the repository with the same weights in open_clip's format: for openai/clip-vit-base-patch32 "
        "timm/vit_base_patch32_clip_224.openai, for google/siglip-base-patch16-224 timm/ViT-B-16-SigLIP."
    )
    for path in find_weights(folder, "open_clip"):
        names.extend(tensors_of(path))
    if any(name.startswith("vision_model.") for name in names):
        with contextlib.suppress(WeightsError):
            if able := families_that_read(read_json(folder / "config.json").get("model_type")):
                remedy = f"Set `family: {able[0]}`, which reads it. Or {remedy[0].lower()}{remedy[1:]}"
        raise WeightsError(
            f"weights: {folder} holds a model as transformers saves it, which open_clip does not read", remedy=remedy
        )


def families_that_read(model_type: object) -> tuple[str, ...]:
    """The names of the families whose adapters read a ``model_type`` of config.json."""
    return tuple(name for name, family in FAMILIES.items() if model_type in family.model_types)


def check_model_type(folder: Path, family: str) -> None:
    """Refuses a folder with a model of a kind that the family's adapters do not read.

    Raises:
        WeightsError: its configuration is absent, or of such a model.
    """
    known = family_of(family).model_types
    if not known:
        return
    path = folder / "config.json"
    found = read_json(path).get("model_type")
    if found in known:
        return
    whole, _, part = str(found).removesuffix("_model").rpartition("_")
    others = families_that_read(found)
    # Of several rather one that plays the same role.
    others = tuple(name for name in others if {*FAMILIES[name].roles} & {*family_of(family).roles}) or others
    if others:
        remedy = f"Set `family: {others[0]}`, which reads it."
    elif whole in known and part in ("text", "vision"):
        remedy = f"It is the encoder of {'texts' if part == 'text' else 'images'} alone. Use the whole model."
    else:
        remedy = f"The family reads {', '.join(known)}."
    raise WeightsError(f"weights: {path}: model_type {str(found)[:40]} is not of the family {family}", remedy=remedy)


def check_keys(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuses weights that do not fit the architecture.

    Raises:
        WeightsError: names some of the tensors that are missing or unexpected.
    """
    # Older checkpoints hold this buffer, which the libraries compute now.
    parts = {
        "missing": sorted(missing),
        "unexpected": sorted(key for key in unexpected if not key.endswith("position_ids")),
    }
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in parts.items()
        if keys
    ]
    if found:
        remedy = "Use the configuration file that belongs to these weights."
        saved_as = read_json(folder / "config.json").get("architectures") if is_file(folder / "config.json") else None
        if isinstance(saved_as, list) and saved_as:  # as there are BLIPs for captions, for matching and for answers
            remedy += f" If it does, they are of {str(saved_as[0])[:80]}: use a family for that."
        raise WeightsError(
            f"weights: {folder} does not fit its architecture: {'; '.join(found)}",
            remedy=remedy,
        )


def _download(repo: str, revision: str, family: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.safetensors", "*.safetensors.index.json", *_TOKENIZER_NAMES]
    patterns += [name for facts in FAMILIES.values() for name in (facts.config_name, *facts.companion_names)]
    facts = family_of(family)
    patterns += [*facts.weight_names, facts.config_name, *facts.companion_names]
    patterns += ["p*processor_config.json", "chat_template.*"]  # "preprocessor_config.json" too
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:  # LocalEntryNotFoundError, no network: an OSError
        raise WeightsError(
            f"weights: {repo} at {revision[:12]} cannot be downloaded: {type(error).__name__}",
            remedy="Check repository, revision and network, or name a local folder with `path`.",
        ) from error


@lru_cache(maxsize=256)
def _file_digest(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    """SHA-256 of a file; size and times are there so that a changed file is hashed again."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
