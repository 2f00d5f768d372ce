"""A manifest: a table with a column of uris, and any columns of the caller's, which are carried along.

One file, several in a folder or under a prefix, or a Delta table.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import obstore
import pyarrow as pa
import pyarrow.compute as pc

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import SourceError
from vlmflow.paths import is_file
from vlmflow.retry import retried
from vlmflow.sources.base import (
    Reader,
    check_named,
    is_kept,
    is_read,
    own_columns,
    reference_batch,
    source_struct,
    texts,
)
from vlmflow.sources.delta import DeltaManifest, is_delta_table
from vlmflow.sources.disk import home_of
from vlmflow.sources.listing import list_files
from vlmflow.sources.manifest_files import FORMATS, TABLES, FilesTable, Part, format_of, unpacked
from vlmflow.sources.prefix import no_files, no_images
from vlmflow.sources.reader import SourceReader
from vlmflow.sources.stores import ObjectHead, Stores
from vlmflow.sources.tables import TableFile, open_table
from vlmflow.sources.unique import UniqueReferences
from vlmflow.sources.uris import is_http, normalise_uri, resolve
from vlmflow.storage import STORE_ERRORS, Address, access_error, local_version, object_version, parse_address
from vlmflow.threads import Threads
from vlmflow.workspace import Workspace, in_our_words

# What a manifest may say of the version of an http(s) url, which is not asked. Stores and disks tell their own, which
# a column from another day would hide.
_VERSION_COLUMNS = ("object_version", "etag")
_HEADS_AT_A_TIME = 1_000
_FILES_AT_A_TIME = 16  # that are copied from a store
_OTHER_DIVIDERS = re.compile(r"[;\t|]")  # of columns in what some programs write as CSV


class ManifestSource:
    """Lists the images that a manifest names; their versions are asked of their stores, not of http servers."""

    def __init__(self, config: SourceConfig, catalog: Address | None = None) -> None:
        self._config, self._catalog = config, catalog
        self._stores = Stores(config.storage)
        self._address = parse_address(config.uri)
        self._folder = self._address.parent  # relative uris are taken from there
        self._home = home_of(self._address.parent, self._address)
        self._unique = UniqueReferences(self._references)
        self.version: str | None = None
        self._copies: Workspace | None = None

    @property
    def columns(self) -> pa.Schema:
        """The manifest's columns that rows keep, without that of the uris; see :class:`vlmflow.sources.base.Source`."""
        schema = self._table.schema
        if self._config.uri_column not in schema.names:
            there = ", ".join(schema.names) or "none"
            absent = f"no column {self._config.uri_column}"
            is_divided_otherwise = len(schema.names) == 1 and _OTHER_DIVIDERS.search(schema.names[0])
            remedy = "Name another with source.uri_column."
            if is_divided_otherwise:
                remedy = "Write it with commas between the columns, which divide a CSV file here."
            elif self._config.kind == "auto" and self._address.path.lower().endswith(".parquet"):
                # Taken for a manifest because it lacks the column of image bytes.
                absent += f", and none {self._config.bytes_column} of image bytes"
                remedy = "Name one of addresses with source.uri_column, or one of image bytes with source.bytes_column."
            raise SourceError(f"{self._config.uri} has {absent}; it has {there}", remedy=remedy)
        check_named(self._config, schema.names, self._config.uri)
        return pa.schema(
            [field for field in schema if field.name != self._config.uri_column and is_kept(self._config, field.name)]
        )

    @property
    def num_repeated(self) -> int:
        """Further rows of images that have one; see :class:`vlmflow.sources.base.Source`."""
        return self._unique.num_repeated

    def list(self) -> Iterator[pa.RecordBatch]:
        """Yields the references; see :class:`vlmflow.sources.base.Source`."""
        empty = True
        for batch in self._unique:
            empty = empty and batch.num_rows == 0
            for start in range(0, batch.num_rows, _HEADS_AT_A_TIME):
                yield with_versions(batch.slice(start, _HEADS_AT_A_TIME), self._stores)
        if empty and not self._config.allow_empty:
            raise no_images(self._config.uri)

    def reader(self, limits: ImageLimits) -> Reader:
        """Builds the reader of this source's references."""
        return SourceReader(self._config, limits, self._home, self._stores)

    @cached_property
    def _table(self) -> TableFile:
        address = self._address
        if self._files != [str(address)]:
            return self._of_folder()
        if address.is_local:
            path = Path(address.path)
            self.version = _checked_version(path)
        else:
            path = self._workspace() / "manifest"
            self.version = self._download(str(address), path)
        return self._opened(*unpacked(path, self._config.uri, self._workspace))

    def _of_folder(self) -> TableFile:
        self._folder = self._address
        config = self._config
        if config.regions_column is not None:
            message = f"{config.uri}: source.regions_column of a manifest of several files"
            raise SourceError(message, remedy="Write the manifest as one .parquet file.")
        if is_delta_table(config, self._stores):
            return DeltaManifest(config, self._is_needed)
        uris = self._files
        if not uris:
            raise no_files(config.uri, ", ".join(FORMATS))
        formats = sorted({format_of(uri) for uri in uris})
        if len(formats) > 1:
            raise SourceError(
                f"{config.uri} holds {' and '.join(formats)} files: which of them are the manifest is not said",
                remedy="Put the files of the manifest into a folder of their own, all of one format.",
            )
        paths = self._local(uris)
        below = len(str(self._address).rstrip("/")) + 1
        own = (config.uri_column, config.key_column, config.text_column, config.questions_column, *_VERSION_COLUMNS)
        parts = []
        for uri, packed in zip(uris, paths, strict=True):
            path, name = unpacked(packed, uri, self._workspace)
            # For a part without rows some writers leave a file of no bytes, but never a Parquet file.
            if formats == [".parquet"] or path.stat().st_size:
                parts.append(Part(self._opened(path, name), uri, uri[below:]))
        return FilesTable(config.uri, parts, frozenset(name for name in own if name is not None))

    @cached_property
    def _files(self) -> Sequence[str]:
        """The manifest's own uri, or those of the files in it."""
        return list_files(str(self._address), TABLES, self._stores, self._catalog)

    def _local(self, uris: Sequence[str]) -> Sequence[Path]:
        """Where the files lie on this machine; those of a store are copied here."""
        if self._address.is_local:
            return [Path(uri) for uri in uris]
        paths = [self._workspace() / f"manifest-{number}" for number in range(len(uris))]
        with Threads(_FILES_AT_A_TIME) as threads:
            for _ in threads.map(self._download, uris, paths):
                pass
        return paths

    def _workspace(self) -> Path:
        """A folder for copies, made when one is needed."""
        if self._copies is None:
            self._copies = Workspace()
            weakref.finalize(self, self._copies.close)
        return self._copies.path

    def _is_needed(self, column: str) -> bool:
        return is_read(self._config, column) or column in _VERSION_COLUMNS

    def _opened(self, path: Path, name: str) -> TableFile:
        return open_table(path, name, self._config.regions_column, self._is_needed)

    def _download(self, uri: str, path: Path) -> str:
        """Copies a file of the manifest here: it is read more than once, and must not change meanwhile.

        Returns:
            Its version.
        """
        store, key = self._stores.locate(uri)

        def copy() -> str:
            found = obstore.get(store, key)
            with in_our_words(), path.open("wb") as file:
                for chunk in found.stream():
                    file.write(chunk)
            return object_version(found.meta)

        try:
            version = retried(copy)
        except STORE_ERRORS as error:
            raise access_error(error, uri) from error
        self._stores.has_given(uri)
        return version

    def _references(self) -> Iterator[pa.RecordBatch]:
        """Reads the references as the manifest has them, versions only where it has some."""
        config, columns = self._config, self.columns
        first_row = 1
        for table in self._table.batches():
            rows = table.combine_chunks()
            if rows.num_rows == 0:
                continue
            uris = self._uris(rows, first_row)
            locators = resolve(uris, self._folder)
            given = {
                "uri": pa.array([normalise_uri(locator) for locator in locators], pa.string()),
                "locator": pa.array(locators, pa.string()),
            }
            given |= own_columns(rows, config, config.uri)
            if config.regions_column is not None:
                given["regions_row"] = pa.array(range(first_row - 1, first_row - 1 + rows.num_rows), pa.int64())
            version_column = next((name for name in _VERSION_COLUMNS if name in rows.column_names), None)
            if version_column is not None:
                versions = pc.utf8_trim(texts(rows[version_column], f"{config.uri}: column {version_column}"), '"')
                is_asked = pa.array([not is_http(locator) for locator in locators])
                given["object_version"] = pc.if_else(is_asked, pa.scalar(None, pa.string()), versions)
            yield reference_batch(given, source_struct(rows, columns))
            first_row += rows.num_rows

    def _uris(self, rows: pa.Table, first_row: int) -> Sequence[str]:
        column = self._config.uri_column
        uris: list[str | None] = texts(rows[column], f"{self._config.uri}: column {column}").to_pylist()
        named = [uri for uri in uris if uri is not None and uri.strip()]
        if len(named) < len(uris):
            row = first_row + next(index for index, uri in enumerate(uris) if uri is None or not uri.strip())
            message = f"{self._config.uri}: row {row} has no {column}"
            raise SourceError(message, remedy="Fill it in, or leave the row out.")
        return named


def _checked_version(path: Path) -> str:
    """The version of a local manifest, which may be read.

    It is opened again, more than once: a reader that is bound to this version takes no later one.
    """
    try:
        if not is_file(path):
            raise SourceError(f"{path} does not exist", remedy="Check the path.")
        with path.open("rb") as file:
            return local_version(os.fstat(file.fileno()))
    except OSError as error:
        raise access_error(error, str(path)) from error


def with_versions(batch: pa.RecordBatch, stores: Stores) -> pa.RecordBatch:
    """Asks the stores for the versions and sizes of images that have none yet; http servers are not asked.

    An image that is not there keeps its row without a version: reading it records why.

    Raises:
        StorageAccessError: a store refused every image of the batch, or is not there.
        TransientError: a store is out of reach.
    """
    versions, sizes = batch["object_version"].to_pylist(), batch["size_bytes"].to_pylist()
    locators = batch["locator"].to_pylist()
    asked = [index for index, uri in enumerate(locators) if versions[index] is None and not is_http(uri)]
    heads = stores.heads([locators[index] for index in asked])
    stores.check_answered([locators[index] for index in asked], heads)
    for index, head in zip(asked, heads, strict=True):
        if isinstance(head, ObjectHead):
            versions[index], sizes[index] = head.object_version, head.size_bytes
    for name, values, kind in (("object_version", versions, pa.string()), ("size_bytes", sizes, pa.int64())):
        batch = batch.set_column(batch.schema.get_field_index(name), name, pa.array(values, kind))
    return batch
