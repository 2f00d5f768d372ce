"""The stores that a source touches: opened once each, asked for versions, opened for ranged reads."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

import obstore

from vlmflow.config import StorageConfig
from vlmflow.errors import ConfigError
from vlmflow.retry import retried, retried_async
from vlmflow.storage import (
    STORE_ERRORS,
    Fault,
    access_error,
    fault_of,
    local_version,
    object_version,
    open_store,
    parse_address,
)
from vlmflow.threads import in_thread, interruptible, started

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

Answer = TypeVar("Answer")

# Requests at a time of one worker: hides the latency of a store, and bounds what lies in memory.
CONCURRENT_REQUESTS = 16
_CONCURRENT_HEADS = 64
_BLOCK_BYTES = 64 * 1024

# What this process has read last, by the root of the store that gave it. Ray unpickles a reader for every task, and a
# worker does many of them: only the process can remember what a store gave before it began to refuse.
_READ: dict[tuple[StorageConfig, str], str] = {}


@dataclass(frozen=True, slots=True)
class ObjectHead:
    """What a store says of an object without sending it."""

    object_version: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed at the store: what went wrong, and with which error."""

    fault: Fault
    error: Exception


def run_in_loop(coroutine: Coroutine[object, object, Answer]) -> Answer:
    """Runs a coroutine to its end in a thread of its own: that of the caller may run a loop, as in a notebook."""
    return started(partial(asyncio.run, coroutine)).result()


class Stores:
    """Opens each store once; pickled, it forgets what it has opened.

    Args:
        given: of each store that has given an object, by its root, the uri of one.
    """

    def __init__(self, config: StorageConfig, given: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._given = dict(given or {})
        self._opened: dict[str, ObjectStore] = {}

    def __reduce__(self) -> tuple[type[Stores], tuple[StorageConfig, dict[str, str]]]:
        return (Stores, (self._config, self._given))

    def locate(self, uri: str) -> tuple[ObjectStore, str]:
        """The store of a uri, and the path in it."""
        address = parse_address(uri)
        if address.root not in self._opened:
            self._opened[address.root] = open_store(uri, self._config)[0]
        return self._opened[address.root], address.path.lstrip("/")

    def has_given(self, uri: str) -> None:
        """Remembers that a store has given an object: a refusal to list it says little then."""
        address = parse_address(uri)
        if not address.is_local:
            self._given[address.root] = uri

    def has_read(self, uri: str) -> None:
        """Remembers, for all of this process, that the bytes of an image have been read: it can be asked for again."""
        _READ[self._config, parse_address(uri).root] = uri

    def heads(self, uris: Sequence[str]) -> list[ObjectHead | Failure]:
        """Asks for the versions of many objects, several at a time.

        Raises:
            StorageAccessError, TransientError: a store has fallen silent; see :meth:`Silence.check`.
        """
        # Files without a loop, which costs many times what the disk does; in a thread all the same: it may hang.
        found = started(partial(_local_heads, uris)).result()
        asked = [index for index, head in enumerate(found) if head is None]
        answers = run_in_loop(self._heads([uris[index] for index in asked])) if asked else []
        for index, answer in zip(asked, answers, strict=True):
            found[index] = answer
        return [head for head in found if head is not None]

    async def _heads(self, uris: Sequence[str]) -> list[ObjectHead | Failure]:
        slots, silence = asyncio.Semaphore(_CONCURRENT_HEADS), Silence(self)

        async def head(uri: str) -> ObjectHead:
            store, path = self.locate(uri)
            async with slots:
                meta = await retried_async(lambda: obstore.head_async(store, path))
            return ObjectHead(object_version(meta), meta["size"])

        async def answer(uri: str) -> ObjectHead | Failure:
            found: ObjectHead | Failure
            try:
                found = await head(uri)
            except ConfigError as error:  # a store that cannot be opened costs its rows, not the run
                return Failure(Fault.PATH, error)
            except STORE_ERRORS as error:
                found = Failure(fault_of(error), error)
            await silence.check(uri, found)
            return found

        return list(await asyncio.gather(*(answer(uri) for uri in uris)))

    def check_answered(self, uris: Sequence[str], answers: Sequence[object | Failure]) -> None:
        """Tells a store that fails from objects that do; ``answers`` holds what came back for each uri.

        A store that gave at least one good answer is in order. Another is asked, see :meth:`check_store`.

        Raises:
            StorageAccessError: a store refused everything, or is not there.
            TransientError: a store is out of reach.
        """
        good: set[str] = set()
        failed: dict[str, tuple[str, Failure]] = {}
        for uri, answer in zip(uris, answers, strict=True):
            if not isinstance(answer, Failure):
                good.add(parse_address(uri).root)
                self.has_given(uri)
            elif answer.fault in (Fault.GONE, Fault.NO_CREDENTIALS):
                raise access_error(answer.error, uri) from answer.error
            elif answer.fault is not Fault.PATH and not parse_address(uri).is_local:
                root = parse_address(uri).root
                if root not in failed or failed[root][1].fault is Fault.MISSING:  # which says the least
                    failed[root] = (uri, answer)
        for root, (uri, failure) in failed.items():
            if root not in good:
                self.check_store(uri, failure)

    def check_store(self, uri: str, failure: Failure) -> None:
        """Lists one name of the store of an object that has failed, and reads what it has let this process read before.

        Credentials that may read and not list are refused what is not there, in the words for what they may not read:
        the store is then asked for an object that it has given before. And a store may list what it does not give any
        more: the right to read was withdrawn, the key of the objects disabled.

        Raises:
            StorageAccessError: the store refused, or is not there.
            TransientError: the store is out of reach.
        """
        store, path = self.locate(uri)
        try:
            interruptible(lambda: next(iter(obstore.list(store, path.rpartition("/")[0] or None, chunk_size=1)), None))
        except STORE_ERRORS as error:
            given = self._given.get(parse_address(uri).root)
            if given is None or fault_of(error) is not Fault.DENIED or not self._is_there(given):
                raise access_error(error, uri) from failure.error
        else:
            known = _READ.get((self._config, parse_address(uri).root))
            if known is not None and failure.fault is not Fault.MISSING:
                self._check_read(known)

    def _check_read(self, uri: str) -> None:
        store, path = self.locate(uri)
        try:
            # As images are read; the first bytes will do, but a range of them is refused where the object is empty now.
            retried(lambda: next(iter(obstore.get(store, path).stream(min_chunk_size=1)), None))
        except STORE_ERRORS as error:
            if fault_of(error) is not Fault.MISSING:
                raise access_error(error, uri) from error

    def _is_there(self, uri: str) -> bool:
        store, path = self.locate(uri)
        try:
            retried(lambda: obstore.head(store, path))
        except STORE_ERRORS:
            return False
        return True

    def head(self, uri: str) -> ObjectHead:
        """Asks for one object, without which the source is nothing.

        Raises:
            SourceError: it does not exist.
            StorageAccessError: the store refused, or is not there.
            TransientError: the store is out of reach.
        """
        try:
            if parse_address(uri).is_local:
                return _local_head(uri)
            store, path = self.locate(uri)
            meta = retried(lambda: obstore.head(store, path))
        except STORE_ERRORS as error:
            raise access_error(error, uri) from error
        self.has_given(uri)
        return ObjectHead(object_version(meta), meta["size"])

    def open_file(self, uri: str) -> tuple[BinaryIO, ObjectHead]:
        """Opens an object for reads here and there; all of them see the version that is returned.

        Raises:
            SourceError, StorageAccessError, TransientError: as :meth:`head`.
        """
        address = parse_address(uri)
        try:
            if address.is_local:
                file = Path(address.path).open("rb")  # noqa: SIM115 (the caller closes it)
                status = os.fstat(file.fileno())
                return file, ObjectHead(local_version(status), status.st_size)
            store, path = self.locate(uri)
            raw = RangedObject(store, path)
        except STORE_ERRORS as error:
            raise access_error(error, uri) from error
        self.has_given(uri)
        return cast("BinaryIO", io.BufferedReader(raw, _BLOCK_BYTES)), raw.head


class Silence:
    """Ends a pass over many objects where their store has fallen silent, instead of waiting for each of them."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._checked: set[str] = set()  # roots of those that have given something in this pass, or were asked

    async def check(self, uri: str, answer: object | Failure) -> None:
        """Takes note of what came back for an object; a store that has not answered yet is asked how it is.

        Raises:
            StorageAccessError, TransientError: as :meth:`Stores.check_store`.
        """
        if isinstance(answer, Failure) and answer.fault is not Fault.TIMEOUT:
            return
        address = parse_address(uri)
        if address.is_local or address.root in self._checked:
            return
        self._checked.add(address.root)
        if isinstance(answer, Failure):
            await in_thread(partial(self._stores.check_store, uri, answer))


def _local_heads(uris: Sequence[str]) -> list[ObjectHead | Failure | None]:
    """What the disk says of files; None for what is in a store."""
    found: list[ObjectHead | Failure | None] = []
    for uri in uris:
        try:
            found.append(_local_head(uri) if parse_address(uri).is_local else None)
        except ConfigError as error:  # an address of a kind that cannot be read costs its row, not the run
            found.append(Failure(Fault.PATH, error))
        except STORE_ERRORS as error:
            found.append(Failure(fault_of(error), error))
    return found


def _local_head(uri: str) -> ObjectHead:
    status = os.stat(parse_address(uri).path)  # noqa: PTH116 (of millions: Path takes longer than the disk)
    return ObjectHead(local_version(status), status.st_size)


class RangedObject(io.RawIOBase):
    """An object as a seekable file. Each read is a request, so buffer it; all of them demand the same ETag.

    obstore's own reader drops its buffer on every seek, which costs a request for each header of a tar file.
    """

    def __init__(self, store: ObjectStore, path: str) -> None:
        super().__init__()
        self._store, self._path, self._at = store, path, 0
        meta = retried(lambda: obstore.head(store, path))
        self._e_tag = meta["e_tag"]
        self.head = ObjectHead(object_version(meta), meta["size"])

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves to an offset from the start, from here, or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.head.size_bytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        """The offset from the start."""
        return self._at

    def readinto(self, buffer: object, /) -> int:
        """Reads as much as the buffer holds, or as there is."""
        view = memoryview(cast("bytearray", buffer))
        end = min(self._at + len(view), self.head.size_bytes)
        if end <= self._at:
            return 0
        options: GetOptions = {"range": (self._at, end), "if_match": self._e_tag}
        data = retried(lambda: bytes(obstore.get(self._store, self._path, options=options).bytes()))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
