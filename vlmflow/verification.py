"""Does a catalog hold what its source lists? ``vlmflow verify`` as a function."""

from __future__ import annotations

from collections.abc import Mapping

from vlmflow import schema
from vlmflow.catalog import Catalog, Verification
from vlmflow.config import CatalogConfig, Job, SourceConfig
from vlmflow.sources import open_source


def verify(
    source: SourceConfig, catalog: CatalogConfig, *, job: Job | None = None, num_examples: int = 5
) -> Verification:
    """Reconciles a source with a catalog, and the catalog with its own files. Reads no image and writes nothing.

    Args:
        job: whose models, settings and tasks the rows are held against; None: those of the newest finished run.
        num_examples: of each finding, at most.

    Raises:
        SourceError: the source does not exist or is empty.
        CatalogError: there is no catalog.
        StorageAccessError: a store refused access.
    """
    opened = Catalog.open(catalog)
    if job is None:
        fingerprints = _last_fingerprints(opened)
    else:
        from vlmflow.engine.prepare import prepare

        fingerprints = prepare(job).fingerprints
    return opened.verify(open_source(source, catalog).list(), fingerprints, num_examples)


def _last_fingerprints(catalog: Catalog) -> Mapping[str, str]:
    for run in catalog.runs.newest():
        found = run.record.get("fingerprints")
        if run.state == "finished" and isinstance(found, dict) and found:
            # The rest is of a newer version, which rows were made with, and which this one knows nothing of.
            return {task: fingerprint for task, fingerprint in found.items() if task in schema.TASKS}
    return {}
