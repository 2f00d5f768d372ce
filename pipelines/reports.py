"""The report of a run, put where people find it: a folder or a bucket."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import tempfile
from pathlib import Path

from pydantic import ValidationError

from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import Folder
from vlmflow.config import CatalogConfig
from vlmflow.engine import RunReport
from vlmflow.report.write import WrittenReport, write_report

# A date and the id of a run. Other files in the folder are not ours to remove.
_OURS = re.compile(r"\d{4}-\d\d-\d\d-\d{8}T\d{6}-[0-9a-f]{8}\.html")


def unreported(catalog: CatalogConfig, date: dt.date, folder: str) -> list[RunReport]:
    """The enrichments of a date that changed rows, the oldest first, since the newest that has its report."""
    place = Folder(CatalogConfig(uri=folder, storage=catalog.storage))
    found: list[RunReport] = []
    for run in Catalog.open(catalog).runs.list():
        if run.record.get("date") != str(date) or run.record.get("status") != "done":
            continue
        if place.stat(_name(date, run.run_id)) is not None:
            break
        known = {name: run.record[name] for name in RunReport.model_fields if name in run.record}
        with contextlib.suppress(ValidationError):  # written by another version
            report = RunReport.model_validate(known)
            if report.num_added + report.num_replaced:
                found.append(report)
    return found[::-1]


def default_folder(catalog: CatalogConfig) -> str:
    """Beside the catalog, so that neither an export nor a reader of the catalog meets it."""
    return f"{catalog.uri.rstrip('/')}-reports"


def publish_report(
    catalog: CatalogConfig, run_id: str, date: dt.date, folder: str, keep: int
) -> tuple[str, WrittenReport]:
    """Writes the report of a run to ``folder``, and removes all but the newest ``keep`` reports there.

    The small pictures in a report outlive an erasure from the catalog; hence the limit.

    Args:
        folder: a local one, or a prefix in the store that the catalog's storage settings reach.

    Returns:
        Where it lies, ending in the file's name, and what was written.

    Raises:
        VlmflowError: the report cannot be made, or the folder cannot be written.
    """
    name = _name(date, run_id)
    place = CatalogConfig(uri=folder, storage=catalog.storage)
    with tempfile.TemporaryDirectory(prefix="vlmflow-report-") as scratch:
        path = Path(scratch) / name
        written = write_report(catalog, path, run=run_id)
        data = path.read_bytes()
    files = Folder(place)
    # A browser shows what says that it is a page; other files it saves.
    files.write(name, data, content_type="text/html; charset=utf-8")
    ours = (info for info in files.list("") if _OURS.fullmatch(info.path))
    old = sorted(ours, key=lambda info: info.modified_at, reverse=True)[keep:]
    files.delete_all([info.path for info in old])
    return f"{folder.rstrip('/')}/{name}", written


def _name(date: dt.date, run_id: str) -> str:
    return f"{date}-{run_id}.html"
