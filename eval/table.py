"""Scores and costs as a terminal table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_scores(scores: Sequence[Mapping[str, Any]]) -> None:
    """A row an entry of ``summary.json``'s scores."""
    table = Table("checkpoint", "task", "mode", "metric", "score", "95 % interval", "questions")
    for entry in scores:
        table.add_row(*_score_cells(entry), str(entry["num_questions"]))
    Console().print(table)


def print_summary(summary: Mapping[str, Any]) -> None:
    """The scores with what each checkpoint's making cost, the gap that was closed, and where the report lies."""
    spent = _spent_by_stage(summary["costs"])
    table = Table("checkpoint", "task", "mode", "metric", "score", "95 % interval", "tokens", "FLOPs", "seconds")
    previous = None
    for entry in summary["scores"]:
        name = entry["checkpoint"]
        cost = spent.get(name) if name != previous else None
        cells = ("", "", "") if cost is None else (f"{cost[0]:,.0f}", f"{cost[1]:.2e}", f"{cost[2]:,.1f}")
        table.add_row(*_score_cells(entry), *cells)
        previous = name
    console = Console()
    console.print(table)
    for mode, share in summary["gap_closed"].items():
        said = "the teacher's lead is within its interval" if share is None else f"{share:.0%}"
        console.print(f"gap closed by the last stage, {mode}: {said}", highlight=False)
    console.print(f"report: {summary['run']}/report.html", highlight=False, soft_wrap=True)


def _score_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = entry["ci95"]
    score = f"{entry['mean']:.1%}"
    return entry["checkpoint"], entry["task"], entry["mode"], entry["metric"], score, f"{low:.1%} - {high:.1%}"


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
