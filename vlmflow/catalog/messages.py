"""Messages to people that no messenger took, under ``CATALOG/messages/``: a later flow sends them."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import AwareDatetime, ValidationError

from vlmflow.catalog.file_info import FileInfo
from vlmflow.catalog.folder import Folder
from vlmflow.config_parts import Frozen

logger = logging.getLogger("vlmflow")

MESSAGES = "messages"
KEPT_FOR = dt.timedelta(days=14)
MOST_KEPT = 20
CLAIMED_FOR = dt.timedelta(minutes=10)  # longer than any messenger takes: whoever has not let go was killed
_MAX_SUBJECT_CHARS, _MAX_BODY_CHARS = 300, 2000
_CLAIM = ".sending"
_STAMP = "%Y%m%dT%H%M%S%f"
_OURS = re.compile(rf"{MESSAGES}/(?P<stamp>\d{{8}}T\d{{12}})-[0-9a-f]{{8}}\.json")


class Message(Frozen):
    """What somebody was to be told, and when."""

    at: AwareDatetime
    subject: str
    body: str


@dataclass(frozen=True)
class KeptMessage:
    """A message, and its file in the catalog."""

    path: str
    message: Message


class MessageStore:
    """Keeps messages, a file each: the newest MOST_KEPT, and none for longer than KEPT_FOR."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def keep(self, subject: str, body: str) -> None:
        """Keeps a message of now; those beyond what is kept are given up, which the log tells.

        Raises:
            StorageAccessError, TransientError: the catalog cannot be written.
        """
        now = dt.datetime.now(dt.UTC)
        message = Message(at=now, subject=subject[:_MAX_SUBJECT_CHARS], body=body[:_MAX_BODY_CHARS])
        path = f"{MESSAGES}/{now:{_STAMP}}-{secrets.token_hex(4)}.json"
        self._folder.write(path, message.model_dump_json(indent=2).encode())
        self.give_up()

    def left(self) -> list[KeptMessage]:
        """The messages that are kept, the oldest first. A file that holds none is passed over."""
        found = [path for path in self._paths() if not _is_too_old(path)][-MOST_KEPT:]
        read = ((path, self._read(path)) for path in found)
        return [KeptMessage(path, message) for path, message in read if message is not None]

    @contextlib.contextmanager
    def claimed(self, kept: KeptMessage) -> Iterator[bool]:
        """Keeps other flows from sending a message while the block runs.

        Of a flow that is killed in the block others may send it ten minutes later: rather twice than never.

        Yields:
            False: another is at it, or has sent it.
        """
        claim = kept.path + _CLAIM
        if not self._folder.create(claim):
            yield False
            return
        try:
            yield self._folder.stat(kept.path) is not None
        finally:
            self._folder.delete(claim)

    def drop(self, kept: KeptMessage) -> None:
        """Removes a message: it was sent."""
        self._folder.delete(kept.path)

    def give_up(self) -> None:
        """Removes what is too old, the oldest of what is too many, and claims of flows that were killed."""
        files, now = list(self._folder.list(MESSAGES)), dt.datetime.now(dt.UTC)
        paths = _messages(files)
        dead = [f.path for f in files if f.path.endswith(_CLAIM) and now - f.modified_at > CLAIMED_FOR]
        if dead:
            self._folder.delete_all(dead)
        doomed = paths[:-MOST_KEPT] + [path for path in paths[-MOST_KEPT:] if _is_too_old(path)]
        if doomed:
            self._folder.delete_all(doomed)
            kept = f"no more than {MOST_KEPT} are kept, and none for more than {KEPT_FOR.days} days"
            logger.error("%d undelivered messages to people were given up: %s", len(doomed), kept)

    def _paths(self) -> list[str]:
        return _messages(self._folder.list(MESSAGES))

    def _read(self, path: str) -> Message | None:
        data = self._folder.read(path)
        try:
            return None if data is None else Message.model_validate_json(data)
        except ValidationError:
            logger.warning("%s holds no message", path)
            return None


def _messages(files: Iterable[FileInfo]) -> list[str]:
    return sorted(file.path for file in files if _OURS.fullmatch(file.path))


def _is_too_old(path: str) -> bool:
    match = _OURS.fullmatch(path)
    assert match is not None
    at = dt.datetime.strptime(match["stamp"], _STAMP).replace(tzinfo=dt.UTC)
    return dt.datetime.now(dt.UTC) - at > KEPT_FOR
