"""All images under a prefix of an object store, or under a local folder."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from vlmflow.config import ImageLimits, SourceConfig
from vlmflow.errors import EmptySourceError
from vlmflow.sources.base import Reader, reference_batch
from vlmflow.sources.listing import list_objects
from vlmflow.sources.reader import SourceReader
from vlmflow.sources.stores import Stores


class PrefixSource:
    """Lists what lies under a prefix, as the store lists it."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._stores = Stores(config.storage)

    @property
    def columns(self) -> pa.Schema:
        """No caller's columns."""
        return pa.schema([])

    def list(self) -> Iterator[pa.RecordBatch]:
        """Yields the references; see :class:`vlmflow.sources.base.Source`."""
        empty = True
        for listed in list_objects(self._config.uri, self._stores):
            if listed.num_rows:
                empty = False
                yield reference_batch(dict(zip(listed.schema.names, listed.columns, strict=True)))
        if empty and not self._config.allow_empty:
            raise no_images(self._config.uri)

    def reader(self, limits: ImageLimits) -> Reader:
        """Builds the reader of this source's references."""
        return SourceReader(self._config, limits, self._config.uri)


def no_images(uri: str) -> EmptySourceError:
    """The error of a source that lists nothing."""
    return EmptySourceError(f"{uri} holds no images", remedy="Check the path, or give --allow-empty.")
