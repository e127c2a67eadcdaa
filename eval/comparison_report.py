"""One self-contained page about a comparison: several recipes from one start, several seeds each.

Made from the comparison's folder alone: ``comparison.json`` holds for each start what ``eval.compare`` found, and the
runs below the folder have the learning curves. A result that goes against on-policy distillation is said in the same
words.
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
from distill.types import MODES
from eval.figure import NUM_COLOURS, Point, Series, line_chart
from eval.page import MODE_NAMES, Chart, Document, count, page
from eval.run_files import read_lines
from eval.seeds import seeds_half_width

FILE = "comparison.json"

START, ON_POLICY = "off_policy", "on_policy"
"""The arm that the others begin at, and the one whose lead is told."""

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
    runs = {arm: [_folder(folder, name, run) for run in one["runs"]] for arm, one in found["arms"].items()}
    paired = differences(found["paired"])
    return {
        "name": name,
        "alone": alone,
        "verdict": verdict(found),
        "seeds": found["seeds"],
        "has_start": START in found["arms"],
        "table": table(found),
        "paired": [entry for entry in paired if entry["is_headline"]],
        "more_paired": [entry for entry in paired if not entry["is_headline"]],
        "charts": _charts(name, runs),
        "members": [
            {"arm": arm_name(arm), "runs": [_member(folder, run) for run in of_arm]} for arm, of_arm in runs.items()
        ],
    }


def _folder(folder: Path, start: str, run: str) -> Path:
    """The folder of a member: below the comparison's own, wherever that has moved to, or where the file says."""
    own = folder / start / Path(run).name
    return own if own.exists() else folder / run


def arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def _plain(arm: str) -> str:
    """An arm's name within a sentence."""
    return arm_name(arm).removeprefix("+ ")


def verdict(found: Mapping[str, Any]) -> list[str]:
    """The two headline numbers in words, and whether the baseline is one."""
    ratio = found["compute_at_equal_score"]
    if ratio is None:
        return ["These arms have no compute to compare: the page shows their scores."]
    sentences = [_equal_score(ratio), *_equal_compute(found["score_at_equal_compute"], ratio["a"], ratio["b"])]
    weak = [
        f"{entry['task']}, {MODE_NAMES[entry['mode']]}"
        for entry in found["paired"]
        if (entry["a"], entry["b"]) == (ratio["b"], START) and _is_average(entry) and entry["ci95"][0] <= 0
    ]
    if weak:
        sentences.append(
            f"{_capital(_plain(ratio['b']))} did not certainly improve on its start ({'; '.join(weak)}), so it is a "
            f"weak baseline there."
        )
    return sentences


def _equal_score(found: Mapping[str, Any]) -> str:
    ratio, ci95, seeds = found["ratio"], found["ci95"], len(found["by_seed"])
    ours, theirs = _capital(_plain(found["a"])), _plain(found["b"])
    if found["num_reached"] < seeds:
        reached = f"{found['num_reached']} of {seeds} seeds"
        return f"{ours} reached the best score of {theirs} with {reached}, so there is no ratio."
    if ratio is None:
        return f"{ours} has nothing to catch up with: the best score of {theirs} was that of its start."
    certainty = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    certainty += ", no interval" if ci95 is None else f", 95 % interval {ci95[0]:.2g} to {ci95[1]:.2g}"
    if ratio <= 1:
        sentence = f"{ours} reached the best score of {theirs} with {ratio:.2g} of its FLOPs ({certainty})"
    else:
        sentence = f"{ours} needed {ratio:.2g} times the FLOPs of {theirs} to reach its best score ({certainty})"
    uncertain = ci95 is not None and ci95[0] <= 1 <= ci95[1]
    return f"{sentence}, which may be chance." if uncertain else f"{sentence}."


def _equal_compute(found: Mapping[str, Any], ours: str, theirs: str) -> list[str]:
    """The difference of the validation scores, with Student's interval over the seeds; nothing where one is not
    known."""
    by_arm = found["arms"]
    if any(name not in by_arm or by_arm[name]["mean"] is None for name in (ours, theirs)):
        return []
    by_seed = [a - b for a, b in zip(by_arm[ours]["by_seed"], by_arm[theirs]["by_seed"], strict=True)]
    difference = mean(by_seed)
    sentence = (
        f"For the {count(found['flops'])} FLOPs that it spent in all, it scores {abs(100 * difference):.1f} points "
        f"{'higher' if difference >= 0 else 'lower'} than {_plain(theirs)} does for as many"
    )
    half = seeds_half_width(by_seed)
    if half is None:
        return [f"{sentence} (1 seed, no interval)."]
    low, high = difference - half, difference + half
    sentence += f" (validation questions, 95 % interval over seeds {100 * low:+.1f} to {100 * high:+.1f})"
    return [f"{sentence}, which may be chance." if low <= 0 <= high else f"{sentence}."]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def table(found: Mapping[str, Any]) -> Document:
    """Table 21's shape: a row an arm; each task and mode with pass@1 and, where many samples were drawn, pass@k."""
    arms = found["arms"]
    tasks = dict.fromkeys(entry["task"] for arm in arms.values() for entry in arm["scores"])
    asked = {(entry["task"], entry["mode"]) for arm in arms.values() for entry in arm["scores"] if _is_average(entry)}
    columns = [(task, mode) for task in tasks for mode in MODES if (task, mode) in asked]
    roles = list(dict.fromkeys(role for arm in arms.values() for role in arm["device_seconds"]))
    equal = (found["score_at_equal_compute"] or {"arms": {}})["arms"]
    return {
        "columns": [_column(arms, task, mode) for task, mode in columns],
        "roles": [role.replace("_", " ") for role in roles],
        "has_equal": bool(equal),
        "rows": [
            {
                "name": arm_name(name),
                "cells": [(_average(arm, task, mode), _pass(arm, task, mode)) for task, mode in columns],
                # Documents of earlier versions have no interval.
                "equal": {"ci95": None, **equal[name]} if name in equal and name != START else None,
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
    return entry["metric"].startswith("avg@") and not entry["task"].endswith(PASS)


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
    """Each paired difference, with where it stands on a scale that they all share; on-policy distillation against any
    other arm is told as its lead."""
    turned = [_turned(entry) if entry["b"] == ON_POLICY else entry for entry in paired]
    turned.sort(key=lambda entry: MODES.index(entry["mode"]))
    widest: float = max([*(abs(end) for entry in turned for end in entry["ci95"]), 0.01])

    def place(value: float) -> float:
        return float(50 + 50 * value / widest)

    return [
        {
            **entry,
            "a": _plain(entry["a"]),
            "b": _plain(entry["b"]),
            "is_headline": entry["a"] == ON_POLICY,
            "place": place(entry["difference"]),
            "left": place(entry["ci95"][0]),
            "width": place(entry["ci95"][1]) - place(entry["ci95"][0]),
            "certain": entry["ci95"][0] > 0 or entry["ci95"][1] < 0,
        }
        for entry in turned
    ]


def _turned(entry: Document) -> Document:
    """The same difference, seen from the other arm."""
    low, high = entry["ci95"]
    return {**entry, "a": entry["b"], "b": entry["a"], "difference": -entry["difference"], "ci95": [-high, -low]}


def _member(folder: Path, run: Path) -> Document:
    """A run with the link to its page, as seen from the comparison's; None where there is none."""
    report = run / "report.html"
    link = quote(Path(os.path.relpath(report, folder)).as_posix()) if report.exists() else None
    return {"name": run.name, "link": link}


def _charts(start: str, runs: Mapping[str, Sequence[Path]]) -> list[Chart]:
    """The score over the FLOPs since the start, for each task and mode of the learning curves: the seeds thin, their
    mean thick."""
    # The start's own curve ends where the others begin.
    curves = {arm: [_curve(run) for run in of_arm] for arm, of_arm in runs.items() if arm != START}
    keys = dict.fromkeys(key for seeds in curves.values() for curve in seeds for _, scores in curve for key in scores)
    charts = []
    for task, mode in keys:
        by_arm = {
            arm: [[(flops, scores[task, mode]) for flops, scores in curve if (task, mode) in scores] for curve in seeds]
            for arm, seeds in curves.items()
        }
        title = f"{task}, {MODE_NAMES[mode]}"
        if any(flops > 0 for lines in by_arm.values() for line in lines for flops, _ in line):
            charts.append(_chart(f"{start}: {title}", title, by_arm))
    return charts


def _chart(said: str, title: str, by_arm: Mapping[str, Sequence[Sequence[Point]]]) -> Chart:
    series: list[Series] = []
    legend: list[tuple[int, str, str]] = []
    for colour, (arm, lines) in enumerate(by_arm.items()):
        # A logarithmic axis has no place for what cost nothing.
        paid = [line for whole in lines if (line := tuple(point for point in whole if point[0] > 0))]
        if paid:
            legend.append((colour % (NUM_COLOURS - 1), "", arm_name(arm)))
        style = "thin" if len(paid) > 1 else "thick"
        series += [Series(f"{arm_name(arm)}, one seed", (line,), legend[-1][0], style=style) for line in paid]
        if len(paid) > 1:
            series.append(Series(arm_name(arm), (_mean_line(paid),), legend[-1][0], style="thick"))
    if begun := [score for lines in by_arm.values() for line in lines for flops, score in line if flops == 0]:
        costs = [x for line in series for piece in line.pieces for x, _ in piece]
        ends = ((min(costs), mean(begun)), (max(costs), mean(begun)))
        series.append(Series("the start", (ends,), NUM_COLOURS - 1, style="dashed"))
        legend.append((NUM_COLOURS - 1, "dashed", "the start"))
    svg = line_chart(said, series, share=True, decades=True, x_name="FLOPs since the start, all roles")
    return Chart(title, {"steps": svg}, tuple(legend))


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
