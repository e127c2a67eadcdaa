"""Line charts as inline SVG: no library, no script, colours from the page's style sheet so that they suit its theme.

The classes `s0` to `s5` are the series' colours, `axis`, `grid`, `boundary` the furniture; the page defines them, and
how `dashed`, `thin` and `thick` lines are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from eval.visible import visible

Point = tuple[float, float]

WIDTH, HEIGHT, NAME_HEIGHT = 400, 220, 16
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 14, 24
MOST_POINTS = 300
"""Points of a line; longer ones are averaged in groups, which no screen can tell apart."""

NUM_COLOURS = 6
LOG_FROM = 60.0
"""The ratio of largest to smallest value from which an axis of positive values is logarithmic."""


@dataclass(frozen=True, slots=True)
class Series:
    """A named line in pieces: between two pieces (two stages) nothing is drawn. ``colour`` is 0 to 5.

    ``band`` holds (x, low, high) of the interval around the line. ``style`` is a class of the page's style sheet.
    """

    label: str
    pieces: tuple[tuple[Point, ...], ...]
    colour: int
    band: tuple[tuple[float, float, float], ...] = ()
    style: str = ""


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
    decades: bool = False,
    x_name: str = "",
) -> Markup:
    """An SVG element with the lines of ``series``.

    ``boundaries`` are places on the x axis where a stage begins. ``share`` draws 0 to 1 whatever the values are, so
    that charts compare; ``doubling`` makes each doubling of x equally wide, and labels it, ``decades`` each tenfold.
    ``x_name`` stands below the x axis.
    """
    points = [point for line in series for piece in line.pieces for point in piece]
    assert points, "a chart needs a point"
    x_axis = _x_axis([x for x, _ in points] + [x for x, _ in boundaries], log=doubling or decades)
    y_axis = _Axis(0.0, 1.0, False, HEIGHT - BOTTOM, TOP) if share else _y_axis([y for _, y in points])
    ticks = _doublings(x_axis) if doubling else _log_ticks(x_axis.low, x_axis.high) if decades else None
    parts = [*_furniture(x_axis, y_axis, ticks), *_stages(x_axis, boundaries)]
    parts += [_band(line, x_axis, y_axis) for line in series if line.band]
    for line in series:
        for piece in line.pieces:
            parts.append(_line(line, [(x_axis(x), y_axis(y)) for x, y in _thinned(piece)]))
    if x_name:
        x, y = (LEFT + WIDTH - RIGHT) // 2, HEIGHT + 8
        parts.append(f'<text class="axis" x="{x}" y="{y}" text-anchor="middle">{_text(x_name)}</text>')
    height = HEIGHT + NAME_HEIGHT if x_name else HEIGHT
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(text: str) -> Markup:
    return escape(visible(text))


def short(value: float) -> str:
    """A number for an axis: at most four characters of digits, thousands as k, M, G, T, P, E, Z, Y."""
    size = abs(value)
    units = ("Y", 1e24), ("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)
    for unit, limit in units:
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


def _furniture(x_axis: _Axis, y_axis: _Axis, x_ticks: Sequence[float] | None) -> list[str]:
    parts = []
    for tick in _log_ticks(y_axis.low, y_axis.high) if y_axis.log else _ticks(y_axis.low, y_axis.high):
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in _ticks(x_axis.low, x_axis.high) if x_ticks is None else x_ticks:
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
            parts.append(f'<text class="stage" x="{x_axis(x) + 4:.1f}" y="{TOP - 4}">{_text(label)}</text>')
    return parts


def _line(line: Series, points: Sequence[Point]) -> str:
    name, classes = _text(line.label), f"s{line.colour} {line.style}".strip()
    if len(points) == 1:
        (x, y) = points[0]
        return f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{name}</title></circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{classes}" points="{path}"><title>{name}</title></polyline>'


def _band(line: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    there = [(x_axis(x), y_axis(low)) for x, low, _ in line.band]
    back = [(x_axis(x), y_axis(high)) for x, _, high in reversed(line.band)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in there + back)
    return f'<polygon class="s{line.colour}" points="{corners}"/>'


def _thinned(piece: Sequence[Point]) -> list[Point]:
    group = math.ceil(len(piece) / MOST_POINTS)
    groups = [piece[start : start + group] for start in range(0, len(piece), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in groups]
