"""Charts as inline SVG. Figures are in tables beside them; a chart has a name and no text from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmflow.report.html import Html, table, text
from vlmflow.report.labels import NUM_BINS, Counts

_WIDTH, _HEIGHT, _LEFT, _TOP = 320, 110, 4, 14


def bar(value: float, most: float, kind: str = "") -> Html:
    """A horizontal bar for a cell beside the figure, hidden from those who hear the figure.

    Args:
        kind: a decision, which has its colour; else none.
    """
    width = 0.0 if most <= 0 else 120 * value / most
    shape = f'<rect class="bar {kind}" width="{max(width, 1.0 if value else 0.0):.1f}" height="10" rx="2"/>'
    return Html(f'<svg class="barcell" width="120" height="10" aria-hidden="true" focusable="false">{shape}</svg>')


def count_table(caption: str, what: str, counts: Mapping[str, int], total: int, limit: int = 50) -> Html:
    """Counts with bars and shares, the most frequent first; past ``limit``, the others in one line."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [(text(name), name, count) for name, count in order[:limit]]
    rest = sum(count for _, count in order[limit:])
    if rest:
        shown.append((text(f"{len(order) - limit:,} others"), "", rest))
    most = max((count for _, _, count in shown), default=0)
    rows = [
        (head, text(count), Html(f"{count / max(1, total):.1%}"), bar(count, most, _kind(name)))
        for head, name, count in shown
    ]
    return table(caption, [what, "#images", "#share", '<span class="hidden">bar</span>'], rows)


def histogram(counts: Counts, name: str, marks: Sequence[tuple[str, float | None]] = ()) -> Html:
    """A distribution over [0, 1].

    Args:
        counts: (NUM_BINS,).
        name: what it is of: our own words, or text made safe.
        marks: thresholds, each with the decision that starts there; None: there is none.
    """
    most = int(counts.max()) or 1
    step = (_WIDTH - 2 * _LEFT) / NUM_BINS
    high = _HEIGHT - _TOP - 16
    shapes = []
    for place, count in enumerate(counts.tolist()):
        # What is rare stays visible: a bar of one pixel.
        height = max(1.0, high * count / most) if count else 0.0
        shapes.append(
            f'<rect class="bar" x="{_LEFT + place * step + 0.5:.1f}" y="{_TOP + high - height:.1f}" '
            f'width="{step - 1:.1f}" height="{height:.1f}"/>'
        )
    base = _TOP + high
    shapes.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{base}" y2="{base}"/>')
    for value, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = _LEFT + value * (_WIDTH - 2 * _LEFT)
        shapes.append(f'<text x="{x:.0f}" y="{_HEIGHT - 3}" text-anchor="{anchor}">{value:g}</text>')
    shapes.append(f'<text x="{_LEFT}" y="10">most in a bar: {most:,}</text>')
    said = []
    for decision, at in marks:
        if at is None:
            continue
        x = _LEFT + min(max(at, 0.0), 1.0) * (_WIDTH - 2 * _LEFT)
        shapes.append(f'<line class="mark {_kind(decision)}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
        said.append(f"{decision} from {at:.2f}")
    label = f"Distribution of {name}: {int(counts.sum()):,} values" + "".join(f"; {words}" for words in said)
    return Html(
        f'<svg class="hist" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(shapes)}</svg>'
    )


def bin_table(caption: str, counts: Counts) -> Html:
    """The figures of a histogram."""
    rows = [
        (Html(f"{place / NUM_BINS:.2f} to {(place + 1) / NUM_BINS:.2f}"), text(count))
        for place, count in enumerate(counts.tolist())
        if count
    ]
    return table(caption, ["score", "#images"], rows)


def _kind(name: str) -> str:
    return name if name in ("allow", "review", "block") else ""
