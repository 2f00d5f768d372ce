"""Addresses of erased images, blotted out of the texts that a catalog keeps."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import pyarrow as pa

from vlmflow.catalog.folder import Folder
from vlmflow.catalog.keys import KeyIndex, to_binary, to_words
from vlmflow.catalog.messages import MESSAGES
from vlmflow.catalog.runs import RUNS
from vlmflow.errors import StorageAccessError, StoreLostError
from vlmflow.threads import Threads

logger = logging.getLogger("vlmflow")

_REDACTED = "<erased>"
_AT_ONCE = 16  # files that are read and written at a time
_ID = re.compile("[0-9a-f]{32}")
# Once its rows are gone nothing tells the address of an image that is erased by its id.
_BY_ADDRESS = "if there are messages, erase by address with a role that may read and write them, or delete them"
_SHORTEST_URI = 6  # a shorter text might stand in a record by chance


def redact(folder: Folder, states: Mapping[str, str], texts: set[str], wanted: KeyIndex) -> tuple[int, list[str]]:
    """Blots addresses out of the records of runs that are over, also those that stand beside the id of an image, and
    out of messages that are still to be sent.

    Where the store refuses the messages alone, the log says so: a takedown is not to end half done for them.

    Returns:
        The number of files that were written anew, and the messages that are refused.
    """
    blotted = blotter(_as_in_json(texts))

    def is_changed(path: str) -> bool:
        # What is damaged, or of another program, keeps nothing from being erased.
        before = (folder.read(path) or b"").decode("utf-8", "surrogateescape")
        after = blotted(before)
        # Of a run that was at work at the first asking: the files that told the address were removed by then.
        after = blotter(_as_in_json(_addresses_in(after, wanted)))(after)
        if after != before:
            folder.write(path, after.encode("utf-8", "surrogateescape"))
        return after != before

    def is_message_changed(path: str) -> bool:
        try:
            return is_changed(path)
        except StorageAccessError as error:
            logger.warning("%s may name what is erased, and stays as it is: %s; %s", path, error, _BY_ADDRESS)
            refused.append(path)
            return False

    refused: list[str] = []
    with Threads(_AT_ONCE) as pool:
        num_messages = sum(pool.map(is_message_changed, _messages(folder)))
        return num_messages + sum(pool.map(is_changed, _records(folder, states))), refused


def _as_in_json(texts: Iterable[str]) -> Iterator[str]:
    return (json.dumps(text, ensure_ascii=False)[1:-1] for text in texts if len(text) >= _SHORTEST_URI)


def _addresses_in(record: str, wanted: KeyIndex) -> list[str]:
    """The addresses that stand in a record beside the ids of images, as examples do."""
    found: list[tuple[str, str]] = []

    def look(part: dict[str, object]) -> None:
        image, uri = part.get("image_id"), part.get("uri")
        if isinstance(image, str) and _ID.fullmatch(image) and isinstance(uri, str) and uri != _REDACTED:
            found.append((image, uri))

    with contextlib.suppress(ValueError, RecursionError):
        json.loads(record, object_hook=look)
    ids = to_binary(pa.array([image for image, _ in found], pa.string()))
    return [uri for (_, uri), at in zip(found, wanted.find(*to_words(ids)), strict=True) if at >= 0]


def blotter(texts: Iterable[str]) -> Callable[[str], str]:
    """What replaces each of the texts in another, the longest of those that begin at a place: one may begin another.

    A million of them take hardly longer than one.
    """
    wanted = set(texts)
    prefix = os.path.commonprefix(list(wanted))  # noqa: RUF071 (of texts, not of paths)
    lengths = sorted({len(text) for text in wanted}, reverse=True)
    starts = {text[: lengths[-1]] for text in wanted}

    def blotted(text: str) -> str:
        parts, done, at = [], 0, 0
        while lengths and (at := text.find(prefix, at)) >= 0 and at + lengths[-1] <= len(text):
            begins = text[at : at + lengths[-1]] in starts
            length = next((length for length in lengths if text[at : at + length] in wanted), 0) if begins else 0
            if length:
                parts += [text[done:at], _REDACTED]
                done = at + length
            at += length or 1
        return "".join([*parts, text[done:]])

    return blotted


def _messages(folder: Folder) -> list[str]:
    try:
        return [file.path for file in folder.list(MESSAGES) if file.path.endswith(".json")]
    except StoreLostError:
        raise
    except StorageAccessError as error:
        logger.warning("%s/ is not looked through for what is erased: %s; %s", MESSAGES, error, _BY_ADDRESS)
        return []


def _records(folder: Folder, states: Mapping[str, str]) -> Iterator[str]:
    for file in list(folder.list(RUNS)):
        run_id = file.path.removeprefix(f"{RUNS}/").rpartition(".")[0]
        if file.path.endswith(".json") and states.get(run_id) != "running":
            yield file.path
