"""WebDataset shards (https://github.com/webdataset/webdataset): tar files in which members of one key belong together.

Only headers and small texts are read to list a shard, through ranged reads. Members ``.txt``, ``.json`` and ``.cls``
become columns of the images with the same key, unless they are larger than a megabyte; every other member is taken
for an image. So is a link to a file that stands before it, as tar writes one for the second name of a file.

A shard ends where the file does, or with blocks of zeros, as for GNU tar: what follows those is not listed. Whatever
else stands where a header is due is damage, and ends the run: the images behind it would be missing without a word.
"""

from __future__ import annotations

import logging
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

import pyarrow as pa

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import SourceError
from vlmflow.sources.base import BATCH_ROWS, Reader, check_named, is_kept, own_columns, reference_batch, source_struct
from vlmflow.sources.disk import home_of
from vlmflow.sources.listing import HIDDEN, list_files
from vlmflow.sources.prefix import no_files, no_images
from vlmflow.sources.reader import SourceReader, part_version
from vlmflow.sources.stores import Stores
from vlmflow.sources.uris import normalise_uri, spelled
from vlmflow.storage import STORE_ERRORS, Address, access_error, parse_address
from vlmflow.threads import Threads

logger = logging.getLogger("vlmflow")

SIDE_COLUMNS = ("txt", "json", "cls")
# What belongs to an image is hidden where that would be.
_SIDE = re.compile(rf"\.({'|'.join(SIDE_COLUMNS)})\Z", re.IGNORECASE)
_DOTS = re.compile(r"(^|/)\.\.?/")
_COLUMNS = pa.schema([(name, pa.string()) for name in SIDE_COLUMNS])
_MAX_SIDE_BYTES = 1024 * 1024
_END = 2 * tarfile.BLOCKSIZE  # of a tar file, in zeros
_SHARDS_AT_A_TIME = 8
_COMPRESSED = (".tgz", ".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst")


@dataclass
class _Sample:
    """The members of one key."""

    key: str = ""
    images: list[tarfile.TarInfo] = field(default_factory=list)
    side: dict[str, str] = field(default_factory=dict)


class WebDatasetSource:
    """Lists the images in tar shards: one ``.tar``, or all under a prefix."""

    version: str | None = None  # it is many files
    num_repeated = 0  # nothing is listed twice

    def __init__(self, config: SourceConfig, catalog: Address | None) -> None:
        self._config, self._catalog = config, catalog
        self._stores = Stores(config.storage)
        self._address = parse_address(config.uri)
        self._home = home_of(self._address.parent, self._address)

    @property
    def columns(self) -> pa.Schema:
        """Of ``txt``, ``json`` and ``cls`` those that rows keep, null where a sample has no such member."""
        check_named(self._config, SIDE_COLUMNS, self._config.uri)
        if self._config.regions_column is not None:
            raise SourceError(
                "source.regions_column: tar shards have no such column",
                remedy="Use a Parquet manifest or leave it out.",
            )
        return pa.schema([field for field in _COLUMNS if is_kept(self._config, field.name)])

    def list(self) -> Iterator[pa.RecordBatch]:
        """Yields the references; see :class:`vlmflow.sources.base.Source`."""
        empty = True
        with Threads(_SHARDS_AT_A_TIME) as threads:
            # Each thread waits for a store's answers; a group of shards is listed before the next is begun.
            for start in range(0, len(self._shards), _SHARDS_AT_A_TIME):
                for batches in threads.map(self._list_shard, self._shards[start : start + _SHARDS_AT_A_TIME]):
                    for batch in batches:
                        empty = False
                        yield batch
        if empty and not self._config.allow_empty:
            raise no_images(self._config.uri) if self._shards else no_files(self._config.uri, ".tar")

    def reader(self, limits: ImageLimits) -> Reader:
        """Builds the reader of this source's references."""
        return SourceReader(self._config, limits, self._home, self._stores)

    @cached_property
    def _shards(self) -> Sequence[str]:
        files = list_files(str(self._address), (".tar", *_COMPRESSED), self._stores, self._catalog)
        shards = [uri for uri in files if uri.lower().endswith(".tar")]
        others = sorted({*files} - {*shards})
        if others:
            logger.warning(
                "%d compressed shards are left out, the first is %s: no image of a shard could be read by itself; "
                "decompress them",
                len(others),
                others[0],
            )
        return shards

    def _list_shard(self, uri: str) -> Sequence[pa.RecordBatch]:
        file, head = self._stores.open_file(uri)
        batches: list[pa.RecordBatch] = []
        rows: list[tuple[tarfile.TarInfo, dict[str, str]]] = []
        try:
            with file:
                for sample in _samples(file, uri):
                    rows += [(image, sample.side) for image in sample.images]
                    if len(rows) >= BATCH_ROWS:
                        batches.append(self._batch(rows, uri, head.object_version))
                        rows = []
        except tarfile.TarError as error:
            message = f"{uri} is not a whole tar file: {error}"
            raise SourceError(message, remedy="Write the shard again, or take it out of the prefix.") from error
        except STORE_ERRORS as error:
            raise access_error(error, uri) from error
        if rows:
            batches.append(self._batch(rows, uri, head.object_version))
        return batches

    def _batch(
        self, rows: Sequence[tuple[tarfile.TarInfo, dict[str, str]]], uri: str, shard_version: str
    ) -> pa.RecordBatch:
        parts = [(image.offset_data, image.size) for image, _ in rows]
        side = [pa.array([texts.get(name) for _, texts in rows], pa.string()) for name in SIDE_COLUMNS]
        given = {
            "uri": pa.array([normalise_uri(f"{uri}#{image.name}") for image, _ in rows], pa.string()),
            "locator": pa.repeat(uri, len(rows)),
            "offset": pa.array([offset for offset, _ in parts], pa.int64()),
            "length": pa.array([length for _, length in parts], pa.int64()),
            "size_bytes": pa.array([length for _, length in parts], pa.int64()),
            "object_version": pa.array([part_version(shard_version, *part) for part in parts], pa.string()),
        }
        own = pa.table(side, schema=_COLUMNS)
        config = self._config.model_copy(update={"text_column": self._config.text_column or "txt"})
        given |= own_columns(own, config, uri)
        return reference_batch(given, source_struct(own, self.columns))


def _samples(file: BinaryIO, uri: str) -> Iterator[_Sample]:
    """Yields the samples of a shard: runs of members whose names are equal up to the first dot of the last segment."""
    sample, parts = _Sample(), dict[str, tuple[int, int]]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header
            member.name = _plain(spelled(member.name.removeprefix("./")))
            is_link = member.islnk() or member.issym()
            if not (member.isreg() or is_link) or HIDDEN.search(_SIDE.sub(".jpg", member.name)):
                continue
            if is_link:
                member.offset_data, member.size = _followed(member, parts, uri)
                member.type = tarfile.REGTYPE
            elif member.issparse():  # its bytes do not lie in one piece
                remedy = "Write the shard again without --sparse."
                raise SourceError(f"{uri} holds {member.name} as a sparse file", remedy=remedy)
            known_as = _known_as(uri, member.name)
            if known_as in parts:
                raise SourceError(f"{uri} holds {member.name} twice", remedy="Write the shard again.")
            parts[known_as] = member.offset_data, member.size
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}"
            if key != sample.key:
                yield sample
                sample = _Sample(key)
            if extension.lower() not in SIDE_COLUMNS:
                sample.images.append(member)
            elif member.size <= _MAX_SIDE_BYTES:
                sample.side[extension.lower()] = _text(tar, member)
        # tarfile takes a header that it cannot read for the end. Zeros may be cut short, or be absent.
        file.seek(tar.offset)  # of the header that ended the loop
        if file.read(_END).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
    yield sample


def _known_as(uri: str, name: str) -> str:
    return normalise_uri(f"{uri}#{name}")  # of a local shard, a//b is a/b


def _plain(name: str) -> str:
    """A member's name as tar would unpack it: ``photos/a.jpg`` of ``../photos/a.jpg``, which is no hidden file."""
    return posixpath.normpath(f"/{name}")[1:] if _DOTS.search(name) else name


def _followed(link: tarfile.TarInfo, parts: Mapping[str, tuple[int, int]], uri: str) -> tuple[int, int]:
    """Where the file lies that a link leads to, and its size.

    Args:
        parts: the same of the files and links before it.

    Raises:
        SourceError: it leads to none of these.
    """
    # A hard link names a member, a symbolic one a path from where it lies.
    path = posixpath.join(posixpath.dirname(link.name), link.linkname) if link.issym() else _plain(link.linkname)
    target = spelled(posixpath.normpath(path))
    part = parts.get(_known_as(uri, target))
    if part is None:
        message = f"{uri} holds {link.name} as a link to {spelled(link.linkname)}, which is no file before it"
        raise SourceError(message, remedy="Write the shard again with --dereference --hard-dereference.")
    return part


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = tar.extractfile(member)
    assert content is not None, "regular members have content"
    return content.read().decode("utf-8", errors="replace").strip()
