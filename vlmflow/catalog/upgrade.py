"""Brings a catalog of an older version of vlmflow to the columns of this one."""

from __future__ import annotations

import pyarrow as pa

from vlmflow import schema
from vlmflow.catalog.columns import missing_columns
from vlmflow.catalog.commit import Change, CommitRequest, commit
from vlmflow.catalog.keys import digest_of
from vlmflow.catalog.log import SCHEMA_VERSION, Snapshot, TableLog

_COLUMNS = {"images": schema.IMAGES, "embeddings": schema.EMBEDDINGS}


def upgrade(log: TableLog) -> None:
    """Adds the columns that an older table lacks, empty in the rows that it holds; then marks the table as ours.

    No file is rewritten. Several programs may do so at once, and one that is killed in between is followed by another.

    Raises:
        StorageAccessError: the store refuses to be written to.
        CommitError: other writers won every attempt.
    """
    if log.schema_version == SCHEMA_VERSION:
        return
    wanted = _COLUMNS[log.name]

    def propose(snapshot: Snapshot) -> Change:
        return Change(new_fields=tuple(_nullable(field) for field in wanted if field.name not in snapshot.schema.names))

    since = log.refresh().version
    commit(log, CommitRequest(digest_of("upgrade", SCHEMA_VERSION), "", "upgrade", since), propose)
    log.set_schema_version()


def add_source_columns(images: TableLog, wanted: pa.Schema) -> None:
    """Adds those of the caller's columns that the images table lacks.

    Raises:
        CatalogError: it holds one of them under another type.
        StorageAccessError, CommitError: as :func:`upgrade`.
    """

    def propose(snapshot: Snapshot) -> Change:
        return Change(new_fields=missing_columns(snapshot.schema, wanted))

    commit_id = digest_of("add_columns", ",".join(wanted.names))
    commit(images, CommitRequest(commit_id, "", "add_columns", images.refresh().version), propose)


def _nullable(field: pa.Field) -> pa.Field:
    return pa.field(field.name, field.type)
