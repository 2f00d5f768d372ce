"""All images under a prefix of an object store, or under a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import EmptySourceError, SourceError
from vlmflow.sources.base import Reader, reference_batch
from vlmflow.sources.disk import home_of
from vlmflow.sources.listing import list_objects
from vlmflow.sources.manifest_files import TABLES
from vlmflow.sources.reader import SourceReader
from vlmflow.sources.stores import Stores
from vlmflow.storage import Address, parse_address


class PrefixSource:
    """Lists what lies under a prefix, as the store lists it."""

    version: str | None = None  # it is many files
    num_repeated = 0  # nothing is listed twice

    def __init__(self, config: SourceConfig, catalog: Address | None) -> None:
        self._config, self._catalog = config, catalog
        self._stores = Stores(config.storage)
        self._address = parse_address(config.uri)
        self._home = home_of(self._address, self._address)

    @property
    def columns(self) -> pa.Schema:
        """No caller's columns."""
        named = ("key_column", "text_column", "questions_column", "found_text_column", "regions_column", "columns")
        for setting in named:
            if getattr(self._config, setting) is not None:
                message = f"source.{setting}: a folder of images has no columns"
                raise SourceError(message, remedy="List the images in a manifest, or leave it out.")
        return pa.schema([])

    def list(self) -> Iterator[pa.RecordBatch]:
        """Yields the references; see :class:`vlmflow.sources.base.Source`."""
        empty = True
        for listed in list_objects(str(self._address), self._stores, self._catalog):
            if listed.num_rows:
                if empty:
                    self._refuse_tables(listed["uri"].to_pylist())
                empty = False
                yield reference_batch(dict(zip(listed.schema.names, listed.columns, strict=True)))
        if empty and not self._config.allow_empty:
            raise no_images(self._config.uri)

    def _refuse_tables(self, uris: Sequence[str]) -> None:
        """Where there are but tables, as what Spark has written, each would be an image that cannot be read."""
        if all(uri.lower().endswith(TABLES) for uri in uris):
            raise SourceError(
                f"{self._config.uri} holds tables and no images: {uris[0]}",
                remedy="Set source.kind: manifest if their rows name images, parquet if they hold image bytes.",
            )

    def reader(self, limits: ImageLimits) -> Reader:
        """Builds the reader of this source's references."""
        return SourceReader(self._config, limits, self._home, self._stores)


def no_images(uri: str) -> EmptySourceError:
    """The error of a source that lists nothing."""
    return EmptySourceError(f"{uri} holds no images", remedy="Check the path, or give --allow-empty.")


def no_files(uri: str, extension: str) -> EmptySourceError:
    """The error of a source below which there are no files of its kind; there may be others."""
    remedy = "Check the path, leave source.kind out if the images are files of their own, or give --allow-empty."
    return EmptySourceError(f"{uri} holds no {extension} files", remedy=remedy)
