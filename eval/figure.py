"""Line charts as inline SVG: no library, no script, colours from the page's style sheet so that they suit its theme.

The classes `s0` to `s5` are the series' colours, `axis`, `grid`, `boundary` the furniture; the page defines them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 14, 24
MOST_POINTS = 300
"""Points of a line; longer ones are averaged in groups, which no screen can tell apart."""

NUM_COLOURS = 6
LOG_FROM = 60.0
"""The ratio of largest to smallest value from which an axis of positive values is logarithmic."""


@dataclass(frozen=True, slots=True)
class Series:
    """A named line in pieces: between two pieces (two stages) nothing is drawn. ``colour`` is 0 to 5."""

    label: str
    pieces: tuple[tuple[Point, ...], ...]
    colour: int


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    boundaries: Sequence[tuple[float, str]] = (),
    share: bool = False,
    doubling: bool = False,
) -> Markup:
    """An SVG element with the lines of ``series``.

    ``boundaries`` are places on the x axis where a stage begins. ``share`` draws 0 to 1 whatever the values are, so
    that charts compare; ``doubling`` makes each doubling of x equally wide.
    """
    points = [point for line in series for piece in line.pieces for point in piece]
    assert points, "a chart needs a point"
    x_axis = _x_axis([x for x, _ in points] + [x for x, _ in boundaries], log=doubling)
    y_axis = _Axis(0.0, 1.0, False, HEIGHT - BOTTOM, TOP) if share else _y_axis([y for _, y in points])
    parts = [*_furniture(x_axis, y_axis), *_stages(x_axis, boundaries)]
    for line in series:
        for piece in line.pieces:
            parts.append(_line(line, [(x_axis(x), y_axis(y)) for x, y in _thinned(piece)]))
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def short(value: float) -> str:
    """A number for an axis: at most four characters of digits, thousands as k, M, G, T."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < size < 1e-3 else f"{value:.4g}"


def _x_axis(values: Sequence[float], *, log: bool) -> _Axis:
    low, high = min(values), max(values)
    return _Axis(low, high if high > low else low + 1, log, LEFT, WIDTH - RIGHT)


def _y_axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_FROM:
        return _Axis(low, high, True, HEIGHT - BOTTOM, TOP)
    # Shares and lengths are read against zero where zero is near.
    if 0 <= low < 0.7 * high:
        low = 0.0
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    ticks = _ticks(low, high)
    return _Axis(min(low, ticks[0]), max(high, ticks[-1]), False, HEIGHT - BOTTOM, TOP)


def _ticks(low: float, high: float) -> list[float]:
    """Round values in steps of 1, 2 or 5 that span ``low`` to ``high`` with four or so steps."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round(count * step, 12) for count in range(first, math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 3) if len(decades) <= 4 else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]


def _doublings(axis: _Axis) -> list[float]:
    return [2.0**power for power in range(math.ceil(math.log2(axis.low)), math.floor(math.log2(axis.high)) + 1)]


def _furniture(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in _log_ticks(y_axis.low, y_axis.high) if y_axis.log else _ticks(y_axis.low, y_axis.high):
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in _doublings(x_axis) if x_axis.log else _ticks(x_axis.low, x_axis.high):
        if x_axis.low <= tick <= x_axis.high and tick == int(tick):
            # The last label stays within the picture.
            anchor = "end" if x_axis(tick) > WIDTH - RIGHT - 12 else "middle"
            x = f"{x_axis(tick):.1f}"
            parts.append(f'<text class="axis" x="{x}" y="{HEIGHT - 7}" text-anchor="{anchor}">{short(tick)}</text>')
    return parts


def _stages(x_axis: _Axis, boundaries: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    ends = [*(x for x, _ in boundaries), x_axis.high][1:]
    for place, ((x, label), end) in enumerate(zip(boundaries, ends, strict=True)):
        if place:
            parts.append(f'<path class="boundary" d="M{x_axis(x):.1f} {TOP - 10}V{HEIGHT - BOTTOM}"/>')
        # A name that is wider than its stage would run into the next one.
        if x_axis(end) - x_axis(x) > 6.2 * len(label):
            parts.append(f'<text class="stage" x="{x_axis(x) + 4:.1f}" y="{TOP - 4}">{escape(label)}</text>')
    return parts


def _line(line: Series, points: Sequence[Point]) -> str:
    name = escape(line.label)
    if len(points) == 1:
        (x, y) = points[0]
        return f'<circle class="s{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{name}</title></circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="s{line.colour}" points="{path}"><title>{name}</title></polyline>'


def _thinned(piece: Sequence[Point]) -> list[Point]:
    group = math.ceil(len(piece) / MOST_POINTS)
    groups = [piece[start : start + group] for start in range(0, len(piece), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in groups]
