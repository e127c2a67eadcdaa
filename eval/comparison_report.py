"""One self-contained page about a comparison: several recipes from one start, several seeds each.

Made from the comparison's folder alone: ``comparison.json`` holds for each start the object that ``distill compare
--json`` prints (arms, paired differences, the two headline numbers), and the arms name the folders of their runs, whose
``curve.jsonl`` are the learning curves. A result that goes against on-policy distillation is said in the same words.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

from distill.errors import UserError
from distill.journal import read_json, write_atomically
from eval.figure import NUM_COLOURS, Point, Series, line_chart
from eval.page import MODE_NAMES, Chart, Document, page
from eval.run_files import read_lines

FILE = "comparison.json"

ARM_NAMES = {
    "off_policy": "off-policy distillation (the start)",
    "on_policy": "+ on-policy distillation",
    "rl": "+ reinforcement learning",
    "off_policy_more": "+ more off-policy distillation",
}
"""The arms as Table 21 of the Qwen3 report names them; another arm has its own name."""

PASS = "-pass"
"""Ending of the task that asks few of a task's questions many times, for pass@k."""


def write_comparison_report(folder: Path) -> Path:
    """Write ``<folder>/report.html`` and return its path. Raises UserError where the comparison cannot be read."""
    path = folder / "report.html"
    write_atomically(path, render_comparison(folder))
    return path


def render_comparison(folder: Path) -> str:
    """The page as text."""
    try:
        starts = dict(read_json(folder / FILE)["starts"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / FILE} is no comparison (JSON with an object 'starts'); make it again with distill compare"
        ) from None
    return page(
        "comparison.html.jinja",
        name=folder.resolve().name,
        starts=[_start(folder, name, found, alone=len(starts) == 1) for name, found in starts.items()],
    )


def _start(folder: Path, name: str, found: Document, *, alone: bool) -> Document:
    arms = found["arms"]
    return {
        "name": name,
        "alone": alone,
        "verdict": verdict(found),
        "seeds": found["seeds"],
        "table": table(arms),
        "paired": differences(found["paired"]),
        "charts": _charts(folder, name, arms),
        "members": [{"arm": arm_name(arm), "runs": _members(folder, one)} for arm, one in arms.items()],
    }


def arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def verdict(found: Mapping[str, Any]) -> list[str]:
    """The two headline numbers in words, and whether the baseline is one."""
    sentences = [_equal_score(found["compute_at_equal_score"], found["seeds"])]
    if (score := _equal_compute(found["score_at_equal_compute"])) is not None:
        sentences.append(score)
    weak = [
        f"{entry['task']}, {MODE_NAMES[entry['mode']]}"
        for entry in found["paired"]
        if (entry["a"], entry["b"]) == ("rl", "off_policy") and entry["ci95"] is not None and entry["ci95"][0] <= 0
    ]
    if weak:
        sentences.append(
            f"Reinforcement learning did not certainly improve on its start ({'; '.join(weak)}), so it is a weak "
            f"baseline there."
        )
    return sentences


def _equal_score(found: Mapping[str, Any], seeds: int) -> str:
    ratio, ci95 = found["ratio"], found["ci95"]
    if ratio is None:
        return "On-policy distillation did not reach reinforcement learning's best score in every seed."
    certainty = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    certainty += ", no interval" if ci95 is None else f", 95 % interval {ci95[0]:.2g} to {ci95[1]:.2g}"
    if ratio <= 1:
        sentence = (
            f"On-policy distillation reached reinforcement learning's best score with {ratio:.2g} of its FLOPs "
            f"({certainty})"
        )
    else:
        sentence = (
            f"On-policy distillation needed {ratio:.2g} times the FLOPs of reinforcement learning to reach its best "
            f"score ({certainty})"
        )
    uncertain = ci95 is not None and ci95[0] <= 1 <= ci95[1]
    return f"{sentence}, which may be chance." if uncertain else f"{sentence}."


def _equal_compute(found: Mapping[str, Any]) -> str | None:
    """None where no score at equal compute is known."""
    difference, ci95 = found.get("difference"), found.get("ci95")
    if difference is None:
        return None
    than = "higher" if difference >= 0 else "lower"
    certainty = "" if ci95 is None else f" (95 % interval {100 * ci95[0]:+.1f} to {100 * ci95[1]:+.1f})"
    sentence = f"At equal compute it scores {abs(100 * difference):.1f} points {than}{certainty}"
    return f"{sentence}, which may be chance." if ci95 is not None and ci95[0] <= 0 <= ci95[1] else f"{sentence}."


def table(arms: Mapping[str, Any]) -> Document:
    """Table 21's shape: a row an arm; each task and mode with pass@1 and, where many samples were drawn, pass@k."""
    columns = list(
        dict.fromkeys(
            (entry["task"], entry["mode"])
            for arm in arms.values()
            for entry in arm["scores"]
            if _is_average(entry) and not entry["task"].endswith(PASS)
        )
    )
    roles = list(dict.fromkeys(role for arm in arms.values() for role in arm["device_seconds"]))
    return {
        "columns": [_column(arms, task, mode) for task, mode in columns],
        "roles": [role.replace("_", " ") for role in roles],
        "rows": [
            {
                "name": arm_name(name),
                "cells": [(_average(arm, task, mode), _pass(arm, task, mode)) for task, mode in columns],
                "flops": arm["flops"],
                "seconds": [arm["device_seconds"].get(role) for role in roles],
                "total": sum(arm["device_seconds"].values()),
            }
            for name, arm in arms.items()
        ],
    }


def _column(arms: Mapping[str, Any], task: str, mode: str) -> str:
    metrics = dict.fromkeys(found["metric"] for arm in arms.values() if (found := _pass(arm, task, mode)) is not None)
    return f"{task}, {MODE_NAMES[mode]}: pass@1" + (f" ({', '.join(metrics)})" if metrics else "")


def _is_average(entry: Mapping[str, Any]) -> bool:
    return entry["metric"].startswith("avg@") and "thinking_budget" not in entry


def _average(arm: Mapping[str, Any], task: str, mode: str) -> Document | None:
    found = (entry for entry in arm["scores"] if _is_average(entry) and (entry["task"], entry["mode"]) == (task, mode))
    return next(found, None)


def _pass(arm: Mapping[str, Any], task: str, mode: str) -> Document | None:
    """pass@k of the task's own samples or, where there are some, of the many samples to few questions."""
    for wanted in (task + PASS, task):
        for entry in arm["scores"]:
            if (entry["task"], entry["mode"]) == (wanted, mode) and entry["metric"].startswith("pass@"):
                return dict(entry)
    return None


def differences(paired: Sequence[Document]) -> list[Document]:
    """Each paired difference in points, with where it stands on a scale that they all share."""
    ends = [abs(end) for entry in paired for end in (entry["difference"], *(entry["ci95"] or ()))]
    widest: float = max([*ends, 0.01])

    def place(value: float) -> float:
        return 50 + 50 * value / widest

    rows = []
    for entry in paired:
        low, high = entry["ci95"] or (entry["difference"], entry["difference"])
        rows.append(
            {
                **entry,
                "a": arm_name(entry["a"]).removeprefix("+ "),
                "b": arm_name(entry["b"]).removeprefix("+ "),
                "place": place(entry["difference"]),
                "left": place(low),
                "width": place(high) - place(low),
                "certain": entry["ci95"] is not None and (low > 0 or high < 0),
            }
        )
    return rows


def _members(folder: Path, arm: Mapping[str, Any]) -> list[Document]:
    """The arm's runs with the links to their pages, as seen from the comparison's; None where there is none."""
    members = []
    for run in arm.get("runs", ()):
        report = folder / run / "report.html"
        link = quote(Path(os.path.relpath(report, folder)).as_posix()) if report.exists() else None
        members.append({"name": Path(run).name, "link": link})
    return members


def _charts(folder: Path, start: str, arms: Mapping[str, Any]) -> list[Chart]:
    """The score over the FLOPs since the start, for each task and mode of the learning curves: the seeds thin, their
    mean thick."""
    curves = {name: [_curve(folder / run) for run in arm.get("runs", ())] for name, arm in arms.items()}
    measured = dict.fromkeys(
        key for seeds in curves.values() for curve in seeds for _, scores in curve for key in scores
    )
    charts = []
    for task, mode in measured:
        series: list[Series] = []
        begun: list[float] = []
        for place, (name, seeds) in enumerate(curves.items()):
            colour = place % NUM_COLOURS
            lines = [
                [(flops, scores[task, mode]) for flops, scores in curve if (task, mode) in scores] for curve in seeds
            ]
            begun += [score for line in lines for flops, score in line if flops == 0]
            # A logarithmic axis has no place for what cost nothing.
            paid = [line for whole in lines if (line := tuple(point for point in whole if point[0] > 0))]
            style = "thin" if len(paid) > 1 else "thick"
            series += [Series(f"{arm_name(name)}, one seed", (line,), colour, style=style) for line in paid]
            if len(paid) > 1:
                series.append(Series(arm_name(name), (_mean_line(paid),), colour, style="thick"))
        if not series:
            continue
        legend = [(place % NUM_COLOURS, "", arm_name(name)) for place, name in enumerate(curves) if any(curves[name])]
        if begun:
            costs = [x for line in series for piece in line.pieces for x, _ in piece]
            level = mean(begun)
            ends = ((min(costs), level), (max(costs), level))
            series.append(Series("the start", (ends,), NUM_COLOURS - 1, style="dashed"))
            legend.append((NUM_COLOURS - 1, "dashed", "the start"))
        title = f"{task}, {MODE_NAMES[mode]}"
        svg = line_chart(f"{start}: {title}", series, share=True, decades=True, x_name="FLOPs, all roles")
        charts.append(Chart(title, {"steps": svg}, tuple(legend)))
    return charts


def _curve(run: Path) -> list[tuple[float, dict[tuple[str, str], float]]]:
    """FLOPs since the run's own start, its stages one after the other, and the scores there."""
    points: list[tuple[float, dict[tuple[str, str], float]]] = []
    stage, before, last = None, 0.0, 0.0
    for point in read_lines(run / "curve.jsonl"):
        if point["stage"] != stage:
            stage, before = point["stage"], before + last
        last = float(point["flops"])
        points.append((before + last, {(score["task"], score["mode"]): score["mean"] for score in point["scores"]}))
    return points


def _mean_line(lines: Sequence[Sequence[Point]]) -> tuple[Point, ...]:
    """The seeds' mean at each point that all of them have: as far as the shortest goes."""
    together = zip(*lines, strict=False)
    return tuple((mean(x for x, _ in points), mean(y for _, y in points)) for points in together)
