"""``distill eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli.options import MANY, Json, numbers_of
from distill.errors import UserError

if TYPE_CHECKING:
    from distill.evaluation_config import TaskSettings


Checkpoint = Annotated[
    str, typer.Argument(help="A model folder, a run, an embedded or size name, a hub id, or a vLLM server's URL.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="A task's name, mode_switching, or a JSONL file with prompt and answer [default: embedded]"),
]
Data = Annotated[Path | None, typer.Option(help="Local copy of the task's set, or prompts to converse on.")]
ModeName = Annotated[str, typer.Option(help="think, no_think or both.")]
Budgets = Annotated[list[str] | None, typer.Option(help="Thinking budgets in tokens: 8,16,24, or the option repeated.")]
Samples = Annotated[
    int | None,
    typer.Option(min=1, max=MANY, help="Responses to each question [default: the task's; 64 for AIME, else 1]"),
]
PassAt = Annotated[
    list[str] | None, typer.Option(help="The k of pass@k, like --budget [default: the number of samples]")
]
Questions = Annotated[
    int | None,
    typer.Option(min=1, max=MANY, help="Only the task's first questions; conversations of mode_switching."),
]
Longest = Annotated[int | None, typer.Option(min=1, max=MANY, help="Longest response [default: the report's]")]
Tokenizer = Annotated[
    str | None, typer.Option(help="For a server's URL: size name, hub id or folder of the model that it serves.")
]
ResponseSeed = Annotated[int, typer.Option(min=0, max=2**53, help="Seed of the responses.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for scores and per-sample parquet; resumes [default: a run's own, else none]"),
]


def evaluate(
    checkpoint: Checkpoint,
    task: Tasks = None,
    data: Data = None,
    mode: ModeName = "both",
    budget: Budgets = None,
    samples: Samples = None,
    pass_at: PassAt = None,
    questions: Questions = None,
    max_new_tokens: Longest = None,
    tokenizer: Tokenizer = None,
    seed: ResponseSeed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Examine a checkpoint on tasks, in one mode or both, with the report's prompts and sampling for each mode.

    With --budget, thinking is cut at each budget by the early-stop string; with --mode both, thinking without a budget
    and non-thinking are there for comparison.

    Examples:

      distill eval nano --task embedded --mode both --samples 4

      distill eval runs/tiny-to-nano --budget 8,16,24,48 --json

      distill eval runs/tiny-to-nano --task mode_switching

      distill eval http://127.0.0.1:8000 --tokenizer 4B --task gsm8k --data /data/gsm8k
    """
    from distill.interrupt import deferred_signals

    with deferred_signals():
        from pipelines.examination import examine

        scores = examine(
            checkpoint,
            tasks=_tasks(task or ["embedded"], data, numbers_of(pass_at, "--pass-at")),
            modes=_modes(mode),
            budgets=numbers_of(budget, "--budget"),
            samples=samples,
            num_questions=questions,
            max_new_tokens=max_new_tokens,
            seed=seed,
            out=out,
            tokenizer=tokenizer,
        )
    if as_json:
        print(json.dumps(scores, allow_nan=False))
    else:
        from eval.table import print_scores

        print_scores([*scores["scores"], *scores["slices"]])


def _tasks(names: list[str], data: Path | None, pass_at: tuple[int, ...]) -> list[TaskSettings]:
    from eval.tasks import settings_of

    if data is not None and len(names) > 1:
        raise UserError(f"--data is one task's, and there are {len(names)}; give the command once for each")
    found = [settings_of(name) for name in names]
    if data is not None and found[0].path is not None:
        raise UserError(f"--task {names[0]} is a file itself; leave --data {data} out")
    more: dict[str, Any] = {"pass_at": pass_at} | ({} if data is None else {"path": str(data)})
    return [settings.model_copy(update=more) for settings in found]


def _modes(mode: str) -> tuple[Any, ...]:
    from distill.types import MODES

    if mode == "both":
        return MODES
    if mode not in MODES:
        raise UserError(f"--mode {mode!r} is none of {', '.join(MODES)}, both")
    return (mode,)
