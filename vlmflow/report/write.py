"""Writing the report of a catalog."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from vlmflow.catalog import Catalog
from vlmflow.config import CatalogConfig, Frozen, Job
from vlmflow.errors import ConfigError, VlmflowError
from vlmflow.files import put_file
from vlmflow.paths import is_folder
from vlmflow.report.cards import Cards
from vlmflow.report.collect import Facts, collect
from vlmflow.report.html import Html, paragraph, text
from vlmflow.report.page import page
from vlmflow.report.pictures import Pictures, make_pictures
from vlmflow.report.rows import Row
from vlmflow.report.run_section import run_section
from vlmflow.report.runs import RunFacts, find_run
from vlmflow.report.sections import (
    MAX_GROUPS,
    MAX_LABELS,
    MAX_MEMBERS,
    catalog_section,
    duplicates_section,
    labels_section,
    lowest_section,
    new_section,
    scores_section,
    table_section,
)
from vlmflow.search.duplicates import DuplicateReport, Kind, find_duplicates

MAX_PICTURES = 600
# With at most 7.5 MB of HTML around them (see sections) the page stays under 15 MB.
MAX_PICTURE_BYTES = 6_500_000


class WrittenReport(Frozen):
    """A report that was written.

    Attributes:
        run_id: the run that it is about; None: the catalog has no record of one.
        num_images: rows of the catalog, all of which are counted.
        num_rows: rows in the table of the page.
        num_pictures: images of which there is a picture.
    """

    path: Path
    run_id: str | None
    size_bytes: int
    num_images: int
    num_rows: int
    num_pictures: int


def write_report(
    catalog: CatalogConfig, path: str | Path = "report.html", *, run: str | None = None, job: Job | None = None
) -> WrittenReport:
    """Writes one self-contained page about a catalog and a run, for any browser, with no network.

    Flagged images are blurred until clicked. The clear small pictures are in the file: who has it can see them, also
    after an erasure from the catalog. Up to 600 images are read from where they are; every row is counted, and of the
    rows a sample is shown, as the page says.

    Args:
        path: a file that is written anew.
        run: id of a run; None: the newest that wrote rows.
        job: says with its limits, and of its source with ``http``, ``storage`` and ``bytes_column``, how images are
            read; None: as without a job file, and in stores as that of the catalog.

    Raises:
        ConfigError: there is no such run, or the file cannot be written.
        CatalogError: there is no catalog.
        StorageAccessError: the catalog's bucket does not exist, or refuses.
    """
    path = Path(path)
    if is_folder(path) or not is_folder(path.parent):
        raise ConfigError(f"{path}: cannot be written", remedy="Name a file in a folder that is there.")
    opened = Catalog.open(catalog)
    about = find_run(opened, run)
    run_id = None if about is None else about.run_id
    before = None if run_id is None else opened.flagged_before(run_id)
    report, notes = _duplicates(catalog)
    facts = collect(opened, run_id, flagged_before=before, wanted=_members(report))
    wanted = _wanted(facts, report)
    pictures = make_pictures(wanted, catalog, job, max_count=MAX_PICTURES, max_bytes=MAX_PICTURE_BYTES)
    cards = Cards(pictures)
    rows, num_rows = table_section(facts, cards)
    sections = [
        run_section(about),
        catalog_section(facts),
        scores_section(facts),
        new_section(facts, cards, before is not None),
        lowest_section(facts, cards),
        labels_section(facts, cards),
        duplicates_section(facts, cards, report, notes),
        rows,
    ]
    data = page(opened.uri, _intro(facts, about), sections, pictures, _footer(facts, pictures)).encode("utf-8")
    _write(path, data)
    return WrittenReport(
        path=path,
        run_id=run_id,
        size_bytes=len(data),
        num_images=facts.num_images,
        num_rows=num_rows,
        num_pictures=len(pictures.found),
    )


def _duplicates(catalog: CatalogConfig) -> tuple[DuplicateReport | None, list[str]]:
    """The groups; of equal bytes alone where embeddings cannot be compared, with the reason."""
    notes: list[str] = []
    tries: tuple[tuple[str, tuple[Kind, ...]], ...] = (
        ("Images alike by embedding", ("exact", "semantic")),
        ("Images of equal bytes", ("exact",)),
    )
    for what, kinds in tries:
        try:
            return find_duplicates(catalog, kinds=kinds), notes
        except VlmflowError as error:
            notes.append(f"{what} were not looked for: {error}. {error.remedy}".strip())
    return None, notes


def _members(report: DuplicateReport | None) -> list[str]:
    groups = () if report is None else report.groups[:MAX_GROUPS]
    return list(dict.fromkeys(member.image_id for group in groups for member in group.members[:MAX_MEMBERS]))


def _wanted(facts: Facts, report: DuplicateReport | None) -> Iterator[Row]:
    """The rows in the order in which they are to have a picture, each once."""
    order = sorted(facts.examples, key=lambda name: (-facts.labels[name].num_flagged, name))[:MAX_LABELS]
    examples = (image_id for name in order for image_id, _ in facts.examples[name])
    ids = chain(facts.new, facts.lowest, _members(report), examples, facts.rows)
    for image_id in dict.fromkeys(ids):
        if image_id in facts.rows:
            yield facts.rows[image_id]


def _intro(facts: Facts, about: RunFacts | None) -> Html:
    flagged = facts.num_images - facts.decisions["allow"]
    run = "" if about is None else f" Run {text(about.run_id)} was the last to write {facts.num_of_run:,} of them."
    return Html(
        paragraph(Html(f"{facts.num_images:,} images, {flagged:,} of them flagged (review or block).{run}"))
        + paragraph(
            Html(
                "Flagged images are blurred until you click on one; a second click blurs it again. "
                "The clear small pictures are inside this file: whoever has the file can see them."
            )
        )
        + "<noscript><p>Pictures, filters and sorting need the script that this page carries.</p></noscript>"
    )


def _footer(facts: Facts, pictures: Pictures) -> Html:
    now = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC"
    left_out = (
        f" {pictures.num_left_out:,} rows of this page have no picture, to keep it small."
        if pictures.num_left_out
        else ""
    )
    return paragraph(
        Html(
            f"Made by vlmflow on {now} from version {facts.version} of the table. It loads nothing: "
            f"{len(pictures.found):,} pictures are in it.{left_out} "
            "Texts are cut after 200 characters; invisible characters are spelled out. "
            "What is erased from the catalog later stays in this file until it is written anew."
        )
    )


def _write(path: Path, data: bytes) -> None:
    try:
        put_file(path, data)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", remedy="Name a file that can be written.") from error
