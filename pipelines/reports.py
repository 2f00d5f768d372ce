"""The report of a run, put where people find it: a folder or a bucket."""

from __future__ import annotations

import datetime as dt
import logging
import re
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from vlmflow.catalog import Catalog
from vlmflow.catalog.files import is_being_written
from vlmflow.catalog.folder import Folder
from vlmflow.config import CatalogConfig, Job
from vlmflow.engine import RunReport
from vlmflow.errors import VlmflowError
from vlmflow.report.killed import enrichment_of, with_counts
from vlmflow.report.write import WrittenReport, write_report
from vlmflow.sources import normalise_uri
from vlmflow.workspace import Workspace

logger = logging.getLogger("vlmflow")

# A date and the id of a run: its report, or the note that people were told of what it flagged. Other files in the
# folder are not ours to remove.
_OURS = re.compile(r"(?P<date>\d{4}-\d\d-\d\d)-(?P<run>\d{8}T\d{6}-[0-9a-f]{8})\.(?P<kind>html|told)")
_LOOK_BACK = dt.timedelta(days=7)


def is_night(record: Mapping[str, Any], job: Job) -> bool:
    """Whether a run's record is that of a night over the job's source.

    A night is known by its source, and by a date that was given to it, as nights do and who enriches by hand seldom
    does.
    """
    is_ours = record.get("source") == normalise_uri(job.source.uri)
    return is_ours and (record.get("config") or {}).get("date") is not None


def unreported(job: Job, day: dt.date, folder: str, keep: int) -> list[RunReport]:
    """The enrichments of nights that changed rows and have no report, the oldest first, however they ended.

    Looked at are those of the seven days up to ``day``. Of a run that was killed the table tells what it changed: see
    :func:`vlmflow.report.killed.with_counts`.

    Args:
        folder: where the reports are.
        keep: how many reports are kept there.

    Raises:
        CatalogError: there is no catalog.
        StorageAccessError, TransientError: the catalog or the folder cannot be read.
    """
    reported = {name["run"] for name in _ours(_folder(job.catalog, folder)) if name["kind"] == "html"}
    # Where no more are kept, what is older than every report had its own, which was removed.
    oldest = min(reported) if len(reported) >= keep else ""
    found: list[RunReport] = []
    catalog = Catalog.open(job.catalog)
    for run in catalog.runs.newest():
        if run.started_at.date() < day - _LOOK_BACK - dt.timedelta(days=1):  # nights begin when their date has
            break
        at_work = run.state == "running" and not run.has_ended
        if at_work or run.run_id in reported or run.run_id < oldest:
            continue
        report = enrichment_of(run.record)
        if report is not None and is_night(run.record, job) and day - _LOOK_BACK < report.date <= day:
            found.append(report)
    return [report for report in with_counts(catalog, found[::-1]) if report.num_added + report.num_replaced]


def is_told(catalog: CatalogConfig, report: RunReport, folder: str) -> bool:
    """Whether people have been told of what a run flagged. False where that cannot be read: better twice than never."""
    try:
        return _folder(catalog, folder).stat(_name(report.date, report.run_id, "told")) is not None
    except VlmflowError as error:
        logger.warning("people may be told again of run %s: %s", report.run_id, error)
        return False


def note_told(catalog: CatalogConfig, report: RunReport, folder: str) -> None:
    """Notes beside the reports that people have been told of what a run flagged, until its own report is there.

    A note that cannot be written is logged and fails nothing: people are told again by the next night then.
    """
    words = f"People were told how much run {report.run_id} flagged. Its report is still to be made.\n"
    try:
        _folder(catalog, folder).write(_name(report.date, report.run_id, "told"), words.encode())
    except VlmflowError as error:
        logger.warning("people may be told again of run %s: %s", report.run_id, error)


def _folder(catalog: CatalogConfig, folder: str) -> Folder:
    return Folder(CatalogConfig(uri=folder, storage=catalog.storage))


def _name(date: dt.date, run_id: str, kind: str) -> str:
    return f"{date}-{run_id}.{kind}"


def _ours(folder: Folder) -> list[re.Match[str]]:
    """The names of reports and notes in a folder."""
    found = (_OURS.fullmatch(info.path) for info in folder.list(""))
    return [match for match in found if match is not None]


def _left(folder: Folder) -> list[str]:
    """What killed nights were putting into a folder, and no listing shows."""
    now = dt.datetime.now(dt.UTC)  # of a disk, which alone shows such files
    ours = (info for info in folder.unfinished("") if _OURS.fullmatch(info.finished_path))
    return [info.path for info in ours if not is_being_written(info, now)]


def default_folder(catalog: CatalogConfig) -> str:
    """Beside the catalog, so that neither an export nor a reader of the catalog meets it."""
    return f"{catalog.uri.rstrip('/')}-reports"


def publish_report(job: Job, run_id: str, date: dt.date, folder: str, keep: int) -> tuple[str, WrittenReport]:
    """Writes the report of a run to ``folder``, and removes all but those of the newest ``keep`` runs there, and notes
    of who was told that are not needed any more.

    The small pictures in a report outlive an erasure from the catalog; hence the limit.

    Args:
        folder: a local one, or a prefix in the store that the catalog's storage settings reach.

    Returns:
        Where it lies, ending in the file's name, and what was written.

    Raises:
        VlmflowError: the report cannot be made, or the folder cannot be written.
    """
    name = _name(date, run_id, "html")
    with Workspace() as workspace:  # what a killed night leaves of it would outlive an erasure too
        path = workspace.path / name
        written = write_report(job.catalog, path, run=run_id, job=job)
        data = path.read_bytes()
    files = _folder(job.catalog, folder)
    # A browser shows what says that it is a page; other files it saves.
    files.write(name, data, content_type="text/html; charset=utf-8")
    files.delete(_name(date, run_id, "told"))
    found = _ours(files)
    # By their runs, not by the time of writing: the oldest report that is kept tells how far back none is missing.
    reports = sorted((match for match in found if match["kind"] == "html"), key=itemgetter("run"), reverse=True)
    # Runs of which no night makes the report any more.
    notes = [match for match in found if match["kind"] == "told" and match["date"] <= str(date - _LOOK_BACK)]
    files.delete_all([match.string for match in (*reports[keep:], *notes)] + _left(files))
    return f"{folder.rstrip('/')}/{name}", written
