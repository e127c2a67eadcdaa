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
    console = Console(highlight=False)
    for start, found in document.get("starts", {"": document}).items():
        if start:
            console.print(f"Start: {start}", style="bold")
        console.print(_arms(found))
        console.print(_differences(found["paired"]))
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


def _arms(document: Document) -> Table:
    shown = columns(document)
    roles = list(dict.fromkeys(role for arm in document["arms"].values() for role in arm["device_seconds"]))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for (task, mode), metrics in shown.items():
        heading = _with_others([metric for _, metric in metrics])
        table.add_column(f"{task}\n{mode}\n{heading}", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    for role in roles:
        table.add_column(f"{role}\nseconds".replace("_", "\n", 1), justify="right", no_wrap=True)
    for name, arm in document["arms"].items():
        means = {(entry["task"], entry["mode"], entry["metric"]): entry["mean"] for entry in arm["scores"]}
        cells = [
            _with_others([_points(means.get((task, mode, metric))) for task, metric in metrics])
            for (_, mode), metrics in shown.items()
        ]
        seconds = [f"{arm['device_seconds'].get(role, 0.0):,.0f}" for role in roles]
        table.add_row(name, *cells, f"{arm['flops']:.1e}", *seconds)
    return table


def _points(mean: float | None) -> str:
    return "-" if mean is None else f"{100 * mean:.1f}"


def _with_others(texts: Sequence[str]) -> str:
    """The first of ``texts``, the others in parentheses, as the report prints pass@64."""
    first, *others = texts
    return first + "".join(f" ({other})" for other in others)


def _differences(paired: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="paired differences, points", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("a - b", "task", "mode", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("difference", "95 % interval"):
        table.add_column(name, no_wrap=True, justify="right")
    for entry in paired:
        low, high = entry["ci95"]
        table.add_row(
            f"{entry['a']} - {entry['b']}",
            *(entry[name] for name in ("task", "mode", "metric")),
            f"{100 * entry['difference']:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
        )
    return table


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
    scores = ", ".join(
        f"{name} {'-' if arm['mean'] is None else format(arm['mean'], '.1%')}" for name, arm in equal["arms"].items()
    )
    return [f"Compute at equal score: {said}.", f"Score at equal compute ({equal['flops']:.1e} FLOPs): {scores}."]
