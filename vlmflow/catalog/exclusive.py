"""Whether a store refuses to overwrite a file: without that, of two commits at once one replaces the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from vlmflow.errors import StorageAccessError
from vlmflow.retry import retried
from vlmflow.storage import Fault, fault_of, is_unknown, parse_address

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PROBE = ".conditional-writes"
HONOURING = "Use a store that honours If-None-Match (S3, GCS, Azure, MinIO, R2, Ceph from Squid on)"


def create(store: ObjectStore, path: str) -> bool:
    """Puts an empty file; False: there is one."""
    try:
        retried(lambda: obstore.put(store, path, b"", mode="create"), never=(AlreadyExistsError,))
    except AlreadyExistsError:
        return False
    return True


def check_exclusive(store: ObjectStore, path: str, uri: str) -> None:
    """Makes sure that a second writer of one file is refused.

    The file that it is tried with stays: with it, one request tells, and no right to delete is needed.

    Args:
        path: of a file that holds nothing, and need not be there.
        uri: the catalog, for messages.

    Raises:
        StorageAccessError: the second is accepted, or the store knows no such writes, or none are allowed.
    """
    try:
        if not (create(store, path) and create(store, path)):  # the first may make the file
            return
    except BaseError as error:
        if is_unknown(error):
            raise _unsafe(uri, "knows no conditional writes") from error
        if fault_of(error) is Fault.DENIED:  # what can be listed may be refused to be written
            remedy = "Check that the credentials are valid and may write there; `vlmflow doctor` tests it."
            raise StorageAccessError(f"{parse_address(uri)} cannot be written: access denied", remedy=remedy) from error
        raise
    raise _unsafe(uri, "accepts a second writer of one file")


def _unsafe(uri: str, what: str) -> StorageAccessError:
    return StorageAccessError(
        f"{parse_address(uri).root} {what}, so two runs could overwrite each other's commits and lose rows",
        remedy=f"{HONOURING}; `vlmflow doctor` tests it.",
    )
