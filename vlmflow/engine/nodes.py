"""Nodes that lack what the driver has: the disk of the source, whose images are not gone, or packages that decode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from vlmflow.engine import columns
from vlmflow.engine.faults import of_node
from vlmflow.errors import ClusterError, RowErrorClass
from vlmflow.imaging import DECODER_VERSION
from vlmflow.sources.reader import GONE
from vlmflow.sources.uris import is_http
from vlmflow.storage import local_version, parse_address

_MAX_EXAMPLES = 8  # of a node, of each write


class Unfound(NamedTuple):
    """A file that a worker did not find.

    Attributes:
        version: as it was listed.
    """

    node: str
    path: str
    version: str


def unfound(rows: pa.Table) -> list[Unfound]:
    """Images of local disks that were gone when workers read them: some of each node that read no other such image.

    A shared disk may show a node an old listing: what it does not find there says nothing of the disk.

    Args:
        rows: finished.
    """
    failed = rows.filter(pa.compute.greater(pa.compute.list_value_length(rows["errors"]), 0))
    found: dict[str, list[Unfound]] = {}
    for row in failed.select(["errors", "locator", "object_version", columns.NODE]).to_pylist():
        is_gone = any((error["class"], error["message"]) == (RowErrorClass.MISSING, GONE) for error in row["errors"])
        if not is_gone or row["object_version"] is None or is_http(row["locator"]):
            continue
        address, of_node = parse_address(row["locator"]), found.setdefault(row[columns.NODE], [])
        if address.is_local and len(of_node) < _MAX_EXAMPLES:
            of_node.append(Unfound(row[columns.NODE], address.path, row["object_version"]))
    seeing = _seeing(rows) if any(found.values()) else set()
    return [one for node, some in found.items() for one in some if node not in seeing]


def _seeing(rows: pa.Table) -> set[str]:
    """The nodes that read an image of a local disk."""
    read = rows.filter(pa.compute.is_valid(rows["content_hash"])).select(["locator", columns.NODE]).to_pylist()
    return {row[columns.NODE] for row in read if not is_http(row["locator"]) and parse_address(row["locator"]).is_local}


def decoders(rows: pa.Table) -> dict[str, str]:
    """What decoded the rows, each with a node that has it; of several environments on one machine all are there."""
    pairs = rows.group_by([columns.DECODER_THERE, columns.NODE]).aggregate([])
    return dict(zip(pairs[columns.DECODER_THERE].to_pylist(), pairs[columns.NODE].to_pylist(), strict=True))


def check_decoders(found: Mapping[str, str]) -> None:
    """Makes sure that what is unreadable to a node is so to all: the rows say that the driver's decoder saw it.

    Raises:
        ClusterError: a node has another, as where an extra is not installed.
    """
    for decoder, node in found.items():
        if decoder != DECODER_VERSION:
            raise ClusterError(
                of_node(f"images are decoded by {decoder}, and the run was planned with {DECODER_VERSION}", node),
                remedy="Install one version of Pillow, and the same of vlmflow's extras heif and video, on every node; "
                "`vlmflow doctor` names those that have others. What was committed stays.",
            )


def check_disks(found: Iterable[Unfound]) -> None:
    """Makes sure that what workers did not find is not found here either. To be called by the driver.

    Raises:
        ClusterError: all that a node did not find are here, as they were listed.
    """
    by_node: dict[str, list[Unfound]] = {}
    for one in found:
        by_node.setdefault(one.node, []).append(one)
    for node, some in by_node.items():
        if all(_is_here(one) for one in some):
            raise ClusterError(
                f"node {node} of the cluster does not find {some[0].path}, which is there on this machine",
                remedy="Mount the disk of the images at the same path on every node, or put them into a store that "
                "all nodes reach. What was committed stays; then run the same command again to go on.",
            )


def _is_here(one: Unfound) -> bool:
    try:
        version = local_version(Path(one.path).stat())
    except OSError:
        return False
    # Of a part of a file, the version begins with that of the whole.
    return one.version == version or one.version.startswith(f"{version}-")
