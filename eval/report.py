"""One self-contained page about a run, made from the run directory's files alone.

No script, no font, no request: the page opens from a disk, prints, and follows the reader's light or dark setting.
A run that is not finished gets a page of what is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distill.errors import UserError
from distill.journal import read_json, write_atomically
from distill.types import MODES
from eval.figure import NUM_COLOURS, Series, line_chart, short
from eval.statistics import pass_at_k_estimate

MODE_NAMES = {"think": "thinking", "no_think": "non-thinking"}
NUM_QUESTIONS = 12
"""Questions in the sample browser."""

MOST_CHARACTERS = 4000
"""Characters of a thinking block or an answer that the sample browser shows."""

_TITLES = {
    "loss": "Loss",
    "reward": "Share of sampled responses that are right",
    "reverse_kl": "Reverse KL to the teacher (nats a token)",
    "forward_kl": "Forward KL to the teacher (nats a token)",
    "student_entropy": "The student's entropy (nats a token)",
    "teacher_entropy": "The teacher's entropy (nats a token)",
    "length": "Response length (tokens)",
    "closure": "Share with closed thinking",
    "truncation": "Share truncated",
    "repetition": "Share of repeated 4-grams",
}
"""The charts that are always shown, in this order; every other metric is in a fold below them."""

_SHARES = {"reward", "closure", "truncation", "repetition", "forced"}
_NOT_METRICS = {"stage", "step", "global_step"}

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its title and the legend's (colour, label) pairs (none for a single line)."""

    title: str
    svg: Markup
    legend: tuple[tuple[int, str], ...]


def write_report(run: Path) -> Path:
    """Write ``<run>/report.html`` and return its path. Raises UserError if ``run`` is no run directory."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is no run directory (it has no config.yaml); give the folder that distill run wrote")
    page = run / "report.html"
    write_atomically(page, render(run))
    return page


def render(run: Path) -> str:
    """The page as text."""
    summary: Document = _optional_json(run / "summary.json") or {}
    metrics = _metrics(run / "metrics.jsonl")
    evaluations = _evaluations(run / "eval", summary)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "short": short,
        "seconds": duration,
        "bytes": size,
        "shown": _shown,
    }
    page: str = environment.get_template("report.html.jinja").render(
        name=run.resolve().name,
        verdict=verdict(summary, evaluations),
        tasks=_by_task(evaluations),
        mode_names=MODE_NAMES,
        charts=_charts(metrics, main=True),
        more_charts=_charts(metrics, main=False),
        pass_charts=_pass_charts(evaluations),
        costs=_costs(summary.get("costs") or _optional_json(run / "costs.json") or {}, summary),
        browsers=[_browser(run / "eval", task, found) for task, found in _by_task(evaluations).items()],
        most_characters=MOST_CHARACTERS,
        manifest=_optional_json(run / "manifest.json") or {},
        config=(run / "config.yaml").read_text(encoding="utf-8"),
    )
    return page


def verdict(summary: Mapping[str, Any], evaluations: Sequence[Document]) -> list[str]:
    """What the run achieved: a sentence a mode."""
    if not summary:
        return ["This run is not finished; the page shows what is there so far."]
    names = list(dict.fromkeys(found["checkpoint"] for found in evaluations))
    student = f"the {_shown(names[-1])} student" if names else "the last student"
    sentences = []
    for mode, share in summary["gap_closed"].items():
        where = f"In {MODE_NAMES[mode]} mode"
        if share is None:
            sentences.append(f"{where} the teacher leads by no more than chance, so there is no gap to close.")
        elif share >= 1:
            sentences.append(f"{where} {student} reached the teacher ({percent(share, 0)} of the gap closed).")
        elif share >= 0:
            sentences.append(f"{where} {student} closed {percent(share, 0)} of the gap to the teacher.")
        else:
            sentences.append(f"{where} {student} fell back by {percent(-share, 0)} of the gap to the teacher.")
    return sentences


def _shown(name: str) -> str:
    """The name of a checkpoint or stage as the page writes it."""
    return name.replace("_", "-")


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def count(value: float) -> str:
    """A whole number with thousands apart, or 1.23e+14 from a billion on."""
    return f"{value:.2e}" if abs(value) >= 1e9 else f"{round(value):,}"


def duration(value: float) -> str:
    """Seconds for a reader: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def size(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _optional_json(path: Path) -> Document | None:
    return dict(read_json(path)) if path.exists() else None


def _metrics(path: Path) -> list[Document]:
    """A line a step; the last line of a run that was killed while writing it may be half, and is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise UserError(f"{path}, line {number + 1} is not JSON; restore the file or remove the line") from None
    return rows


def _evaluations(folder: Path, summary: Mapping[str, Any]) -> list[Document]:
    """The examinations by task, then in the order in which the run made them, thinking first."""
    # Documents of another kind (mode switching) have no page yet.
    found = [entry for path in sorted(folder.glob("*.json")) if "kind" not in (entry := _with_file(path))]
    order = list(dict.fromkeys(entry["checkpoint"] for entry in summary.get("scores", ())))
    order += sorted({entry["checkpoint"] for entry in found} - set(order), key=lambda name: (name != "teacher", name))
    tasks = list(dict.fromkeys(entry["task"] for entry in (*summary.get("scores", ()), *found)))
    return sorted(
        found,
        key=lambda entry: (
            tasks.index(entry["task"]),
            order.index(entry["checkpoint"]),
            MODES.index(entry["mode"]),
            entry["sampling"]["thinking_budget"] or math.inf,
        ),
    )


def _with_file(path: Path) -> Document:
    return {**read_json(path), "file": path.stem}


def _by_task(evaluations: Iterable[Document]) -> dict[str, list[Document]]:
    tasks: dict[str, list[Document]] = {}
    for found in evaluations:
        tasks.setdefault(found["task"], []).append(found)
    return tasks


def _group(key: str) -> str:
    """The chart that a metric belongs to: both modes of one quantity together."""
    first, _, rest = key.partition(".")
    return rest if first in MODES else first


def _charts(metrics: Sequence[Document], *, main: bool) -> list[Chart]:
    keys = list(dict.fromkeys(key for row in metrics for key, value in row.items() if _is_number(value)))
    groups: dict[str, list[str]] = {}
    for key in keys:
        if key not in _NOT_METRICS:
            groups.setdefault(_group(key), []).append(key)
    names = [name for name in _TITLES if name in groups] if main else sorted(groups.keys() - _TITLES.keys())
    boundaries = _boundaries(metrics)
    charts = []
    for name in names:
        # Where a quantity is there by mode, its mixture of both says nothing more.
        by_mode = [key for key in groups[name] if key.partition(".")[0] in MODES]
        shown = (by_mode or groups[name])[:NUM_COLOURS]
        series = [Series(_label(key), _pieces(metrics, key), _colour(key, place)) for place, key in enumerate(shown)]
        title = _TITLES.get(name, name.replace("_", " "))
        legend = tuple((line.colour, line.label) for line in series) if len(series) > 1 else ()
        svg = line_chart(title, series, boundaries=boundaries, share=name in _SHARES)
        charts.append(Chart(title, svg, legend))
    return charts


def _label(key: str) -> str:
    first = key.partition(".")[0]
    return MODE_NAMES[first] if first in MODES else key.rpartition(".")[2].replace("_", " ").replace(" kl", " KL")


def _colour(key: str, place: int) -> int:
    """Modes keep their colours (those of the score table) in every chart."""
    first = key.partition(".")[0]
    return MODES.index(first) if first in MODES else place


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(row: Document, number: int) -> float:
    return float(row.get("global_step", number + 1))


def _boundaries(metrics: Sequence[Document]) -> list[tuple[float, str]]:
    """The first step of each stage, with the stage's name."""
    found: list[tuple[float, str]] = []
    for number, row in enumerate(metrics):
        if not found or found[-1][1] != row["stage"]:
            found.append((_place(row, number), str(row["stage"])))
    return [(place, _shown(stage)) for place, stage in found]


def _pieces(metrics: Sequence[Document], key: str) -> tuple[tuple[tuple[float, float], ...], ...]:
    pieces: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(metrics):
        if _is_number(value := row.get(key)):
            pieces.setdefault(row["stage"], []).append((_place(row, number), float(value)))  # type: ignore[arg-type]
    return tuple(map(tuple, pieces.values()))


def _pass_charts(evaluations: Sequence[Document]) -> list[Chart]:
    """pass@k against k, a line a checkpoint, for each task and mode with enough samples."""
    charts = []
    for task, found in _by_task(evaluations).items():
        for mode in MODES:
            lines = [entry for entry in found if entry["mode"] == mode and entry["samples_per_question"] >= 4]
            if not lines:
                continue
            series = [
                Series(_shown(_checkpoint(entry)), (tuple(_pass_points(entry)),), place % NUM_COLOURS)
                for place, entry in enumerate(lines)
            ]
            title = f"pass@k against k: {task}, {MODE_NAMES[mode]}"
            svg = line_chart(title, series, share=True, doubling=True)
            charts.append(Chart(title, svg, tuple((line.colour, line.label) for line in series)))
    return charts


def _pass_points(entry: Document) -> list[tuple[float, float]]:
    most = min(map(len, entry["scores"].values()))
    powers = [2**exponent for exponent in range(most.bit_length())]
    return [(float(k), pass_at_k_estimate(entry["scores"], k).mean) for k in sorted({*powers, most})]


def _checkpoint(entry: Document) -> str:
    budget = entry["sampling"]["thinking_budget"]
    return str(entry["checkpoint"]) + ("" if budget is None else f" (budget {budget})")


def _costs(costs: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Document]:
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


def _browser(folder: Path, task: str, evaluations: Sequence[Document]) -> Document:
    """A few questions with every checkpoint's first answer in each mode.

    First come questions that the last student gets wrong in its first mode, then those it learned, then others.
    """
    answers: dict[str, dict[str, dict[str, Document]]] = {}
    for found in evaluations:
        for row in _first_samples(folder / f"{found['file']}.parquet"):
            answers.setdefault(row["prompt_id"], {}).setdefault(_checkpoint(found), {})[found["mode"]] = row
    names = list(dict.fromkeys(_checkpoint(found) for found in evaluations))
    students = [name for name in names if name != "teacher"]

    def kind(by_name: Mapping[str, Mapping[str, Document]]) -> str:
        right = [next(iter(by_name[name].values()))["correct"] for name in students if name in by_name]
        return "" if not right else "wrong" if not right[-1] else "learned" if not all(right) else "right"

    groups: dict[str, list[str]] = {"wrong": [], "learned": [], "right": [], "": []}
    for prompt_id, by_name in answers.items():
        groups[kind(by_name)].append(prompt_id)
    third = NUM_QUESTIONS // 3
    chosen = [prompt_id for group in groups.values() for prompt_id in group[:third]]
    chosen += [prompt_id for prompt_id in answers if prompt_id not in chosen][: NUM_QUESTIONS - len(chosen)]
    questions = [_question(answers[prompt_id], names, kind(answers[prompt_id])) for prompt_id in chosen]
    return {"task": task, "questions": questions, "num_questions": len(answers)}


def _question(by_name: Mapping[str, Mapping[str, Document]], names: Sequence[str], kind: str) -> Document:
    any_row = next(iter(next(iter(by_name.values())).values()))
    return {
        "prompt": any_row["prompt"],
        "reference": any_row["reference"],
        "kind": kind,
        "answers": {name: by_name[name] for name in names if name in by_name},
    }


def _first_samples(path: Path) -> list[Document]:
    if not path.exists():
        return []
    import pyarrow.parquet

    columns = ["prompt_id", "prompt", "reference", "response", "thinking", "answer", "correct", "closed", "num_tokens"]
    table = pyarrow.parquet.read_table(path, columns=[*columns, "finish_reason"], filters=[("sample", "=", 0)])
    rows: list[Document] = table.to_pylist()
    return rows
