"""The learning curves of a run: scores and every metric against steps, tokens and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup

from distill.types import MODES, Mode
from eval.figure import NUM_COLOURS, Series, line_chart
from eval.page import MODE_NAMES, Chart, Document, named
from eval.run_files import RunFiles, has_budget

TITLES = {
    "loss": "Loss",
    "reward": "Share of sampled responses that are right",
    "reverse_kl": "Reverse KL to the teacher (nats a token)",
    "forward_kl": "Forward KL to the teacher (nats a token)",
    "topk_reverse_kl": "Reverse KL to the teacher, lower bound (nats a token)",
    "estimated_reverse_kl": "Reverse KL to the teacher, estimated (nats a token)",
    "student_entropy": "The student's entropy (nats a token)",
    "teacher_entropy": "The teacher's entropy (nats a token)",
    "length": "Response length (tokens)",
    "closure": "Share with closed thinking",
    "truncation": "Share truncated",
    "repetition": "Share of repeated 4-grams",
}
"""The charts that are always shown, in this order; every other metric is in a fold below them."""

AXES = {"steps": "optimiser steps", "tokens": "tokens, all roles", "flops": "FLOPs, all roles"}

_SHARES = {"reward", "closure", "truncation", "repetition", "forced"}
_NOT_METRICS = {"stage", "step", "global_step"}


@dataclass(frozen=True, slots=True)
class Places:
    """Where the run stood on each x axis: after each line of metrics.jsonl, and where each stage began.

    What a stage spent before its first step (the teacher's responses) counts from its beginning on.
    """

    after: Mapping[str, Sequence[float]]
    begun: Mapping[str, Sequence[tuple[float, str]]]

    @classmethod
    def of(cls, run: RunFiles) -> Places:
        counts: dict[str, Callable[[Document], float]] = {"steps": lambda row: 1.0}
        # Runs of before these were recorded have steps alone.
        if all("flops" in row for row in run.metrics):
            counts["tokens"] = lambda row: sum(v for key, v in row.items() if key.startswith("tokens."))
            counts["flops"] = lambda row: row["flops"]
        after: dict[str, list[float]] = {axis: [] for axis in counts}
        begun: dict[str, list[tuple[float, str]]] = {axis: [] for axis in counts}
        for axis, of in counts.items():
            total = 0.0
            for stage, rows in groupby(run.metrics, key=lambda row: str(row["stage"])):
                steps = list(rows)
                begun[axis].append((total if axis != "steps" else total + 1, stage))
                total += _before_steps(run.costs, stage, axis)
                for row in steps:
                    total += of(row)
                    after[axis].append(total)
        return cls(after, begun)


def _before_steps(costs: Mapping[str, Any], stage: str, axis: str) -> float:
    spent = (cost["stages"].get(stage, {}) for role, cost in costs.items() if role.startswith("teacher_generate"))
    return 0.0 if axis == "steps" else sum(float(cost.get(axis, 0.0)) for cost in spent)


def metric_charts(run: RunFiles, places: Places, *, main: bool) -> list[Chart]:
    """A chart for each quantity: both modes together where it is known by mode.

    The main ones are there against every axis, the others against steps.
    """
    metrics = run.metrics
    keys = list(dict.fromkeys(key for row in metrics for key, value in row.items() if _is_number(value)))
    groups: dict[str, list[str]] = {}
    for key in keys:
        if key not in _NOT_METRICS:
            groups.setdefault(_group(key), []).append(key)
    names = [name for name in TITLES if name in groups] if main else sorted(groups.keys() - TITLES.keys())
    charts = []
    for name in names:
        # Where a quantity is there by mode, its mixture of both says nothing more.
        by_mode = [key for key in groups[name] if key.partition(".")[0] in MODES]
        shown = (by_mode or groups[name])[:NUM_COLOURS]
        title = TITLES.get(name, name.replace("_", " "))
        views: dict[str, Markup] = {}
        legend: tuple[tuple[int, str, str], ...] = ()
        for axis in AXES if main else ("steps",):
            if axis not in places.after:
                continue
            series = [
                Series(_label(key), _pieces(metrics, places.after[axis], key), _colour(key, place))
                for place, key in enumerate(shown)
            ]
            boundaries = [(x, named(stage)) for x, stage in places.begun[axis]]
            views[axis] = line_chart(title, series, boundaries=boundaries, share=name in _SHARES, x_name=AXES[axis])
            legend = tuple((line.colour, "", line.label) for line in series) if len(series) > 1 else ()
        charts.append(Chart(title, views, legend))
    return charts


def score_charts(run: RunFiles, places: Places) -> list[Chart]:
    """The score between the steps or, where nothing was examined there, after each stage; a chart a task, with its
    95 % intervals."""
    between = bool(run.curve)
    points = run.curve if between else _stage_ends(run, places)
    charts = []
    for task in dict.fromkeys(score["task"] for point in points for score in point["scores"]):
        title = f"Score {'between the steps' if between else 'after each stage'}: {task}"
        by_mode = {mode: found for mode in MODES if (found := _scores(points, task, mode))}
        if len(points) < 2:
            continue
        views: dict[str, Markup] = {}
        for axis in places.after:
            series = [
                _score_line(places, mode, found, axis, in_one_piece=not between) for mode, found in by_mode.items()
            ]
            boundaries = [(x - 1 if axis == "steps" else x, named(stage)) for x, stage in places.begun[axis]]
            views[axis] = line_chart(title, series, boundaries=boundaries, share=True, x_name=AXES[axis])
        charts.append(Chart(title, views, tuple((MODES.index(mode), "", MODE_NAMES[mode]) for mode in by_mode)))
    return charts


def _score_line(
    places: Places, mode: Mode, found: Sequence[tuple[Document, Document]], axis: str, *, in_one_piece: bool
) -> Series:
    placed = [("" if in_one_piece else point["stage"], _place(places, point, axis), score) for point, score in found]
    pieces = [
        tuple((x, float(score["mean"])) for _, x, score in part)
        for _, part in groupby(placed, key=lambda entry: str(entry[0]))
    ]
    band = tuple((x, *score["ci95"]) for _, x, score in placed)
    return Series(MODE_NAMES[mode], tuple(pieces), MODES.index(mode), band)


def _scores(points: Sequence[Document], task: str, mode: Mode) -> list[tuple[Document, Document]]:
    """The points that were examined on ``task`` in ``mode``, each with its score."""
    return [
        (point, score)
        for point in points
        for score in point["scores"]
        if (score["task"], score["mode"]) == (task, mode)
    ]


def _stage_ends(run: RunFiles, places: Places) -> list[Document]:
    """The start and the stages' students as points of a learning curve."""
    stages = [str(row["stage"]) for row in run.metrics]
    ends = {stage: len(stages) - 1 - stages[::-1].index(stage) for stage in dict.fromkeys(stages)}
    points = []
    for checkpoint, end in {"start": None, **ends}.items():
        examined = [found for found in run.evaluations if found["checkpoint"] == checkpoint and not has_budget(found)]
        at = {axis: 0.0 if end is None else after[end] for axis, after in places.after.items()}
        if examined:
            scores = [{**found["metrics"][0], "mode": found["mode"]} for found in examined]
            points.append({"stage": None, "global_step": at.pop("steps", 0.0), **at, "scores": scores})
    return points


def _place(places: Places, point: Document, axis: str) -> float:
    """A point of a stage counts what its own stage spent; on the page the stages follow one another."""
    if axis == "steps":
        return float(point["global_step"])
    # A stage that has not finished a step yet begins where the one before it ended.
    begun = {stage: before for before, stage in places.begun[axis]}
    end = places.after[axis][-1] if places.after[axis] else 0.0
    return float(point[axis]) + (0.0 if point["stage"] is None else begun.get(point["stage"], end))


def _group(key: str) -> str:
    """The chart that a metric belongs to: both modes of one quantity together."""
    first, _, rest = key.partition(".")
    return rest if first in MODES else first


def _label(key: str) -> str:
    first = key.partition(".")[0]
    return MODE_NAMES[first] if first in MODES else key.rpartition(".")[2].replace("_", " ").replace(" kl", " KL")


def _colour(key: str, place: int) -> int:
    """Modes keep their colours (those of the score table) in every chart."""
    first = key.partition(".")[0]
    return MODES.index(first) if first in MODES else place


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pieces(
    metrics: Sequence[Document], places: Sequence[float], key: str
) -> tuple[tuple[tuple[float, float], ...], ...]:
    pieces: dict[str, list[tuple[float, float]]] = {}
    for place, row in zip(places, metrics, strict=True):
        if _is_number(value := row.get(key)):
            pieces.setdefault(row["stage"], []).append((place, float(value)))  # type: ignore[arg-type]
    return tuple(map(tuple, pieces.values()))
