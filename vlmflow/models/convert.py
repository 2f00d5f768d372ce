"""Published pickles to folders that vlmflow loads: the only place that opens a pickle, and only when asked to by name.

A pickle is read with ``weights_only``: one that holds more than tensors in plain containers is refused, not run.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from vlmflow.errors import ConfigError, WeightsError
from vlmflow.files import locked
from vlmflow.paths import is_file, is_folder, is_there
from vlmflow.storage import check_on_disk

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("model_state_dict", "state_dict", "model")  # under which training scripts keep a state dict


class ConversionInputs(BaseModel):
    """Files that the published pickle does not hold."""

    config: Path | None = None  # the published configuration, JSON
    vocabulary: Path | None = None  # vocab.txt
    answers: Path | None = None  # the answers in the order of the outputs: a JSON list, or one a line


class ConversionReport(BaseModel):
    """What a conversion wrote."""

    folder: Path
    files: list[str]
    num_tensors: int
    num_parameters: int
    missing: list[str]  # what the folder still needs, and for what


def convert_weights(
    family: str, source: str | Path, folder: str | Path, inputs: ConversionInputs | None = None
) -> ConversionReport:
    """Converts a published checkpoint.

    Args:
        family: whose checkpoint it is; ``vilbert``.
        source: the pickle; or a folder with it, and with the files that ``inputs`` does not name.
        folder: where to write; it must be empty, if it exists.

    Raises:
        ConfigError: there is no conversion for the family, or the folder is in a store or cannot be written.
        WeightsError: a file is absent, the pickle holds more than tensors, or these do not fit the architecture.
    """
    if family not in _CONVERTERS:
        raise ConfigError(f"convert {family}: unknown", remedy=f"Use one of {', '.join(_CONVERTERS)}.")
    source, folder = Path(source), Path(folder)
    if not is_there(source):
        raise WeightsError(f"convert: {source} does not exist", remedy="Name the downloaded file or its folder.")
    if is_there(folder) and (not is_folder(folder) or any(folder.iterdir())):
        raise WeightsError(f"convert: {folder} is not empty", remedy="Name one that is empty, or does not exist yet.")
    check_on_disk(folder)
    target = folder.resolve()  # "." has no name
    try:
        with _partial(target) as partial:
            report = _CONVERTERS[family](source, partial, inputs or ConversionInputs())
            if is_there(target):
                # The folder itself stays: a shell may stand in it, or a disk be mounted there.
                for path in sorted(partial.iterdir()):
                    shutil.move(path, target / path.name)
            else:
                partial.rename(target)
    except OSError as error:
        reason = error.strerror or error
        remedy = "Make room there, or name another folder."
        raise ConfigError(f"convert: {folder}: {reason}", remedy=remedy) from error
    return report.model_copy(update={"folder": folder})


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, in place of what a killed conversion has left; it goes with the block."""
    place = target.with_name(f".{target.name}.partial")
    place.mkdir(parents=True, exist_ok=True)
    remedy = "Wait until it is done, or name another folder."
    with locked(place, ConfigError(f"convert: another conversion is writing to {target}", remedy=remedy)):
        try:
            for path in place.iterdir():
                path.unlink()
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, by name.

    Raises:
        WeightsError: it cannot be read, holds anything but tensors in plain containers, or no state dict.
    """
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"convert: {path} holds more than tensors, or is damaged; it was not run",
            remedy="Download it again from where it was published.",
        ) from error
    # What is no pickle, or half of one, can fail in any way: IndexError, KeyError, struct.error.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise WeightsError(f"convert: {path} cannot be read: {reason}", remedy="Download it again.") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise WeightsError(f"convert: {path} holds no state dict", remedy="Name the file with the model's weights.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def find_input(given: Path | None, source: Path, patterns: tuple[str, ...]) -> Path | None:
    """The file that was given, else the one in the source's folder that goes by the patterns.

    Raises:
        WeightsError: the file that was given does not exist, or several go by a pattern.
    """
    if given is not None:
        if not is_file(given):
            raise WeightsError(f"convert: {given} does not exist", remedy="Name an existing file.")
        return given
    folder = source if is_folder(source) else source.parent
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if is_file(path))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise WeightsError(f"convert: {folder} holds {names}", remedy="Name the one that is meant.")
        if found:
            return found[0]
    return None


def _vilbert(source: Path, folder: Path, inputs: ConversionInputs) -> ConversionReport:
    from vlmflow.models.vilbert.convert import convert_vilbert

    return convert_vilbert(source, folder, inputs)


_CONVERTERS: dict[str, Callable[[Path, Path, ConversionInputs], ConversionReport]] = {"vilbert": _vilbert}
