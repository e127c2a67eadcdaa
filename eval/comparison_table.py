"""A comparison on the terminal, in the shape of the Qwen3 report's Table 21: a row an arm, negative results too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Document = Mapping[str, Any]


def print_comparison(document: Document) -> None:
    """The arms' scores and costs, paired differences and the two headline numbers, for each start."""
    console = Console(highlight=False, markup=False)
    for start, found in document.get("starts", {"": document}).items():
        if start:
            console.print(f"Start: {start}", style="bold")
        for table in (_scores(found), _seconds(found), _differences(found)):
            console.print(table)
        for line in headlines(found):
            console.print(line, soft_wrap=True)
        console.print()


PASS = "-pass"
"""Ends the name of a task that asks another one's first questions many times, for pass@k."""


def columns(document: Document) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Task and mode of each column, with the (task, metric) pairs that it shows: the mean score, and behind it pass@k,
    from many samples to few questions where there are such."""
    found: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for arm in document["arms"].values():
        for entry in arm["scores"]:
            task, metric = entry["task"], entry["metric"]
            shown = found.setdefault((task.removesuffix(PASS), entry["mode"]), {})
            kind = metric.partition("@")[0]
            if task.endswith(PASS) == (kind == "pass"):
                shown[kind] = (task, metric)
            elif kind == "pass":
                shown.setdefault(kind, (task, metric))
    return {column: [shown[kind] for kind in ("avg", "pass") if kind in shown] for column, shown in found.items()}


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    # Without frames it fits into 80 columns; a cut-off figure would be worse than no table.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, no_wrap=True, justify="right")
    return table


def _scores(document: Document) -> Table:
    shown = columns(document)
    headings = [
        f"{task}\n{mode}\n{_with_others([metric for _, metric in metrics])}" for (task, mode), metrics in shown.items()
    ]
    table = _table(f"scores in per cent, {document['seeds']} seeds", ["arm"], [*headings, "FLOPs", "seconds"])
    for name, arm in document["arms"].items():
        means = {(entry["task"], entry["mode"], entry["metric"]): entry["mean"] for entry in arm["scores"]}
        cells = [
            _with_others([_points(means.get((task, mode, metric))) for task, metric in metrics])
            for (_, mode), metrics in shown.items()
        ]
        table.add_row(name, *cells, f"{arm['flops']:.1e}", f"{sum(arm['device_seconds'].values()):,.0f}")
    return table


def _seconds(document: Document) -> Table:
    roles = list(dict.fromkeys(role for arm in document["arms"].values() for role in arm["device_seconds"]))
    table = _table("device-seconds by role", ["arm"], [role.replace("_", "\n", 1) for role in roles])
    for name, arm in document["arms"].items():
        spent = (arm["device_seconds"].get(role) for role in roles)
        table.add_row(name, *("" if seconds is None else f"{seconds:,.1f}" for seconds in spent))
    return table


def _points(mean: float | None) -> str:
    return "-" if mean is None else f"{100 * mean:.1f}"


def _with_others(texts: Sequence[str]) -> str:
    """The first of ``texts``, the others in parentheses, as the report prints pass@64."""
    first, *others = texts
    return first + "".join(f" ({other})" for other in others)


def _differences(document: Document) -> Table:
    """The paired differences in the scores that the first table shows."""
    wanted = {(*metric, mode) for (_, mode), metrics in columns(document).items() for metric in metrics}
    table = _table("paired differences in points, 95 % intervals", ["a - b", "score"], ["difference"])
    for entry in document["paired"]:
        task, metric, mode = entry["task"], entry["metric"], entry["mode"]
        if (task, metric, mode) in wanted:
            low, high = (100 * end for end in entry["ci95"])
            difference = f"{100 * entry['difference']:+.1f} ({low:+.1f}, {high:+.1f})"
            table.add_row(f"{entry['a']} - {entry['b']}", f"{task.removesuffix(PASS)} {mode} {metric}", difference)
    return table


def _equal(arm: Document) -> str:
    """Its mean over the seeds, and the interval, which documents of earlier versions do not have."""
    if arm["mean"] is None:
        return "-"
    ci95 = arm.get("ci95")
    return f"{arm['mean']:.1%}" + ("" if ci95 is None else " ({:.1%} to {:.1%} over seeds)".format(*ci95))


def headlines(document: Document) -> list[str]:
    """Sentences for compute at equal score and score at equal compute; none where there is no such pair of arms."""
    ratio, equal = document["compute_at_equal_score"], document["score_at_equal_compute"]
    if ratio is None:
        return []
    a, b = ratio["a"], ratio["b"]
    if ratio["ratio"] is None:
        said = f"{a} reached {b}'s best validation score with {ratio['num_reached']} of {len(ratio['by_seed'])} seeds"
    else:
        interval = "" if ratio["ci95"] is None else " (95 % {:.3f} to {:.3f})".format(*ratio["ci95"])
        said = f"{a} reached {b}'s best validation score with {ratio['ratio']:.3f} of its FLOPs{interval}"
    scores = ", ".join(f"{name} {_equal(arm)}" for name, arm in equal["arms"].items())
    return [f"Compute at equal score: {said}.", f"Score at equal compute ({equal['flops']:.1e} FLOPs): {scores}."]
