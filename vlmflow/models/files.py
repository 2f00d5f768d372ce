"""What is wrong with a folder of weights, as far as its files tell before anything is loaded from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vlmflow.errors import WeightsError
from vlmflow.paths import is_folder, is_there

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_UNFINISHED = ("*.incomplete", "*.part", "*.crdownload", "*.aria2")
_POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_WHOLE_NUMBERS = frozenset(("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"))
_AGAIN = "Copy the file again, whole: its size and its SHA-256 stand where the model was published."


@contextmanager
def told_of_files(folder: Path) -> Iterator[None]:
    """Within the block files of a folder are looked at.

    Raises:
        WeightsError: they cannot be: access is refused, a name is too long, and the like.
    """
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"weights: {error.filename or folder}: {error.strerror or error}",
            remedy="Let the user that vlmflow runs as read the folder and its files, on every node.",
        ) from error


def stamp(path: Path) -> tuple[str, int, int, int]:
    """Another one for a file that was written to or replaced, also where its time was set back."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_pointer(path: Path) -> None:
    """Refuses what git puts in a large file's place where git-lfs is absent.

    Raises:
        WeightsError: the file is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise WeightsError(
                f"weights: {path} is a pointer of git-lfs, not the file itself",
                remedy="Run `git lfs install` and `git lfs pull` in the repository, or download the file.",
            )


def tensors_of(path: Path) -> dict[str, str]:
    """The names of the tensors in a safetensors file, with the dtypes that they are stored in: F32, BF16, ...

    Raises:
        WeightsError: the file is cut off, damaged, or something else.
    """
    return _tensors_of(*stamp(path))


@lru_cache(maxsize=256)
def _tensors_of(path: str, size: int, mtime_ns: int, ctime_ns: int) -> dict[str, str]:
    check_pointer(Path(path))
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise WeightsError(
            f"weights: {path} is no whole safetensors file: {str(error)[:120]} ({size:,} bytes)", remedy=_AGAIN
        ) from error


def check_unquantized(files: Sequence[Path]) -> None:
    """Refuses weights that are whole numbers: without their scales, which our models do not apply, they mean nothing.

    Raises:
        WeightsError: names some of them.
    """
    found = [
        f"{name} ({dtype})"
        for path in files
        for name, dtype in tensors_of(path).items()
        if dtype in _WHOLE_NUMBERS and name.endswith("weight")
    ]
    if found:
        some = ", ".join(sorted(found)[:3]) + (", ..." if len(found) > 3 else "")
        raise WeightsError(
            f"weights: {files[0].parent} is quantized: {len(found)} weights are whole numbers: {some}",
            remedy="Use the files in float32, float16 or bfloat16 that it was made of.",
        )


def told_of_none(folder: Path, names: Sequence[str], origin: str, what: str) -> WeightsError:
    """Why a folder has no weights, as far as what lies there tells.

    Args:
        names: of the files that would be read.
        origin: of the files that belong there.
        what: is absent.
    """
    put = f"Put the files of {origin} there."
    there = sorted(path.name for path in folder.iterdir())
    dangling = [name for name in there if (folder / name).is_symlink() and not is_there(folder / name)]
    if dangling:
        return WeightsError(
            f"weights: {folder / dangling[0]} is a link to {(folder / dangling[0]).readlink()}, which is not there",
            remedy="Copy the files themselves (`cp -rL`); of a cache of the hub its folder blobs belongs to them.",
        )
    snapshots = sorted(path.name for path in (folder / "snapshots").glob("*") if is_folder(path))
    if snapshots:
        return WeightsError(
            f"weights: {folder} is a cache of the hub, whose models lie in its snapshots",
            remedy=f"Name one of them as the folder: {folder / 'snapshots' / snapshots[0]}",
        )
    if "adapter_config.json" in there:
        return of_adapter(folder)
    for patterns, state in ((_UNFINISHED, "is a download that has not finished"), (("*.gguf",), "is of llama.cpp")):
        if found := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
            return WeightsError(f"weights: {folder / found[0]} {state}, and there is no {what}", remedy=put)
    if pickled := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        return WeightsError(
            f"weights: {folder / pickled[0]} is a pickle, which can run code when it is loaded",
            remedy=f"Use the safetensors files of {origin}, or convert it to {names[0]}.",
        )
    others = [name for name in there if name.endswith(".safetensors")]
    if others and any("-of-" in name for name in others) and (index := [n for n in names if n.endswith(".json")]):
        return WeightsError(
            f"weights: {folder} has shards ({others[0]}), but not {index[0]}, which says what is in them", remedy=put
        )
    other = f"; {', '.join(others[:3])} is none of {', '.join(names)}" if others else ""
    return WeightsError(f"weights: no {what} in {folder}{other}", remedy=put)


def of_adapter(folder: Path) -> WeightsError:
    """What is said of a folder with an adapter in it."""
    return WeightsError(
        f"weights: {folder} holds an adapter of PEFT (adapter_config.json), which is not applied",
        remedy="Merge it into its base model (peft's `merge_and_unload`, then `save_pretrained`), and name its folder.",
    )
