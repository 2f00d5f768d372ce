"""What other programs may have made of a table: whether vlmflow can read it, and write it.

Delta tables say what their readers and writers must know (https://github.com/delta-io/delta/blob/master/PROTOCOL.md).
vlmflow takes the files of a version from the log and reads and writes them itself: so what the log says of their rows
beside that, and what is asked of rows before they are written, it must know, or keep away from the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.types as pt
from deltalake import DeltaTable

from vlmflow import schema
from vlmflow.errors import UnsupportedTableError

PARTITIONED_BY = ["ingest_date"]

# What a table may have and be written to, beside the checks below: that nothing of it is in use, or that it is no
# writer's business. deltalake knows some of the others and refuses them, as late as at the commit.
_WRITABLE = frozenset(
    {
        "appendOnly",
        "changeDataFeed",
        "checkConstraints",
        "columnMapping",
        "deletionVectors",
        "generatedColumns",
        "invariants",
        "timestampNtz",
        "v2Checkpoint",
    }
)
_FEATURES_VERSION = 7  # of writers: from here on a table lists what it has
_MOST_LEGACY = 5  # 6 has identity columns, and nothing tells whether one is in use
# In the metadata of a column: what a writer has to compute or to check.
_COLUMN_RULES = {
    "delta.generationExpression": "generated",
    "delta.identity.start": "an identity column",
    "delta.invariants": "held to an invariant",
}

_DROP = (
    "Another program has turned it on: have it dropped there (ALTER TABLE ... DROP FEATURE {}), or begin another "
    "catalog."
)

_PURGE = (
    "Have them removed by the program that deleted them (REORG TABLE ... APPLY (PURGE)), and turn "
    "delta.enableDeletionVectors off."
)

# What deltalake says where the log holds what it does not know, or does not hold together, and what to do then.
_CAUSES = (
    (re.compile(r"[Ff]eature '([\w-]+)' is not supported"), _DROP),
    (re.compile(r"Unsupported minimum reader version (\d+)"), _DROP.replace("{}", "...")),
    (re.compile(r"catalog-managed"), _DROP.replace("{}", "catalogManaged")),
    (re.compile(r"column mapping", re.IGNORECASE), _DROP.replace("{}", "columnMapping")),
    (
        re.compile(r"_last_checkpoint hint"),
        "Delete `_last_checkpoint` in the folder `_delta_log` of the table: it names a checkpoint that is not there.",
    ),
    (re.compile(r"Deletion Vector"), _PURGE),
    (
        re.compile(r"Invalid table version"),
        "Its log lacks the entry of the newest version: put `_delta_log` back from a copy, or have another program "
        "commit to the table once, such as a property.",
    ),
    (
        re.compile(r"unmasked nulls"),
        "Another program has added a file without an ingest_date: have it remove it, or restore the version before.",
    ),
    (
        re.compile(r"older than the existing snapshot"),
        "Another table has been put in its place meanwhile: run the same command again.",
    ),
    (
        re.compile(r"gap|Json error|Parquet error|Schema error|[Cc]heckpoint|File not found|found in delta log"),
        "Its log is damaged: put `_delta_log` back from a copy, whole; what was written later is computed again.",
    ),
)


def check_readable(uri: str, name: str, table: DeltaTable, *, is_current: bool) -> None:
    """Makes sure that the rows of a version are those of its files, under the columns that vlmflow knows.

    Args:
        uri: of the catalog, for messages.
        name: of the table.
        is_current: it has the columns of this version of vlmflow; else some may be lacking.

    Raises:
        UnsupportedTableError: they are not.
    """
    place, metadata = f"{uri}: table {name}", table.metadata()
    mode = metadata.configuration.get("delta.columnMapping.mode") or "none"
    if mode != "none":
        raise UnsupportedTableError(
            f"{place} has column mapping (by {mode}), which vlmflow cannot read: its files may call columns otherwise",
            remedy=_DROP.format("columnMapping"),
        )
    if "deletionVectors" in (table.protocol().reader_features or ()) and _has_deleted_rows(table):
        raise UnsupportedTableError(
            f"{place} has rows that are marked as deleted and still stand in its files (deletion vectors), which "
            "vlmflow would bring back",
            remedy=_PURGE,
        )
    check_partitions(uri, name, table)
    held = pa.schema(table.schema().to_arrow())
    for field in schema.IMAGES if name == "images" else schema.EMBEDDINGS:
        index = held.get_field_index(field.name)
        if index < 0 and (is_current or not field.nullable):
            raise _not_ours(place, f"has no column {field.name}")
        if index >= 0 and not _alike(field.type, held.field(index).type):
            raise _not_ours(place, f"holds {field.name} as {held.field(index).type}, not as {field.type}")
    source = held.get_field_index("source")
    if name == "images" and source >= 0 and not pt.is_struct(held.field(source).type):
        raise _not_ours(place, f"holds source as {held.field(source).type}, not as a struct")


def check_partitions(uri: str, name: str, table: DeltaTable) -> None:
    """Makes sure that a version is partitioned as vlmflow's tables are.

    Raises:
        UnsupportedTableError: it is not.
    """
    by = table.metadata().partition_columns
    if by != PARTITIONED_BY:
        what = f"is partitioned by {', '.join(by) or 'nothing'}, not by {PARTITIONED_BY[0]}"
        raise _not_ours(f"{uri}: table {name}", what)


def check_writable(uri: str, name: str, table: DeltaTable) -> None:
    """Makes sure that vlmflow can commit to a table, and what it commits keeps what the table promises.

    Args:
        uri: of the catalog, for messages.
        name: of the table.

    Raises:
        UnsupportedTableError: it cannot, or would not.
    """
    place, protocol = f"{uri}: table {name}", table.protocol()
    version = protocol.min_writer_version
    if version > _FEATURES_VERSION or _MOST_LEGACY < version < _FEATURES_VERSION:
        raise UnsupportedTableError(
            f"{place} wants writers of version {version}, which vlmflow is not",
            remedy=_DROP.format("..."),
        )
    for feature in sorted(set(protocol.writer_features or ()) - _WRITABLE):
        raise UnsupportedTableError(
            f"{place} has the Delta feature {feature}, with which vlmflow cannot write to it",
            remedy=_DROP.format(feature),
        )
    for what, remedy in _promises(table):
        raise UnsupportedTableError(f"{place} {what}, so vlmflow does not write to it", remedy=remedy)


def _promises(table: DeltaTable) -> Iterator[tuple[str, str]]:
    """What is asked of writers of a table that vlmflow does not do, and the remedy."""
    configuration = table.metadata().configuration
    if (configuration.get("delta.appendOnly") or "").lower() == "true":
        yield "takes additions alone (delta.appendOnly)", "Set delta.appendOnly to false: rows are replaced in place."
    prefix = "delta.constraints."
    for key in sorted(key for key in configuration if key.startswith(prefix)):
        constraint = key.removeprefix(prefix)
        remedy = f"Drop it (ALTER TABLE ... DROP CONSTRAINT {constraint}): vlmflow does not check rows against it."
        yield f"has the CHECK constraint {constraint}", remedy
    ours = {*schema.IMAGES.names, *schema.EMBEDDINGS.names}
    for column in json.loads(table.schema().to_json())["fields"]:
        if not column["nullable"] and column["name"] not in ours:
            yield (
                f"has a column {column['name']} that is NOT NULL",
                "Let it be null, or drop it: new rows have no value.",
            )
        for rule, said in _COLUMN_RULES.items():
            if rule in json.dumps(column):
                yield f"has a column {column['name']} that is {said}", "Drop it, or what it says."


def remedy_of(reason: str) -> str | None:
    """The remedy for a table that deltalake cannot read, by what it says; None: that tells nothing."""
    for pattern, remedy in _CAUSES:
        if match := pattern.search(reason):
            return remedy.format(*match.groups())
    return None


def _has_deleted_rows(table: DeltaTable) -> bool:
    return any(batch.num_rows for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors()))


def _alike(wanted: pa.DataType, held: pa.DataType) -> bool:
    """Whether a type is the other, whatever may be null in it."""
    if pt.is_list(wanted) and pt.is_list(held):
        return _alike(wanted.value_type, held.value_type)
    if pt.is_struct(wanted) and pt.is_struct(held):
        pairs: list[tuple[Any, Any]] = list(zip(wanted, held, strict=False))
        return wanted.num_fields == held.num_fields and all(
            ours.name == theirs.name and _alike(ours.type, theirs.type) for ours, theirs in pairs
        )
    return bool(wanted == held)


def _not_ours(place: str, what: str) -> UnsupportedTableError:
    return UnsupportedTableError(
        f"{place} {what}",
        remedy="Another program has changed it: restore the version before (RESTORE TABLE), or begin another catalog.",
    )
