"""What the command line prints of searches, duplicates, titles, alt texts. Every word from outside is shown as text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmflow.search.results import Hit

if TYPE_CHECKING:
    from vlmflow.alt_text_report import BrokenAltTexts
    from vlmflow.search.build import IndexReport
    from vlmflow.search.duplicates import DuplicateReport
    from vlmflow.search.results import SearchResult
    from vlmflow.search.titles import TitleReport

_MAX_SHOWN_CHARS = 200
_MAX_SHOWN_GROUPS = 20
_MAX_SHOWN_MEMBERS = 5
# Control characters, line separators, and marks that turn the direction of what follows: they could redraw a terminal
# or make a name read otherwise than it is spelled.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
# What a spreadsheet takes for the beginning of a formula, full-width forms included.
_FORMULA = re.compile("^[\\s\x00-\x1f\ufeff]*[=+\\-@|%＝＋－＠]")
_WORD = re.compile(r"[a-z]+[:,]?(\s|$)")
_COLOURS = {"allow": "green", "review": "yellow", "block": "red"}


def printable(text: str, max_chars: int | None = None) -> str:
    """A text with invisible characters spelled out, cut to ``max_chars``."""
    if max_chars is not None and len(text) > max_chars:
        text = f"{text[:max_chars]}… ({len(text):,} characters)"
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def sentence(text: str) -> str:
    """A text with a capital at its start; a name there, such as an address or a column, stays as it is written."""
    return text[:1].upper() + text[1:] if _WORD.match(text) else text


def as_csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, UTF-8 text. No cell of text starts a formula in a spreadsheet; null is an empty cell."""
    return "".join(csv_pieces(heads, rows))


def csv_pieces(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The same line by line."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\r\n")
    for row in chain([heads], ([_cell(value) for value in row] for row in rows)):
        writer.writerow(row)
        yield sink.getvalue()
        sink.seek(0)
        sink.truncate()


def search_csv(result: SearchResult) -> str:
    """The hits of a search as CSV."""
    names = list(Hit.model_fields)
    return as_csv(names, ([getattr(hit, name) for name in names] for hit in result.hits))


def duplicates_csv(report: DuplicateReport) -> str:
    """The members of all groups as CSV, each with the number of its group; the first of a group represents it."""
    names = ["image_id", "uri", "decision", "width", "height", "size_bytes", "similarity"]
    rows = (
        [number, group.kind, place == 0, *(getattr(member, name) for name in names)]
        for number, group in enumerate(report.groups, start=1)
        for place, member in enumerate(group.members)
    )
    return as_csv(["group", "kind", "is_representative", *names], rows)


def titles_csv(report: TitleReport) -> str:
    """The ranked rows as CSV."""
    names = ["rank", "text_itm", "text_itc", "text", "text_column", "caption", "decision", "uri", "image_id"]
    return as_csv(names, ([getattr(title, name) for name in names] for title in report.titles))


def alt_texts_csv(found: BrokenAltTexts) -> Iterator[str]:
    """The alternative texts that break a rule as CSV, in pieces: they may be millions."""
    names = ["rule", "alt_text", "caption", "uri", "image_id"]
    return csv_pieces(names, ([text[name] for name in names] for text in found.texts()))


def print_search(result: SearchResult, console: Console) -> None:
    """Prints the hits as a table, and what a person should know of them."""
    table = table_of("", "score", "decision", "uri", "caption")
    for hit in result.hits:
        table.add_row(str(hit.rank), f"{hit.score:.4f}", _decision(hit.decision), _text(hit.uri), _text(hit.caption))
    console.print(table if result.hits else "Nothing found.")
    condition = f" of which {printable(result.where, _MAX_SHOWN_CHARS)}" if result.where else ""
    console.print(
        Text(f"{result.num_matching:,} of {result.num_rows:,} images{condition}; {result.seconds:.2f} s"),
        style="dim",
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(Text(printable(note)), style="yellow", soft_wrap=True)


def print_index(report: IndexReport, console: Console) -> None:
    """Prints what an update of the index did."""
    if report.num_damaged:
        console.print(f"{report.num_damaged} segments were damaged and are made anew.", style="yellow")
    if report.num_small and not report.num_covered:
        console.print(f"No index: {report.num_small:,} vectors are compared one by one in well under a second.")
        return
    console.print(
        f"Index of {report.num_covered:,} vectors in {report.num_segments} segments: {report.num_added:,} added, "
        f"{report.num_removed} files removed, {report.seconds:.1f} s"
    )


def print_duplicates(report: DuplicateReport, console: Console) -> None:
    """Prints the first groups, each with a few of its members."""
    table = table_of("group", "kind", "like it", "decision", "pixels", "uri")
    for number, group in enumerate(report.groups[:_MAX_SHOWN_GROUPS], start=1):
        for place, member in enumerate(group.members[:_MAX_SHOWN_MEMBERS]):
            head = (str(number), group.kind, "keeps") if place == 0 else ("", "", f"{member.similarity:.3f}")
            size = f"{member.width}x{member.height}" if member.width else "-"
            table.add_row(*head, _decision(member.decision), size, _text(member.uri))
        if len(group.members) > _MAX_SHOWN_MEMBERS:
            table.add_row("", "", "", "", "", f"and {len(group.members) - _MAX_SHOWN_MEMBERS:,} more")
    if report.groups:
        console.print(table)
    if len(report.groups) > _MAX_SHOWN_GROUPS:
        console.print(f"and {len(report.groups) - _MAX_SHOWN_GROUPS:,} more groups: --csv or --json has all")
    semantic = "" if report.threshold is None else f"; semantic ones from a cosine of {report.threshold:g}"
    console.print(
        f"{report.num_duplicates:,} of {report.num_images:,} images are duplicates, in {len(report.groups):,} groups"
        + semantic
    )
    if report.num_without_vectors:
        console.print(f"{report.num_without_vectors:,} images have no embedding and were compared by content alone")


def print_titles(report: TitleReport, console: Console) -> None:
    """Prints the ranked rows."""
    is_cosine = report.ranked_by == "text_itc"
    table = table_of("", "cosine" if is_cosine else "match", "text", "caption", "decision", "uri")
    for title in report.titles:
        match = f"{getattr(title, report.ranked_by):.3f}"
        row = (_text(title.text), _text(title.caption), _decision(title.decision), _text(title.uri))
        table.add_row(str(title.rank), match, *row)
    console.print(table)
    console.print(f"the {len(report.titles):,} texts that fit least, of {report.num_scored:,}", style="dim")
    if is_cosine:
        said = "by the cosine of text and image, which is no probability: the model has no matching head"
        console.print(said, style="dim", soft_wrap=True)
    if report.num_left_out:
        said = f"{report.num_left_out:,} rows have a score of another model that does not compare: --where chooses rows"
        console.print(said, style="yellow", soft_wrap=True)


def print_alt_texts(found: BrokenAltTexts, console: Console) -> None:
    """Prints a few texts of each rule, and how many there are."""
    table = table_of("rule", "alternative text", "uri")
    for text in found.examples(_MAX_SHOWN_MEMBERS):
        table.add_row(text.rule, _text(text.alt_text), _text(text.uri))
    if table.row_count:
        console.print(table)
    report = found.counts
    num_good = report.num_images - report.num_without - found.rows.num_rows
    broken = ", ".join(f"{rule} {count:,}" for rule, count in report.rules.items()) or "none"
    console.print(f"{num_good:,} of {report.num_images:,} images have an alternative text that keeps every rule")
    console.print(f"broken rules: {broken}; without one: {report.num_without:,}", style="dim")


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    # A lone surrogate cannot be written; NUL ends the cell for many readers.
    text = value.replace("\x00", "\\u0000").encode("utf-8", "backslashreplace").decode("utf-8")
    return f"'{text}" if _FORMULA.match(text) else text


def table_of(*heads: str) -> Table:
    """An empty table of the terminal, as all are drawn here; long cells are folded.

    Args:
        heads: those that end in a percent sign are of figures, which stand to the right.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head, overflow="fold", justify="right" if head.endswith("%") else "left")
    return table


def _text(value: str | None) -> Text:
    return Text("-" if value is None else printable(value, _MAX_SHOWN_CHARS))


def _decision(value: str) -> Text:
    return Text(printable(value), style=_COLOURS.get(value, ""))
