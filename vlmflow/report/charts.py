"""Charts as inline SVG. Figures are in tables beside them; a chart has a name and no text from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlmflow.report.html import Html, table, text
from vlmflow.report.labels import NUM_BINS, Counts

_WIDTH, _HEIGHT, _LEFT, _TOP = 320, 110, 4, 14
_SMALL = 48


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


def histogram(counts: Counts, name: str) -> Html:
    """A distribution over [0, 1], with its axis.

    Args:
        counts: (NUM_BINS,).
        name: what it is of: our own words, or text made safe.
    """
    high = _HEIGHT - _TOP - 16
    most = int(counts.max())
    shapes = _bars(counts / max(1, most), top=_TOP, high=high)
    for value, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        shapes.append(f'<text x="{_x(value):.0f}" y="{_HEIGHT - 3}" text-anchor="{anchor}">{value:g}</text>')
    shapes.append(f'<text x="{_LEFT}" y="10">most in a bar: {most:,}</text>')
    return _svg(shapes, _HEIGHT, f"Distribution of {name}: {int(counts.sum()):,} values")


def label_histogram(counts: Counts, name: str, thresholds: Mapping[str, float | None]) -> Html:
    """A distribution over [0, 1] for a cell, with the thresholds of decisions. Bars grow with the root of the count:
    most scores are near 0, and those near a threshold are what a person looks for.

    Args:
        thresholds: where each decision starts; None: nowhere.
    """
    shapes = _bars((counts / max(1, int(counts.max()))) ** 0.5, top=2, high=_SMALL - 4)
    said = []
    for decision, at in thresholds.items():
        if at is not None:
            x = f"{_x(min(max(at, 0.0), 1.0)):.1f}"
            shapes.append(f'<line class="mark {_kind(decision)}" x1="{x}" x2="{x}" y1="0" y2="{_SMALL}"/>')
            said.append(f"; {decision} from {at:.2f}")
    return _svg(shapes, _SMALL, f"Distribution of scores of {name}: {int(counts.sum()):,} values{''.join(said)}")


def _bars(shares: NDArray[np.float64], *, top: float, high: float) -> list[str]:
    step = (_WIDTH - 2 * _LEFT) / NUM_BINS
    shapes = []
    for place, share in enumerate(shares.tolist()):
        # What is rare stays visible: a bar of one pixel.
        height = max(1.0, high * share) if share else 0.0
        shapes.append(
            f'<rect class="bar" x="{_LEFT + place * step + 0.5:.1f}" y="{top + high - height:.1f}" '
            f'width="{step - 1:.1f}" height="{height:.1f}"/>'
        )
    base = top + high
    return [*shapes, f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{base}" y2="{base}"/>']


def _x(value: float) -> float:
    return _LEFT + value * (_WIDTH - 2 * _LEFT)


def _svg(shapes: Sequence[str], height: int, label: str) -> Html:
    return Html(
        f'<svg class="hist" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" '
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
