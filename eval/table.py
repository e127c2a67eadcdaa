"""Scores and costs as terminal tables, narrow enough for 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval.switching import TASK as MODE_SWITCHING

Entry = Mapping[str, Any]
Spent = Mapping[str, tuple[float, float, float]]


def print_scores(scores: Sequence[Entry]) -> None:
    """A table for each task and metric of ``summary.json``'s scores."""
    for table in _tables(scores, {}):
        _console().print(table)


def print_summary(summary: Mapping[str, Any]) -> None:
    """The scores with what each checkpoint's making cost, the gap that was closed, and where the report lies."""
    console = _console()
    for table in _tables(summary["scores"], _spent_by_stage(summary["costs"])):
        console.print(table)
    for mode, share in summary["gap_closed"].items():
        said = "no certain gap (the teacher's lead lies within its interval)" if share is None else f"{share:.0%}"
        console.print(f"Gap to the teacher that the last stage closed, {mode}: {said}", soft_wrap=True)
    console.print(f"Report: {summary['run']}/report.html", soft_wrap=True)


def _console() -> Console:
    """Folders, tasks and stages are called what their owner likes: a bracket in a name is no mark-up."""
    return Console(highlight=False, markup=False)


def _tables(scores: Sequence[Entry], spent: Spent) -> list[Table]:
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in scores:
        # A slice's scores belong together whatever its value, those of mode switching whatever the metric.
        parts = (f"by {entry['slice']}",) if "slice" in entry else ()
        metric = () if entry["task"] == MODE_SWITCHING else (entry["metric"],)
        groups.setdefault((entry["task"], *metric, *parts), []).append(entry)
    return [_table(", ".join(title), entries, spent) for title, entries in groups.items()]


def _table(title: str, entries: Sequence[Entry], spent: Spent) -> Table:
    num_questions = {entry["num_questions"] for entry in entries}
    counted = "conversations" if entries[0]["task"] == MODE_SWITCHING else "questions"
    # Without frames every figure fits into 80 columns; a cut-off score would be worse than no table.
    table = Table(
        title=title if len(num_questions) > 1 else f"{title}, {num_questions.pop()} {counted}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    first = "metric" if entries[0]["task"] == MODE_SWITCHING else "mode"
    for name in ("checkpoint", first, "score", "95 % interval", *(("tokens", "FLOPs", "seconds") if spent else ())):
        table.add_column(name, no_wrap=True, justify="left" if name in ("checkpoint", first) else "right")
    previous = None
    for entry in entries:
        low, high = entry["ci95"]
        cells = [entry["checkpoint"], _asked(entry), f"{entry['mean']:.1%}", f"{100 * low:.1f} - {100 * high:.1f}"]
        if spent:
            cost = spent.get(entry["checkpoint"]) if entry["checkpoint"] != previous else None
            cells += ["", "", ""] if cost is None else [f"{cost[0]:,.0f}", f"{cost[1]:.1e}", f"{cost[2]:,.1f}"]
        table.add_row(*cells)
        previous = entry["checkpoint"]
    return table


def _asked(entry: Entry) -> str:
    """How a score's responses were asked for: the mode with its budget or slice, or what of mode switching it is."""
    if entry["task"] == MODE_SWITCHING:
        return str(entry["metric"])
    budget = f", budget {entry['thinking_budget']}" if "thinking_budget" in entry else ""
    return str(entry["mode"]) + budget + (f", {entry['value']}" if "slice" in entry else "")


def _spent_by_stage(costs: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Tokens, FLOPs and seconds of each stage, all roles but the examination together."""
    spent: dict[str, tuple[float, float, float]] = {}
    for role, shown in costs.items():
        if role == "evaluate":
            continue
        for stage, cost in shown["stages"].items():
            tokens, flops, seconds = spent.get(stage, (0.0, 0.0, 0.0))
            spent[stage] = (tokens + cost["tokens"], flops + cost["flops"], seconds + cost["seconds"])
    return spent
