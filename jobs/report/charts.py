"""Charts of a report as inline SVG: coloured by the page's style, read out by their titles."""

from __future__ import annotations

import datetime as dt
import math

from markupsafe import Markup, escape

from hqlabel.jobs.report.numbers import Histogram, Pace
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import count

_WIDTH, _HEIGHT, _FOOT = 320, 110, 16


def histogram(data: Histogram, line: float | None) -> Markup:
    """Bars of all and, over them, of the accepted; `line`: the filter's bound, in the axis' unit."""
    most = max(*data.counts, 1)
    step = _WIDTH / len(data.counts)
    marks = []
    for place, (number, accepted) in enumerate(zip(data.counts, data.accepted, strict=True)):
        if not number:
            continue
        low, high = _edges(data, place)
        title = f"{low} to {high}: {number:,}" + (f", {accepted:,} accepted" if accepted else "")
        marks.append(f"<g><title>{title}</title>{_bar(place * step, step, number, most, 'all')}")
        marks.append((_bar(place * step, step, accepted, most, "kept") if accepted else "") + "</g>")
    if line is not None:
        at = (math.log10(max(line, 1)) if data.log else line) - data.low
        x = _WIDTH * min(max(at / (data.high - data.low), 0), 1)
        marks.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"/>')
    name = f"Histogram of {data.name}: {sum(data.counts):,} values, most in one bin {most:,}"
    return _svg("".join(marks), name, (_edges(data, 0)[0], _edges(data, len(data.counts) - 1)[1]))


def bars(pace: Pace) -> Markup:
    """Return images finished in each span of time."""
    most = max([*pace.counts, 1])
    step = _WIDTH / len(pace.counts)
    marks = []
    for place, number in enumerate(pace.counts):
        when = dt.datetime.fromtimestamp(pace.start_s + place * pace.span_s, dt.UTC)
        title = f"{when:%Y-%m-%d %H:%M:%S} UTC: {count(number, 'image')}"
        marks.append(f"<g><title>{title}</title>{_bar(place * step, step, number, most, 'kept')}</g>")
    start, stop = (
        dt.datetime.fromtimestamp(at, dt.UTC)
        for at in (pace.start_s, pace.start_s + pace.span_s * len(pace.counts))
    )
    name = f"Images finished over time, up to {most:,} in {console.duration(pace.span_s)}"
    return _svg("".join(marks), name, (f"{start:%m-%d %H:%M:%S}", f"{stop:%m-%d %H:%M:%S}"))


def _edges(data: Histogram, place: int) -> tuple[str, str]:
    width = (data.high - data.low) / len(data.counts)
    low, high = data.low + place * width, data.low + (place + 1) * width
    if data.log:
        return f"{10**low:,.0f}", f"{10**high:,.0f}"
    return f"{low:g}" if width >= 1 else f"{low:.3g}", f"{high:g}" if width >= 1 else f"{high:.3g}"


def _bar(x: float, width: float, number: int, most: int, kind: str) -> str:
    height = max(_HEIGHT * number / most, 0.75 if number else 0)
    return (
        f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{_HEIGHT - height:.1f}" '
        f'width="{max(width - 1, 0.6):.1f}" height="{height:.1f}"/>'
    )


def _svg(marks: str, name: str, ends: tuple[str, str]) -> Markup:
    foot = _HEIGHT + _FOOT - 4
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" role="img" aria-label="{escape(name)}">{marks}'
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
        f'<text x="0" y="{foot}">{escape(ends[0])}</text>'
        f'<text x="{_WIDTH}" y="{foot}" text-anchor="end">{escape(ends[1])}</text></svg>'
    )
