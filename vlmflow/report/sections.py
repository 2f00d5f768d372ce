"""The sections of the page that are about the catalog."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vlmflow.report.cards import DECISIONS, SETS, STATUSES, Cards
from vlmflow.report.charts import bin_table, count_table, histogram, label_histogram
from vlmflow.report.collect import NUM_PER_LABEL, NUM_SAMPLED, Facts
from vlmflow.report.html import NOTHING, Html, details, heading, number, paragraph, section, table, text, within
from vlmflow.report.labels import LabelFacts
from vlmflow.search.duplicates import DuplicateReport

MAX_LABELS = 60
MAX_GROUPS = 48
MAX_MEMBERS = 4
_SECTION_BYTES = 800_000
_TABLE_BYTES = 3_500_000
_DIFFERS = "differs"  # in place of a threshold that not all rows share
_COSINES = "Match scores are cosines, for the model has no matching head. Compare those of one model alone."
_MATCH_NAMES = {"text_itm": "title match", "caption_itm": "caption match"}


def catalog_section(facts: Facts) -> Html:
    """Counts of the whole catalog, and where its scores lie."""
    flagged = sum(facts.reasons.values())
    tables = [
        count_table("All rows by decision", "decision", facts.decisions, facts.num_images),
        count_table("All rows by status", "status", facts.statuses, facts.num_images),
    ]
    if facts.reasons:
        tables.append(count_table("Flagged rows by what decided", "reason", facts.reasons, flagged, 20))
    if facts.errors:
        tables.append(count_table("Errors of all rows by class", "class", facts.errors, facts.num_images))
    if facts.policies:
        tables.append(count_table("Rows by policy", "policy", facts.policies, facts.num_images, 10))
    return section("catalog", "The catalog", Html(f'<div class="side">{"".join(tables)}</div>'))


def scores_section(facts: Facts) -> Html:
    """Distributions of match scores and of the score of every label."""
    parts = []
    for name, counts in facts.matches.items():
        shown = _MATCH_NAMES[name]
        parts.append(
            Html(
                f"<figure><figcaption>{shown.capitalize()} ({name}): {int(counts.sum()):,} rows</figcaption>"
                f"{histogram(counts, shown)}{details('Figures', bin_table(f'Rows by {shown}', counts))}</figure>"
            )
        )
    order = _labels_in_order(facts)
    rows = [_label_line(name, facts.labels[name]) for name in order[:MAX_LABELS]]
    heads = [
        "label",
        "#block",
        "#review",
        "#scored",
        "#not scored",
        "#review from",
        "#block from",
        "scores, 0 to 1 (root of the count)",
    ]
    return section(
        "scores",
        "Scores and decisions",
        Html(f'<div class="side">{"".join(parts)}</div>')
        if parts
        else paragraph(Html(_COSINES if facts.has_cosines_alone else "No row has a match score.")),
        heading("Labels"),
        table("Labels, the most flagged first", heads, rows)
        if rows
        else paragraph(Html("No row has labels: nothing was moderated.")),
        *_scale_notes([facts.labels[name] for name in order[:MAX_LABELS]]),
        _left_out(len(order) - len(rows), "more labels, flagged less often"),
    )


def new_section(facts: Facts, cards: Cards, is_known: bool) -> Html:
    """Rows that the run flagged.

    Args:
        is_known: whether it is known what was flagged before the run.
    """
    if not is_known:
        note = "Rows that this run wrote and that are flagged. What they were before cannot be told any more."
    else:
        note = "Rows that this run wrote, that are flagged, and that were not flagged before it."
    shown, _ = within([cards.card(facts.rows[image_id]) for image_id in facts.new], _SECTION_BYTES)
    return section(
        "new",
        "Newly flagged",
        paragraph(Html(note), _of(len(shown), facts.num_new, "blocked ones first, then by chance")),
        cards.cards(shown) if shown else NOTHING,
    )


def lowest_section(facts: Facts, cards: Cards) -> Html:
    """Rows whose text fits their image least."""
    if facts.lowest_by is None:
        words = Html("No row has a match score: the task match was not run.")
        return section("lowest", "Lowest match scores", paragraph(words))
    what = "the caller's text" if facts.lowest_by.startswith("text") else "the caption made for it"
    note = f" {_COSINES}" if facts.has_cosines_alone else ""
    shown, _ = within([cards.card(facts.rows[image_id]) for image_id in facts.lowest], _SECTION_BYTES)
    return section(
        "lowest",
        "Lowest match scores",
        paragraph(
            Html(f"Images that {what} fits least, the worst first.{note}"),
            _of(len(shown), facts.num_ranked, "the lowest"),
        ),
        cards.cards(shown),
    )


def labels_section(facts: Facts, cards: Cards) -> Html:
    """For each label, the rows with its highest scores."""
    blocks = []
    order = _labels_in_order(facts)
    for name in order[:MAX_LABELS]:
        label = facts.labels[name]
        found = [cards.card(facts.rows[image_id], {"score": number(score)}) for image_id, score in facts.examples[name]]
        words = Html(f"{label.num_block:,} block, {label.num_review:,} review, of {label.num_scored:,} scored.")
        blocks.append(Html(heading(text(name)) + paragraph(words) + (cards.cards(found) if found else "")))
    shown, _ = within(blocks, 2 * _SECTION_BYTES)
    note = f"The {NUM_PER_LABEL} highest scores of each label, flagged or not; the most flagged labels first."
    return section(
        "labels",
        "Examples per label",
        paragraph(Html(note)) if shown else paragraph(Html("No row has labels: nothing was moderated.")),
        *shown,
        _left_out(len(order) - len(shown), "more labels are not shown"),
    )


def duplicates_section(facts: Facts, cards: Cards, report: DuplicateReport | None, notes: Sequence[str]) -> Html:
    """Groups of images that are the same."""
    warnings = [paragraph(text(note, 1_000), kind="warn") for note in notes]
    if report is None:
        return section("duplicates", "Duplicates", *warnings)
    blocks = []
    for place, group in enumerate(report.groups[:MAX_GROUPS], start=1):
        members = [member for member in group.members[:MAX_MEMBERS] if member.image_id in facts.rows]
        kind = "equal bytes" if group.kind == "exact" else "alike by embedding"
        found = [
            cards.card(facts.rows[member.image_id], {"likeness": number(member.similarity, 3)}) for member in members
        ]
        title = heading(f"Group {place}: {len(group.members):,} images, {kind}")
        blocks.append(Html(title + cards.cards(found)))
    shown, _ = within(blocks, _SECTION_BYTES)
    alike = (
        ""  # only equal bytes were looked for
        if report.threshold is None
        else f"; images count as alike from a cosine of {report.threshold:g} with the first of their group"
    )
    count = (
        f"{report.num_duplicates:,} of {report.num_images:,} images repeat another one, in "
        f"{len(report.groups):,} groups{alike}."
    )
    some = f"Of each group at most {MAX_MEMBERS} images are shown. <code>vlmflow duplicates</code> lists all."
    return section(
        "duplicates",
        "Duplicates",
        *warnings,
        paragraph(Html(count), Html(some if report.groups else "")),
        *shown,
        _left_out(len(report.groups) - len(shown), "more groups are not shown"),
    )


def table_section(facts: Facts, cards: Cards) -> tuple[Html, int]:
    """All rows of the page in one table that filters and sorts; and how many these are."""
    by_cosine = facts.has_cosines_alone
    lines, num_cut = within([cards.line(row, by_cosine=by_cosine) for row in facts.rows.values()], _TABLE_BYTES)
    score = "cosine" if by_cosine else "match"
    heads = (
        "address", "picture", "decision", "flagged labels", f"title {score}", "title", f"caption {score}", "caption",
        "status", "on this page as", "first seen",
    )  # fmt: skip
    names = "".join(
        f'<th scope="col"{"" if head != "picture" else " class=still"}>'
        + (head if head == "picture" else f'<button type="button">{head}</button>')
        + "</th>"
        for head in heads
    )
    num_sampled = min(facts.num_images, NUM_SAMPLED)
    sampled = (
        "These are all rows of the catalog."
        if facts.num_images <= len(lines)
        else f"The table holds {len(lines):,} of {facts.num_images:,} rows: a uniform sample of {num_sampled:,}, "
        "and the rows shown above. Counts and distributions above are of all rows."
    )
    cut = f" {num_cut:,} more were left out to keep the page small." if num_cut else ""
    return section(
        "rows",
        "Rows",
        paragraph(Html(sampled + cut)),
        _filters(),
        Html(
            '<div class="scroll tall" role="region" tabindex="0" aria-label="Table of rows"><table id="table">'
            "<caption>Rows; a click on a column sorts by it</caption>"
            f"<thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        ),
    ), len(lines)


def _filters() -> Html:
    text_box = '<span><label for="f-text">Text</label> <input id="f-text" type="search" autocomplete="off"></span>'
    return Html(
        f'<div class="filters">{text_box}'
        + _choice("decision", "Decision", {name: name for name in DECISIONS})
        + _choice("status", "Status", {name: name for name in STATUSES})
        + _choice("sets", "Shown as", SETS)
        + '<button type="button" id="f-clear">Clear filters</button><p id="shown" role="status"></p></div>'
    )


def _choice(name: str, title: str, options: Mapping[str, str]) -> Html:
    inner = "".join(f'<option value="{value}">{shown}</option>' for value, shown in options.items())
    box = f'<select id="f-{name}"><option value="">all</option>{inner}</select>'
    return Html(f'<span><label for="f-{name}">{title}</label> {box}</span>')


def _label_line(name: str, label: LabelFacts) -> Sequence[Html]:
    limits = {"review": label.reviews, "block": label.blocks}
    lines = {decision: next(iter(values)) for decision, values in limits.items() if len(values) == 1}
    return (
        text(name),
        text(label.num_block),
        text(label.num_review),
        text(label.num_scored),
        text(label.num_unscored),
        *(_threshold(values) for values in limits.values()),
        label_histogram(label.counts, text(name), lines),
    )


def _threshold(values: set[float | None]) -> Html:
    return text(_DIFFERS) if len(values) > 1 else number(next(iter(values), None))


def _scale_notes(labels: Sequence[LabelFacts]) -> Iterator[Html]:
    """What is to be known of labels whose rows are not on one scale."""
    if any(len(values) > 1 for label in labels for values in (label.reviews, label.blocks)):
        words = (
            f"{_DIFFERS.capitalize()}: rows of the label have different thresholds, being under several policies, or "
            "fed by a detector and prompts. No line marks these."
        )
        yield paragraph(Html(words))
    if mixed := sum(len(label.calibrated) > 1 for label in labels):
        words = (
            "Labels whose bars hold both probabilities and scores that are not calibrated, for the same reason: "
            f"{mixed:,}. The two do not compare."
        )
        yield paragraph(Html(words))


def _labels_in_order(facts: Facts) -> list[str]:
    return sorted(facts.labels, key=lambda name: (-facts.labels[name].num_flagged, name))


def _of(shown: int, total: int, how: str) -> Html:
    if not total:
        return Html("There are none.")
    return Html(f"All {total:,} are shown." if shown >= total else f"{shown:,} of {total:,} are shown: {how}.")


def _left_out(count: int, what: str) -> Html:
    return paragraph(Html(f"{count:,} {what}.")) if count > 0 else NOTHING
