"""What a run directory holds, read for a page: a run that is not finished, or never measured something, has less."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.journal import read_json
from distill.types import MODES
from eval.page import Document
from eval.switching import TASK as MODE_SWITCHING

LATER = "later"
"""The folder below eval/ with what ``distill eval RUN`` found of the run's student after the run."""

STUDENT = "student"
"""What a page calls the checkpoint that was examined later."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run. Examinations carry their file's path without its ending as ``file``."""

    path: Path
    config: str
    summary: Document
    manifest: Document
    costs: Document
    metrics: Sequence[Document]
    curve: Sequence[Document]
    samples: Sequence[Document]
    warnings: Sequence[Document]
    evaluations: Sequence[Document]
    """Those that the run made, by task, then in its order, thinking first."""
    later: Sequence[Document]
    """Those that were made of its student since."""
    switching: Sequence[Document]

    @classmethod
    def read(cls, run: Path) -> RunFiles:
        """Raises UserError where a file of ``run`` is damaged."""
        summary = _optional(run / "summary.json")
        own, later = _documents(run / "eval"), _documents(run / "eval" / LATER)
        # The file is named by the folder it was asked for by; on the page it is the run's student.
        later = [{**found, "checkpoint": STUDENT} for found in later]
        order = list(dict.fromkeys(entry["checkpoint"] for entry in summary.get("scores", ())))
        order += sorted({found["checkpoint"] for found in own} - set(order), key=lambda name: (name != "teacher", name))
        tasks = list(dict.fromkeys(entry["task"] for entry in summary.get("scores", ())))
        return cls(
            path=run,
            config=(run / "config.yaml").read_text(encoding="utf-8"),
            summary=summary,
            manifest=_optional(run / "manifest.json"),
            costs=summary.get("costs") or _optional(run / "costs.json"),
            metrics=read_lines(run / "metrics.jsonl"),
            curve=read_lines(run / "curve.jsonl"),
            samples=read_lines(run / "samples.jsonl"),
            warnings=read_lines(run / "warnings.jsonl"),
            evaluations=_sorted([found for found in own if "kind" not in found], tasks, order),
            later=_sorted([found for found in later if "kind" not in found], tasks, [STUDENT]),
            switching=sorted(
                (found for found in (*own, *later) if found.get("kind") == MODE_SWITCHING),
                key=lambda found: [*order, STUDENT].index(found["checkpoint"]),
            ),
        )


def read_lines(path: Path) -> list[Document]:
    """The objects of a .jsonl file; the last line of a run that was killed while writing it may be half, and is left
    out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise UserError(f"{path}, line {number + 1} is not JSON; restore the file or remove the line") from None
    return rows


def by_task(evaluations: Sequence[Document]) -> dict[str, list[Document]]:
    tasks: dict[str, list[Document]] = {}
    for found in evaluations:
        tasks.setdefault(found["task"], []).append(found)
    return tasks


def has_budget(evaluation: Mapping[str, Any]) -> bool:
    return evaluation["sampling"]["thinking_budget"] is not None


def _optional(path: Path) -> Document:
    return dict(read_json(path)) if path.exists() else {}


def _documents(folder: Path) -> list[Document]:
    return [{**read_json(path), "file": str(path.with_suffix(""))} for path in sorted(folder.glob("*.json"))]


def _sorted(found: Sequence[Document], tasks: Sequence[str], checkpoints: Sequence[str]) -> list[Document]:
    every_task = list(dict.fromkeys((*tasks, *(entry["task"] for entry in found))))
    return sorted(
        found,
        key=lambda entry: (
            every_task.index(entry["task"]),
            checkpoints.index(entry["checkpoint"]),
            MODES.index(entry["mode"]),
            entry["sampling"]["thinking_budget"] or 0,
        ),
    )
