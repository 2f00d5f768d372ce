"""Models of transformers from a folder: safetensors alone, no code of the folder's own, errors in our words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from transformers import AutoProcessor, AutoTokenizer

from vlmflow.device_errors import is_device_broken, is_out_of_memory
from vlmflow.errors import WeightsError
from vlmflow.models.kinds import check_kind, check_method
from vlmflow.models.weights import read_json

_REMEDY = "Copy the model's whole folder: configuration, safetensors and tokenizer that belong together."
ONE_MODEL = "Copy config.json and the tokenizer's files of one model."
_MAX_STRAY = 0.01  # of a tokenizer's words


def load_model(
    model_class: Any, folder: Path, dtype: torch.dtype, device: str, config: Any = None
) -> tuple[Any, list[str], list[str]]:
    """Builds a model and fills in its weights; on the CPU, for inference.

    Args:
        model_class: of transformers; one that chooses by the configuration too.
        device: that the caller moves the model to.
        config: instead of the folder's.

    Returns:
        The model; the tensors that it lacks; those that it has no use for.

    Raises:
        WeightsError: the weights or their configuration are absent or do not fit, are no numbers, are of a kind or
            quantized by a method that transformers has not, or need a package that is not installed.
    """
    read_json(folder / "config.json")  # without one, transformers would take the defaults of the class
    check_kind(folder, model_class, config)
    check_method(folder)
    options = {} if config is None else {"config": config}
    with in_our_words(folder, model_class.__name__), _told_of_packages(folder, "model"), _quietly():
        model, found = model_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # left out, classes that choose would ask on the terminal
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else an error that names none of them
            **options,
        )
    _check_shapes(folder, found["mismatched_keys"])
    check_numbers(folder, model, missing=found["missing_keys"])
    if torch.device(device).type == "cpu":
        _detach(model)
    return model.eval().requires_grad_(False), sorted(found["missing_keys"]), sorted(found["unexpected_keys"])


def check_numbers(folder: Path, model: torch.nn.Module, *, missing: Collection[str] = ()) -> None:
    """Refuses weights that are not finite: a training that diverged, or a file that was damaged.

    One of them may spoil all that a model gives, or a word alone that few images have to do with. Of tensors that no
    file holds, named by ``missing``, nothing is known: their memory may be as it was found.

    Raises:
        WeightsError: names the first of them.
    """
    held = {name: values for name, values in model.named_parameters() if name not in missing}
    wrong = [
        name
        for name, values in held.items()
        if values.is_floating_point() and values.numel() and not all(end.isfinite() for end in torch.aminmax(values))
    ]
    # Of buffers, masks may well hold infinities.
    wrong += [name for name, values in model.named_buffers() if values.is_floating_point() and values.isnan().any()]
    if wrong:
        some = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise WeightsError(
            f"weights: {folder} holds numbers that are not finite, in {len(wrong)} tensors: {some}",
            remedy="Copy the files again from where the model was published; of a model of your own, go back to a "
            "checkpoint from before its training diverged.",
        )


def check_finite(folder: Path, dtype: torch.dtype, *outputs: torch.Tensor) -> None:
    """Refuses a model that gives no numbers when it is tried: it was trained in a dtype that reaches farther.

    Args:
        dtype: that it computes in.
        outputs: of it, for an image or a text.

    Raises:
        WeightsError: some are not finite.
    """
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise WeightsError(
            f"weights: the model of {folder} gives numbers that are not finite for a black image or a word, in "
            f"{str(dtype).removeprefix('torch.')}",
            remedy="Copy the weights again from where the model was published."
            if dtype == torch.float32
            else "Set `dtype: float32` in the job, or bfloat16: float16 holds no number beyond 65,504.",
        )


def _detach(model: torch.nn.Module) -> None:
    """Gives a model memory of its own.

    transformers maps the file into memory: whoever wrote to it later would change the model at work, and cutting it off
    would kill the process.
    """
    for values in (*model.parameters(), *model.buffers()):
        values.data = values.data.clone()


def load_config(config_class: Any, folder: Path) -> Any:
    """``config.json`` as a configuration class of transformers; a WeightsError where it does not fit."""
    with in_our_words(folder, config_class.__name__), _quietly():
        return config_class.from_pretrained(folder, local_files_only=True)


def load_tokenizer(folder: Path, num_words: int) -> Any:
    """The folder's tokenizer.

    Args:
        num_words: of its model; see :func:`for_model`.

    Raises:
        WeightsError: it is absent, knows no words, is of another model, or needs code of its own or a package that is
            not installed.
    """
    with in_our_words(folder, "a tokenizer"), _told_of_packages(folder, "tokenizer"):
        # trust_remote_code must be given: left out, transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_words(folder, tokenizer)
    return for_model(folder, tokenizer, num_words)


def load_text_tokenizer(folder: Path, num_words: int) -> Any:
    """The folder's tokenizer, for batches of texts: see :func:`tokenize`.

    Args:
        num_words: of its model; see :func:`for_model`.

    Raises:
        WeightsError: as :func:`load_tokenizer`, or it cannot fill up the shorter texts of a batch.
    """
    tokenizer = load_tokenizer(folder, num_words)
    check_padding(folder, tokenizer)
    return tokenizer


def load_processor(folder: Path) -> Any:
    """What the folder's model makes of images and texts.

    Raises:
        WeightsError: as :func:`load_tokenizer` of its tokenizer.
    """
    with in_our_words(folder, "a processor"), _told_of_packages(folder, "processor"), _quietly():
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (tokenizer := getattr(processor, "tokenizer", None)) is not None:
            check_words(folder, tokenizer)
    return processor


def check_words(folder: Path, tokenizer: Any) -> None:
    """Refuses a tokenizer without a vocabulary, or one that does not make tokens of words with it.

    Where its files are absent, transformers builds most kinds of tokenizers all the same, of special tokens alone, and
    scores and answers would be given for unknown words. And it reads a vocabulary with the class that it has for the
    kind of the model, which drops every word if it was made by another.

    Raises:
        WeightsError: it knows or reads no words.
    """
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.get_added_vocab())
    if len(words) <= 1:  # T5's has the mark of a space
        names = ", ".join(sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()}))
        raise WeightsError(
            f"weights: the tokenizer of {folder} knows no words: its vocabulary is absent or empty",
            remedy=f"Copy the tokenizer's files from where the model was published: those there are of {names}.",
        )
    of_word = tokenizer("picture", add_special_tokens=False, truncation=True, max_length=8)  # not the file's length
    if not of_word["input_ids"]:
        raise WeightsError(
            f"weights: the tokenizer of {folder}, read as {type(tokenizer).__name__}, makes no tokens of words",
            remedy=ONE_MODEL,
        )


def for_model(folder: Path, tokenizer: Any, num_words: int) -> Any:
    """The tokenizer, or one that takes those words for unknown ones that its model has no row for.

    Some have a few, which a text may well spell out: T5's have 100 marks that SigLIP's text towers were built without.

    Args:
        num_words: for which the model has rows.

    Raises:
        WeightsError: there are more than a few, or no token for unknown words.
    """
    if check_of_model(folder, tokenizer, num_words, has_unknown=tokenizer.unk_token_id is not None) == 0:
        return tokenizer
    return _Sparing(tokenizer, num_words)


def check_of_model(folder: Path, tokenizer: Any, num_words: int, *, has_unknown: bool = True) -> int:
    """Makes sure that a tokenizer is of its model.

    Args:
        has_unknown: words that the model has no row for can be taken for unknown ones.

    Returns:
        The number of those words, of which there may be a few.

    Raises:
        WeightsError: it is of another model.
    """
    vocab = tokenizer.get_vocab()
    num_stray: int = sum(number >= num_words for number in vocab.values())
    if num_stray > (_MAX_STRAY * len(vocab) if has_unknown else 0):
        raise WeightsError(
            f"weights: {num_stray} of the {len(vocab)} words of the tokenizer of {folder} are none of its model's, "
            f"which has {num_words}",
            remedy=ONE_MODEL,
        )
    return num_stray


class _Sparing:
    """See :func:`for_model`."""

    def __init__(self, tokenizer: Any, num_words: int) -> None:
        self._tokenizer, self._num_words = tokenizer, num_words
        self._unknown: int = tokenizer.unk_token_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        batch = self._tokenizer(texts, **options)
        ids = batch["input_ids"]
        batch["input_ids"] = (
            ids.masked_fill(ids >= self._num_words, self._unknown)
            if isinstance(ids, torch.Tensor)
            else [[number if number < self._num_words else self._unknown for number in text] for text in ids]
        )
        return batch


def check_padding(folder: Path, tokenizer: Any) -> None:
    """Refuses a tokenizer without a padding token, which would fail at the first texts of different lengths.

    Raises:
        WeightsError: it has none.
    """
    if tokenizer.pad_token_id is None:
        raise WeightsError(
            f"weights: the tokenizer of {folder} has no padding token, so it can make no batch of texts",
            remedy="Copy tokenizer_config.json and special_tokens_map.json from where the model was published: they "
            "name it as pad_token.",
        )


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as a padded batch; longer ones are cut.

    Padding stands behind the texts, whatever the tokenizer's file says: models read a text's first token and count its
    places from there, and padding before it would make of a text what its neighbours' lengths say.

    Returns:
        (N, T) int64 token ids, and the same shape with 1 where there is a token and 0 where there is padding.
    """
    batch = tokenizer(
        list(texts),
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def _check_shapes(folder: Path, different: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    for name, found, wanted in sorted(different):
        raise WeightsError(
            f"weights: {folder} does not fit its architecture: {name} is {tuple(found)}, not {tuple(wanted)}",
            remedy="Use the configuration file that belongs to these weights.",
        )


@contextmanager
def _told_of_packages(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())[:120]
        raise WeightsError(
            f"weights: the {what} of {folder} needs a package that is not installed: {reason}",
            remedy="Install it on every node: transformers names it above.",
        ) from error


@contextmanager
def in_our_words(folder: Path, what: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Within the block a library reads files of the folder, and whatever it raises is about those.

    Raises:
        WeightsError: the library raised something, and the device is not to blame.
    """
    try:
        yield
    except WeightsError:
        raise
    # A file of the wrong shape can fail in any way (AttributeError, KeyError, classes of safetensors and of
    # huggingface_hub that derive from Exception), and tokenizers raises Exception itself.
    except Exception as error:
        if is_out_of_memory(error) or is_device_broken(error):
            raise
        if "trust_remote_code" in str(error):  # so it says how to have that code run
            raise WeightsError(
                f"weights: {folder} asks for code of its own (auto_map) to be loaded as {what}, which is never run",
                remedy="Use a model that transformers has itself, converted to its format where it was published in "
                "another, or one behind an endpoint.",
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise WeightsError(f"weights: {folder} cannot be loaded as {what}: {reason}", remedy=remedy) from error


@contextmanager
def as_weights_error(what: str, remedy: str) -> Iterator[None]:
    """Within the block a model is built or tried, as files say that may contradict each other.

    Args:
        what: cannot be done if it fails, and for whose files.

    Raises:
        WeightsError: it fails, and the device is not to blame.
    """
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # as in `in_our_words`; jinja's errors derive from Exception too
        if is_out_of_memory(error) or is_device_broken(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise WeightsError(f"weights: {what}: {reason}", remedy=remedy) from error


@contextmanager
def captioning(folder: Path, side: int) -> Iterator[torch.Tensor]:
    """Within the block a model captions an image, as each of a run: (1, 3, S, S) uint8, all black.

    Raises:
        WeightsError: it fails.
    """
    what = f"the model of {folder} cannot caption an image of {side} pixels a side"
    with as_weights_error(what, "Copy config.json and the weights of one model. In float16: set another `dtype`."):
        yield torch.zeros((1, 3, side, side), dtype=torch.uint8)


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers draws a bar for every model, and lists tensors that it misses or leaves: the caller checks them."""
    logs = transformers.utils.logging
    was_on, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if was_on:
            logs.enable_progress_bar()
