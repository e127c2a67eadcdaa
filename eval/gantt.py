"""When each phase of a few steps worked: a strip with a lane for sampling, scoring, sending weights and training.

Of each stage in which the student speaks the first steps, some in the middle and the last ones. Bars of neighbouring
steps differ in strength, so that it shows which batch a phase was busy with while another was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from eval.figure import short
from eval.page import Chart, Document, named, percent
from eval.visible import visible

LANES = {"sample": ("sample", 0), "score": ("score", 1), "sync": ("weights", 3), "train": ("train", 2)}
"""A phase's name in the margin, and its colour in the page."""
NUM_STEPS = 4
"""Steps in one strip."""

WIDTH, LEFT, RIGHT, TOP, LANE, BAR = 400, 54, 10, 4, 22, 15
_LEAST = 0.6
"""Width of the narrowest bar."""


def gantt_charts(metrics: Sequence[Document]) -> list[Chart]:
    """A figure for each strip; none for runs of before phases were recorded."""
    charts = []
    for stage, rows in groupby(metrics, key=lambda row: str(row["stage"])):
        shown = [row for row in rows if row.get("timeline") and "staleness" in row]
        charts += [_chart(stage, strip) for strip in strips(shown)]
    return charts


def strips(rows: Sequence[Document]) -> list[list[Document]]:
    """The rows of each strip: the first, the middle and the last ones, and none of them twice.

    A resumed process has a clock of its own: a strip ends where the next row's is another one.
    """
    num = len(rows)
    if num <= 3 * NUM_STEPS:
        wanted = list(range(num))
    else:
        starts = (0, (num - NUM_STEPS) // 2, num - NUM_STEPS)
        wanted = [start + place for start in starts for place in range(NUM_STEPS)]
    found: list[list[Document]] = []
    for place in wanted:
        last = found[-1] if found else None
        follows = last is not None and last[-1] is rows[place - 1] and _end(last[-1]) <= _end(rows[place])
        if last is None or not follows or len(last) == NUM_STEPS:
            found.append([])
        found[-1].append(rows[place])
    return found


def overlap(rows: Sequence[Document]) -> float:
    """The seconds of the busiest phase over those of the steps, all steps together.

    One batch ahead, a batch's phases lie in the times of several steps: the mean of the steps' own figures would count
    a long phase beside a short step.
    """
    busiest = max(sum(row[f"busy.{phase}"] for row in rows) for phase in LANES)
    return float(busiest / sum(row["seconds"] for row in rows))


def _end(row: Mapping[str, Any]) -> float:
    """When everything of a step had been done."""
    return max((span[1] for spans in row["timeline"].values() for span in spans), default=0.0)


def _chart(stage: str, rows: Sequence[Document]) -> Chart:
    first, last = rows[0]["step"], rows[-1]["step"]
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    title = f"{named(stage)}, {steps}: overlap {percent(overlap(rows), 0)}"
    return Chart(title, {"steps": strip(title, rows)})


def strip(title: str, rows: Sequence[Document]) -> Markup:
    """An SVG element with the lanes that the rows worked in; its text alternative has each phase's mean seconds."""
    lanes = {phase: lane for phase, lane in LANES.items() if any(row["timeline"].get(phase) for row in rows)}
    spans = [span for row in rows for lane in row["timeline"].values() for span in lane]
    begin, end = min((span[0] for span in spans), default=0.0), max((span[1] for span in spans), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / ((end - begin) or 1.0)
    bottom = TOP + LANE * len(lanes)
    parts = []
    for tick in _ticks(end - begin):
        x = LEFT + tick * scale
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{short(tick)} s</text>')
    for lane, (phase, (name, colour)) in enumerate(lanes.items()):
        top = TOP + lane * LANE + (LANE - BAR) / 2
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{top + BAR - 3:.1f}" text-anchor="end">{name}</text>')
        for row in rows:
            strength = "weak" if row["step"] % 2 else "strong"
            for start, stop in row["timeline"].get(phase, ()):
                x, width = LEFT + (start - begin) * scale, max((stop - start) * scale, _LEAST)
                said = f"{name}, step {row['step']}: {short(start - begin)} to {short(stop - begin)} s"
                parts.append(
                    f'<rect class="s{colour} {strength}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BAR}">'
                    f"<title>{said}</title></rect>"
                )
    means = ", ".join(
        f"{name} {short(sum(row[f'busy.{phase}'] for row in rows) / len(rows))} s" for phase, (name, _) in lanes.items()
    )
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + 20}" role="img" '
        f'aria-label="{escape(visible(title))}; busy a step: {means}">'
        f"{''.join(parts)}</svg>"
    )


def _ticks(length: float) -> list[float]:
    """Round seconds from zero on, five or six of them."""
    if length <= 0:
        return [0.0]
    unit = 10.0**-12
    for power in range(-6, 12):
        for factor in (1, 2, 5):
            unit = factor * 10.0**power
            if length / unit <= 6:
                return [place * unit for place in range(int(length / unit) + 1)]
    return [0.0, unit]
