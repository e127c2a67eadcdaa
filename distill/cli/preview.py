"""``distill preview``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from distill.cli.options import Assignments, Json, Prompts, Recipe, Seed, Student, Teacher

MOST = 10_000
"""More prompts nobody reads, and each is rendered before any is shown."""


def preview(
    recipe: Recipe = None,
    teacher: Teacher = None,
    student: Student = None,
    prompts: Prompts = None,
    seed: Seed = None,
    assignments: Assignments = None,
    num: Annotated[int, typer.Option("--first", min=1, max=MOST, help="Prompts of each stage that are shown.")] = 2,
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a run's models will read and learn: rendered prompts, modes, token counts, what carries loss.

    No model is loaded. The teacher's responses are shown where the store holds them.

    Examples:

      distill preview

      distill preview --teacher 4B --student 0.6B --prompts my.jsonl --first 5

      distill preview --recipe my.yaml --stage on_policy --json
    """
    from pipelines.preview import preview as preview_run
    from pipelines.preview import print_preview
    from pipelines.resolution import resolve_run

    config = resolve_run(
        recipe=recipe, teacher=teacher, student=student, prompts=prompts, seed=seed, assignments=assignments or ()
    )
    document = preview_run(config, num=num, stage=stage)
    if as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        print_preview(document)
