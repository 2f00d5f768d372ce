"""Where images come from: listing references without opening an image, and reading the bytes of each."""

from __future__ import annotations

from collections.abc import Callable

from vlmflow.config import CatalogConfig, SourceConfig
from vlmflow.sources.base import Fetched, Reader, Source
from vlmflow.sources.manifest import ManifestSource
from vlmflow.sources.manifest_files import TABLES
from vlmflow.sources.nested import catalog_beside, catalog_in_store
from vlmflow.sources.parquet import ParquetSource, holds_image_bytes
from vlmflow.sources.prefix import PrefixSource
from vlmflow.sources.uris import image_ids, normalise_uri
from vlmflow.sources.webdataset import WebDatasetSource
from vlmflow.storage import Address

__all__ = ["Fetched", "Reader", "Source", "image_ids", "normalise_uri", "open_source"]

_KINDS: dict[str, Callable[[SourceConfig, Address | None], Source]] = {
    "manifest": ManifestSource,
    "prefix": PrefixSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
}


def open_source(config: SourceConfig, catalog: CatalogConfig | None = None) -> Source:
    """Opens the source of a job. Of ``kind: auto``, the extension of the uri tells which.

    A ``.parquet`` file is opened to see whether it holds image bytes or is a manifest; nothing else is read yet.

    Args:
        catalog: of the job; what lies in it is left out where a folder or a prefix is listed.

    Raises:
        ConfigError: the uri is of no store that is known, or lies in the catalog; the variable that should name a proxy
            does not.
        SourceError: a Parquet file does not exist, or is none.
        StorageAccessError: the store refused, or is not there.
        TransientError: the store is out of reach.
    """
    if config.http.proxy_env is not None:
        from vlmflow.sources.connections import proxy_of  # its libraries take a quarter of a second

        proxy_of(config.http)
    kind = _kind(config)
    # A manifest may lie in the catalog: its rows name images wherever they are.
    beside = catalog_in_store if kind == "manifest" else catalog_beside
    return _KINDS[kind](config, None if catalog is None else beside(config, catalog))


def _kind(config: SourceConfig) -> str:
    if config.kind != "auto":
        return config.kind
    uri = config.uri.lower().rstrip("/")
    if uri.endswith(TABLES) and not uri.endswith(".parquet"):
        return "manifest"
    if uri.endswith(".tar"):
        return "webdataset"
    if uri.endswith(".parquet"):
        return "parquet" if holds_image_bytes(config) else "manifest"
    return "prefix"
