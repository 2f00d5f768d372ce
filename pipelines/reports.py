"""The report of a run, put where people find it: a folder or a bucket."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import tempfile
from pathlib import Path

from pydantic import ValidationError

from vlmflow.catalog import Catalog
from vlmflow.catalog.folder import FileInfo, Folder
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine import RunReport
from vlmflow.report.killed import with_counts
from vlmflow.report.write import WrittenReport, write_report
from vlmflow.sources import normalise_uri

# A date and the id of a run. Other files in the folder are not ours to remove.
_OURS = re.compile(r"\d{4}-\d\d-\d\d-(?P<run>\d{8}T\d{6}-[0-9a-f]{8})\.html")
_LOOK_BACK = dt.timedelta(days=7)


def unreported(job: Job, day: dt.date, folder: str) -> list[RunReport]:
    """The enrichments of nights that changed rows and have no report, the oldest first, however they ended.

    Looked at are those of the seven days up to ``day``. A night's run is known by its source, and by a date that was
    given to it, as nights do and who enriches by hand seldom does. Of a run that was killed the table tells what it
    changed: see :func:`vlmflow.report.killed.with_counts`.

    Args:
        folder: where the reports are.

    Raises:
        CatalogError: there is no catalog.
        StorageAccessError, TransientError: the catalog or the folder cannot be read.
    """
    source = normalise_uri(job.source.uri)
    reported = _reported(Folder(CatalogConfig(uri=folder, storage=job.catalog.storage)))
    # What is older than every report had its own, which was removed, or was there before reports were made.
    oldest = min(reported, default="")
    found: list[RunReport] = []
    catalog = Catalog.open(job.catalog)
    for run in catalog.runs.list():
        at_work = run.state == "running" and not run.has_ended
        if at_work or run.run_id in reported or run.run_id < oldest:
            continue
        known = {name: run.record[name] for name in RunReport.model_fields if name in run.record}
        with contextlib.suppress(ValidationError):  # another kind of run, or written by another version
            report = RunReport.model_validate(known)
            is_night = report.source == source and report.config.get("date") is not None
            if is_night and day - _LOOK_BACK < report.date <= day:
                found.append(report)
    return [report for report in with_counts(catalog, found[::-1]) if report.num_added + report.num_replaced]


def _reported(folder: Folder) -> dict[str, FileInfo]:
    """The reports in a folder, by the ids of their runs."""
    found = ((_OURS.fullmatch(info.path), info) for info in folder.list(""))
    return {match["run"]: info for match, info in found if match is not None}


def default_folder(catalog: CatalogConfig) -> str:
    """Beside the catalog, so that neither an export nor a reader of the catalog meets it."""
    return f"{catalog.uri.rstrip('/')}-reports"


def publish_report(
    catalog: CatalogConfig, run_id: str, date: dt.date, folder: str, keep: int
) -> tuple[str, WrittenReport]:
    """Writes the report of a run to ``folder``, and removes all but those of the newest ``keep`` runs there.

    The small pictures in a report outlive an erasure from the catalog; hence the limit.

    Args:
        folder: a local one, or a prefix in the store that the catalog's storage settings reach.

    Returns:
        Where it lies, ending in the file's name, and what was written.

    Raises:
        VlmflowError: the report cannot be made, or the folder cannot be written.
    """
    name = f"{date}-{run_id}.html"
    place = CatalogConfig(uri=folder, storage=catalog.storage)
    with tempfile.TemporaryDirectory(prefix="vlmflow-report-") as scratch:
        path = Path(scratch) / name
        written = write_report(catalog, path, run=run_id)
        data = path.read_bytes()
    files = Folder(place)
    # A browser shows what says that it is a page; other files it saves.
    files.write(name, data, content_type="text/html; charset=utf-8")
    # By their runs, not by the time of writing: the oldest report that is kept tells how far back none is missing.
    reported = _reported(files)
    files.delete_all([reported[run].path for run in sorted(reported, reverse=True)[keep:]])
    return f"{folder.rstrip('/')}/{name}", written
