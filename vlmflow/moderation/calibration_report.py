"""A calibration as one HTML file: tables and drawings inline, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlmflow.moderation.calibrate import CalibrationReport, LabelReport
from vlmflow.moderation.fit import Estimate, Rates

_WIDTH, _HEIGHT, _MARGIN = 300, 220, 34
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#1a1a1a}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}
th{font-weight:600;border-bottom:1px solid #999}td.n{text-align:right;font-variant-numeric:tabular-nums}
.w{background:#fff4d6;border-left:4px solid #c98a00;padding:.3em .8em;margin:.3em 0}
.r{background:#fde2e0;border-left:4px solid #b3261e;padding:.3em .8em;margin:.3em 0}
figure{display:inline-block;margin:.5em 1em .5em 0}figcaption{font-size:13px;color:#555;max-width:300px}
svg text{font-size:11px;fill:#444}
"""

Point = tuple[float, float]


def calibration_html(report: CalibrationReport) -> str:
    """The report as a page. Every word from outside is escaped."""
    title = f"Calibration of {report.policy}"
    facts = {
        "catalog": report.catalog,
        "verdicts": f"{report.verdicts}: {report.num_verdicts:,} on {report.num_images:,} images"
        + (", weighted" if report.is_weighted else ""),
        "model": report.model,
        "new policy": f"{report.new_policy}, in {report.output}",
        "left out": ", ".join(f"{reason}: {num:,}" for reason, num in report.left_out.items()) or "none",
    }
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _table([], [[name, value] for name, value in facts.items()]),
        *(f'<p class="w">{escape(text)}</p>' for text in report.warnings),
        "<p>Curves are Platt's logistic; thresholds are where precision and recall expected under the curve reach "
        "their targets. Brackets hold 95% intervals: of counted shares by Wilson, of the rest by the bootstrap over "
        "images (percentiles). Counts before and after are of the verdicts that the curve was fitted to: new images "
        "will do a little worse.</p>",
        _overview(report.labels),
        *(_label(label) for label in report.labels),
        "</body></html>",
    ]
    return "\n".join(parts)


def _overview(labels: Sequence[LabelReport]) -> str:
    heads = ["label", "verdicts +/-", "review", "block", "precision at block", "recall at review"]
    rows = []
    for label in labels:
        counts = f"{label.num_positive:,} / {label.num_negative:,}"
        if label.fit is None:
            rows.append([label.label, counts, *["left as it was"] * 2, "", ""])
            continue
        block, review = label.after["block"], label.after["review"]
        rows.append(
            [
                label.label,
                counts,
                f"{label.thresholds.review:.3f}",
                "never" if label.thresholds.block is None else f"{label.thresholds.block:.3f}",
                _share(block.precision, block.precision_interval),
                _share(review.recall, review.recall_interval),
            ]
        )
    return _table(heads, rows)


def _label(label: LabelReport) -> str:
    parts = [f"<h2>{escape(f'{label.category}/{label.label}')}</h2>"]
    if label.fit is None:
        parts.append(f'<p class="r">Left as it was: {escape(label.refused or "")}</p>')
        return "\n".join(parts)
    parts += [f'<p class="w">{escape(text)}</p>' for text in label.warnings]
    fit = label.fit
    targets = {
        f"block, precision {label.target_precision:g}": (fit.block, fit.block_margin),
        f"review, recall {label.target_recall:g}": (fit.review, fit.review_margin),
    }
    rows = [[name, _estimate(one), _estimate(margin)] for name, (one, margin) in targets.items()]
    parts.append(_table(["threshold where it reaches", "probability", "margin"], rows))
    parts.append(_table(["curve", "value"], [["scale", _estimate(fit.scale)], ["offset", _estimate(fit.offset)]]))
    parts.append(_before_after(label))
    parts += [_pr_figure(label), _reliability_figure(label), _histogram_figure(label)]
    return "\n".join(parts)


def _before_after(label: LabelReport) -> str:
    rows = []
    for name in ("review", "block"):
        for when, rates in (("before", label.before[name]), ("after", label.after[name])):
            caught = f"{rates.num_found:,} of {rates.num_flagged:,} flagged"
            rows.append([f"{name}, {when}", *_rates(rates), caught])
    return _table(["at", "precision", "recall", "positive"], rows)


def _rates(rates: Rates) -> list[str]:
    return [_share(rates.precision, rates.precision_interval), _share(rates.recall, rates.recall_interval)]


def _share(share: float | None, interval: tuple[float, float] | None) -> str:
    if share is None or interval is None:
        return "-"
    return f"{share:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _estimate(estimate: Estimate) -> str:
    value, low, high = (
        "never" if abs(x) == float("inf") else f"{x:.4g}" for x in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _pr_figure(label: LabelReport) -> str:
    line = _line(label.curve, "#1d5fa8")
    marks = []
    for name, color in (("review", "#c98a00"), ("block", "#b3261e")):
        rates = label.after[name]
        if rates.precision is not None and rates.recall is not None:
            marks.append(_dot((rates.recall, rates.precision), color, name))
    body = line + "".join(marks)
    return _figure("recall", "precision", body, "Precision against recall, counted. Dots: the new thresholds.")


def _reliability_figure(label: LabelReport) -> str:
    parts = [_line(((0, 0), (1, 1)), "#bbb")]
    for bin_ in label.reliability:
        parts.append(_line(((bin_.probability, bin_.low), (bin_.probability, bin_.high)), "#7a9cc4"))
        parts.append(_dot((bin_.probability, bin_.share), "#1d5fa8", f"{bin_.num:,}"))
    caption = "Share that was positive against the probability; numbers: images; bars: 95% intervals."
    return _figure("probability", "share positive", "".join(parts), caption)


def _histogram_figure(label: LabelReport) -> str:
    edges, positive, negative = label.histogram
    low, width = edges[0], (edges[-1] - edges[0]) or 1.0
    highest = max(*positive, *negative, 1)
    bars = []
    for counts, color in ((negative, "#999"), (positive, "#b3261e")):
        for number, count in enumerate(counts):
            if count:
                left, right = ((edge - low) / width for edge in edges[number : number + 2])
                (x, y), (x2, y0) = _at((left, count / highest)), _at((right, 0))
                bars.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{x2 - x:.1f}" height="{y0 - y:.1f}" fill="{color}" '
                    'fill-opacity=".55"/>'
                )
    caption = "Images by margin: grey negative, red positive."
    ticks = (f"{low:.3f}", f"{low + width:.3f}")
    return _figure("margin", "images", "".join(bars), caption, x_ticks=ticks, y_ticks=("0", f"{highest:,}"))


def _figure(
    x_name: str,
    y_name: str,
    body: str,
    caption: str,
    *,
    x_ticks: tuple[str, str] = ("0", "1"),
    y_ticks: tuple[str, str] = ("0", "1"),
) -> str:
    (left, bottom), (right, top) = _at((0, 0)), _at((1, 1))
    texts = [
        (left, bottom + 14, "middle", x_ticks[0]),
        (right, bottom + 14, "middle", x_ticks[1]),
        ((left + right) / 2, bottom + 26, "middle", x_name),
        (left - 5, bottom, "end", y_ticks[0]),
        (left - 5, top + 4, "end", y_ticks[1]),
        (left, top - 8, "start", y_name),
    ]
    frame = f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>'
    words = "".join(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{a}">{escape(t)}</text>' for x, y, a, t in texts)
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    svg = f'<svg {size} role="img">{frame}{body}{words}</svg>'
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _at(point: Point) -> Point:
    """From the unit square to the drawing."""
    return _MARGIN + point[0] * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - point[1] * (_HEIGHT - 2 * _MARGIN)


def _line(points: Sequence[Point], color: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(_at, points))
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'


def _dot(point: Point, color: str, text: str) -> str:
    x, y = _at(point)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>'
        f'<text x="{x + 5:.1f}" y="{y - 4:.1f}">{escape(text)}</text>'
    )
