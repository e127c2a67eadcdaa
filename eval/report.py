"""One self-contained page about a run, made from the run directory's files alone.

No script, no font, no request: the page opens from a disk, prints, and follows the reader's light or dark setting.
A run that is not finished gets a page of what is there; what a run never measured has no section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.journal import write_atomically
from eval.browser import SHADES, browsers, divergence_names, shaded
from eval.comparison_report import FILE as COMPARISON
from eval.comparison_report import write_comparison_report
from eval.curve_charts import AXES, Places, metric_charts, score_charts
from eval.gantt import gantt_charts, overlap
from eval.page import MODE_NAMES, Document, named, page, percent
from eval.run_files import RunFiles, by_task, has_budget
from eval.score_charts import budget_charts, pass_charts, switching_charts, switching_table

MOST_ENTRIES = 8
"""Entries of a list of the manifest that the page shows; the responses' keys alone can be thousands."""

PHASES = {
    "seconds.sample": "sampling",
    "seconds.score": "judging",
    "seconds.train": "training",
    "": "everything else",
    "seconds.sync": "sending weights",
}
"""The parts of a step's time."""
LEAST_SHARE = 0.005
"""Share of a stage's time from which on sending weights is shown."""


def write_report(folder: Path) -> Path:
    """Write ``<folder>/report.html`` about a run or a comparison and return its path.

    Raises UserError if ``folder`` is neither.
    """
    if (folder / COMPARISON).exists():
        return write_comparison_report(folder)
    if not folder.exists():
        raise UserError(f"{folder} is not there; give the folder that distill run wrote")
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} is neither a run directory (it has no config.yaml) nor a comparison (no {COMPARISON}); give the "
            f"folder that distill run wrote"
        )
    path = folder / "report.html"
    write_atomically(path, render(folder))
    return path


def render(folder: Path) -> str:
    """The page about a run, as text."""
    run = RunFiles.read(folder)
    places = Places.of(run)
    examined = [*run.evaluations, *run.later]
    plain = [found for found in examined if not has_budget(found)]
    return page(
        "report.html.jinja",
        name=run.path.resolve().name,
        verdict=verdict(run.summary, run.evaluations, run.warnings),
        tasks=by_task([found for found in run.evaluations if not has_budget(found)]),
        later=by_task([found for found in run.later if not has_budget(found)]),
        budgeted=by_task([found for found in examined if has_budget(found)]),
        axes={axis: said for axis, said in AXES.items() if axis in places.after},
        charts=[*score_charts(run, places), *metric_charts(run, places, main=True)],
        more_charts=metric_charts(run, places, main=False),
        pass_charts=pass_charts(plain),
        budget_charts=budget_charts(examined),
        switching_charts=switching_charts(run.switching),
        switching=switching_table(run.switching),
        warnings=run.warnings,
        costs=costs_by_role(run.costs, run.summary),
        phases=time_by_phase(run.metrics),
        gantt=gantt_charts(run.metrics),
        shaded=shaded(run.samples),
        divergences=divergence_names(run.samples),
        shades=SHADES,
        browsers=browsers(by_task(plain)),
        manifest=brief(run.manifest),
        config=run.config,
    )


def brief(document: Any) -> Any:
    """The same with long lists cut short, and saying so."""
    if isinstance(document, Mapping):
        return {key: brief(value) for key, value in document.items()}
    if isinstance(document, list):
        shown = [brief(value) for value in document[:MOST_ENTRIES]]
        left = len(document) - len(shown)
        return [*shown, f"and {left:,} more"] if left else shown
    return document


def verdict(
    summary: Mapping[str, Any], evaluations: Sequence[Document], warnings: Sequence[Document] = ()
) -> list[str]:
    """What the run achieved: a sentence a mode."""
    if not summary and warnings and warnings[-1]["verdict"] == "stop":
        last = warnings[-1]
        return [
            f"The guard {last['guard']} stopped this run at {named(last['stage'])} step {last['step']}.",
            f"What it found: {last['sentence']}.",
        ]
    if not summary:
        return ["This run is not finished; the page shows what is there so far."]
    names = list(dict.fromkeys(found["checkpoint"] for found in evaluations))
    student = f"the {named(names[-1])} student" if names else "the last student"
    sentences = []
    for mode, share in summary["gap_closed"].items():
        where = f"In {MODE_NAMES[mode]} mode"
        if not any((found["checkpoint"], found["mode"]) == ("teacher", mode) for found in evaluations):
            sentences.append(f"{where} the teacher was not examined, so no gap to it is known.")
        elif share is None:
            sentences.append(f"{where} the teacher leads by no more than chance, so there is no gap to close.")
        elif share >= 1:
            sentences.append(f"{where} {student} reached the teacher ({percent(share, 0)} of the gap closed).")
        elif share >= 0:
            sentences.append(f"{where} {student} closed {percent(share, 0)} of the gap to the teacher.")
        else:
            sentences.append(f"{where} {student} fell back by {percent(-share, 0)} of the gap to the teacher.")
    return sentences


def costs_by_role(costs: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Document]:
    """A row a role, with its stages, the most memory it took and its share of the time."""
    peaks = summary.get("peak_memory_bytes", {})
    total = sum(cost["seconds"] for cost in costs.values()) or 1.0
    return [
        {
            "role": role.replace("_", " "),
            "share": cost["seconds"] / total,
            "peak": peaks.get(role),
            "cost": cost,
            "stages": cost.get("stages", {}),
        }
        for role, cost in costs.items()
    ]


def time_by_phase(metrics: Sequence[Document]) -> list[Document]:
    """For each stage the seconds of its steps, and the share of each phase in them.

    Sending weights counts as everything else where it is hardly anything in every stage: most samplers get none.
    """
    stages: dict[str, dict[str, float]] = {}
    for row in metrics:
        if "seconds.train" not in row:
            continue
        spent = stages.setdefault(row["stage"], dict.fromkeys(PHASES, 0.0))
        known = {phase: float(row.get(phase, 0.0)) for phase in PHASES if phase}
        for phase, seconds in {**known, "": max(row["seconds"] - sum(known.values()), 0.0)}.items():
            spent[phase] += seconds
    sends = any(spent["seconds.sync"] >= LEAST_SHARE * sum(spent.values()) > 0 for spent in stages.values())
    if not sends:
        for spent in stages.values():
            spent[""] += spent.pop("seconds.sync")
    return [
        _stage_time(stage, spent, [row for row in metrics if row["stage"] == stage]) for stage, spent in stages.items()
    ]


def _stage_time(stage: str, spent: Mapping[str, float], rows: Sequence[Document]) -> Document:
    total = sum(spent.values())
    # Where the teacher speaks there are no phases that could hide behind each other.
    phased = [row for row in rows if "staleness" in row]
    return {
        "stage": stage,
        "steps": len(rows),
        "seconds": total,
        "names": [PHASES[phase] for phase in spent],
        "shares": [seconds / (total or 1.0) for seconds in spent.values()],
        "efficiency": overlap(phased) if phased else None,
    }
