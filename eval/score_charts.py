"""Figures of examinations: pass@k, the score under thinking budgets, and mode switching by turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.types import MODES
from eval.budget import budget_curves
from eval.evaluation import Evaluation
from eval.figure import NUM_COLOURS, Series, line_chart
from eval.page import MODE_NAMES, Chart, Document, named
from eval.run_files import by_task
from eval.statistics import pass_at_k_estimate

FEWEST_SAMPLES = 4
"""Samples a question from which a pass@k curve says something."""


def pass_charts(evaluations: Sequence[Document]) -> list[Chart]:
    """pass@k against k, a line a checkpoint, for each task and mode with enough samples; no budgets."""
    charts = []
    for task, found in by_task(evaluations).items():
        for mode in MODES:
            lines = [
                entry for entry in found if entry["mode"] == mode and entry["samples_per_question"] >= FEWEST_SAMPLES
            ]
            if not lines:
                continue
            series = [
                Series(named(entry["checkpoint"]), (tuple(_pass_points(entry)),), place % NUM_COLOURS)
                for place, entry in enumerate(lines)
            ]
            title = f"{task}, {MODE_NAMES[mode]}"
            charts.append(_chart(title, series, x_name="k", doubling=True))
    return charts


def _pass_points(entry: Document) -> list[tuple[float, float]]:
    most = min(map(len, entry["scores"].values()))
    powers = [2**exponent for exponent in range(most.bit_length())]
    return [(float(k), pass_at_k_estimate(entry["scores"], k).mean) for k in sorted({*powers, most})]


def budget_charts(evaluations: Sequence[Document]) -> list[Chart]:
    """The score under each thinking budget, with non-thinking and unlimited thinking as lines across: the report's
    figure 2, for each checkpoint and task that was examined so."""
    known = Evaluation.__dataclass_fields__
    parsed = [Evaluation.from_json({k: v for k, v in found.items() if k in known}) for found in evaluations]
    charts = []
    for curve in budget_curves(parsed):
        points = curve["points"]
        band = tuple((float(point["budget"]), *point["ci95"]) for point in points)
        line = tuple((float(point["budget"]), float(point["mean"])) for point in points)
        series = [Series("thinking, by budget", (line,), 0, band)]
        ends = (line[0][0], line[-1][0])
        for name, colour in (("unlimited", 0), ("no_think", 1)):
            if (across := curve[name]) is not None:
                said = "thinking without a budget" if name == "unlimited" else "non-thinking"
                series.append(Series(said, (tuple((x, across["mean"]) for x in ends),), colour, style="dashed"))
        title = f"{named(curve['checkpoint'])}, {curve['task']}"
        charts.append(_chart(title, series, x_name="thinking budget (tokens)", doubling=True))
    return charts


def switching_charts(switching: Sequence[Document]) -> list[Chart]:
    """The share of turns in the right mode by the turn's number, a line a checkpoint."""
    series = []
    for place, found in enumerate(switching):
        shares = _metrics(found)
        turns = [(turn, shares.get(f"right_mode@{turn}")) for turn in range(1, found["num_turns"] + 1)]
        points = tuple((float(turn), float(share["mean"])) for turn, share in turns if share is not None)
        if points:
            series.append(Series(named(found["checkpoint"]), (points,), place % NUM_COLOURS))
    return [_chart("Turns in the right mode", series, x_name="turn of the conversation")] if series else []


SWITCHING_COLUMNS = {
    "right_mode": "right mode",
    "right_mode/think": "to think",
    "right_mode/no_think": "not to think",
    "right_mode/plain": "one flag",
    "right_mode/both": "both flags",
    "right_mode/system": "system turn",
    "quoted": "quoted flags followed",
}


def switching_table(switching: Sequence[Document]) -> Document:
    """Rows and columns of what mode switching found; a column that nobody measured is left out."""
    found = [(entry, _metrics(entry)) for entry in switching]
    columns = {key: said for key, said in SWITCHING_COLUMNS.items() if any(key in shares for _, shares in found)}
    rows = [
        {
            "checkpoint": entry["checkpoint"],
            "cells": [shares.get(key) for key in columns],
            "leakage": entry["leakage"],
            "num_dialogues": entry["num_dialogues"],
        }
        for entry, shares in found
    ]
    return {"columns": list(columns.values()), "rows": rows}


def _metrics(found: Document) -> dict[str, Mapping[str, Any]]:
    return {entry["metric"]: entry for entry in found["metrics"]}


def _chart(title: str, series: Sequence[Series], *, x_name: str, doubling: bool = False) -> Chart:
    svg = line_chart(title, series, share=True, doubling=doubling, x_name=x_name)
    legend = tuple((line.colour, line.style, line.label) for line in series)
    return Chart(title, {"steps": svg}, legend)
