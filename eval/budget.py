"""Score against thinking budget: the curve of the report's figure 2, from the examinations that were made for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.evaluation import Evaluation


def budget_curves(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each checkpoint and task that was examined under thinking budgets, what a figure needs.

    ``points`` (``budget``, ``mean``, ``ci95``, ``mean_length``; by rising budget) make the curve; ``unlimited`` is
    thinking without a budget and ``no_think`` the line that the figure is drawn against, each with the same keys but
    ``budget``, or None where it was not examined. Lengths and budgets are in response tokens.
    """
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for found in evaluations:
        groups.setdefault((found.checkpoint, found.task), []).append(found)
    return [
        {
            "checkpoint": checkpoint,
            "task": task,
            "metric": next(iter(group[0].metrics)),
            "points": [{"budget": found.sampling.thinking_budget, **_point(found)} for found in _budgeted(group)],
            "unlimited": _first(group, "think"),
            "no_think": _first(group, "no_think"),
        }
        for (checkpoint, task), group in groups.items()
        if _budgeted(group)
    ]


def _budgeted(group: Sequence[Evaluation]) -> list[Evaluation]:
    found = [one for one in group if one.sampling.thinking_budget is not None]
    return sorted(found, key=lambda one: one.sampling.thinking_budget or 0)


def _first(group: Sequence[Evaluation], mode: str) -> dict[str, Any] | None:
    found = (one for one in group if one.mode == mode and one.sampling.thinking_budget is None)
    return next(map(_point, found), None)


def _point(found: Evaluation) -> dict[str, Any]:
    result = next(iter(found.metrics.values()))
    return {"mean": result.mean, "ci95": list(result.ci95), "mean_length": found.mean_length}
