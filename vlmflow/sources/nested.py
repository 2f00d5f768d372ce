"""A catalog that lies among the images it is of: its own files are none of them."""

from __future__ import annotations

import os
from pathlib import PurePath

from vlmflow.config import CatalogConfig, SourceConfig, StorageConfig
from vlmflow.errors import ConfigError
from vlmflow.sources.uris import normalise_uri
from vlmflow.storage import Address, parse_address

_AZURE = {"az", "azure", "adl", "abfs", "abfss"}


def catalog_beside(source: SourceConfig, catalog: CatalogConfig) -> Address | None:
    """The catalog's address, below which a listing of the source finds no images; None: it is in another store.

    Raises:
        ConfigError: the source lies in the catalog, or is the catalog.
    """
    images, tables = parse_address(source.uri), catalog_in_store(source, catalog)
    if tables is None:
        return None
    if _path(images).is_relative_to(_path(tables)):
        where = "is the catalog" if _path(images) == _path(tables) else f"lies in the catalog {catalog.uri}"
        remedy = (
            f"Name another place for the catalog: beside the images, or in a folder such as {images.child('catalog')}."
        )
        raise ConfigError(f"the source {source.uri} {where}", remedy=remedy)
    return tables


def catalog_in_store(source: SourceConfig, catalog: CatalogConfig) -> Address | None:
    """The catalog's address, if it lies in the store of the source; None: it does not."""
    images, tables = parse_address(source.uri), parse_address(catalog.uri)
    if _store(images) != _store(tables) or _endpoints_differ(source.storage, catalog.storage):
        return None
    return tables


def _store(address: Address) -> tuple[str, str]:
    scheme, _, bucket = address.root.partition("://")
    return ("az", bucket.partition("@")[0]) if scheme in _AZURE else (scheme, bucket)


def _endpoints_differ(one: StorageConfig, other: StorageConfig) -> bool:
    """Whether two endpoints are given; one that is not may come from the environment, and be the other."""
    return len({normalise_uri(storage.endpoint) for storage in (one, other) if storage.endpoint}) > 1


def _path(address: Address) -> PurePath:
    return PurePath("/", os.path.realpath(address.path) if address.is_local else address.path)
