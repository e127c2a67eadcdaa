"""``distill plan``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from distill.cli.options import DEAREST, LONGEST, Assignments, Hardware, Json, Prompts, Recipe, Student, Teacher

Gpus = Annotated[
    str | None, typer.Option(help="What both share: 8xH200, or 2x8xH100 for two machines. Default: the fewest H100.")
]
GpusTeacher = Annotated[str | None, typer.Option(help="The teacher's own, with --gpus-student.")]
GpusStudent = Annotated[str | None, typer.Option(help="The student's own, with --gpus-teacher.")]
Price = Annotated[float | None, typer.Option(min=0.0, max=DEAREST, help="USD for an hour of one GPU.")]
PromptTokens = Annotated[float | None, typer.Option(min=1.0, max=LONGEST, help="Tokens of a prompt on the mean.")]
ThinkTokens = Annotated[float | None, typer.Option(min=1.0, max=LONGEST, help="Of a response with thinking.")]
NoThinkTokens = Annotated[float | None, typer.Option(min=1.0, max=LONGEST, help="Of a response without.")]
Calibrate = Annotated[bool, typer.Option("--calibrate", help="Measure this machine first, and keep what was measured.")]


def plan(
    teacher: Teacher = None,
    student: Student = None,
    gpus: Gpus = None,
    gpus_teacher: GpusTeacher = None,
    gpus_student: GpusStudent = None,
    hardware: Hardware = None,
    price: Price = None,
    prompt_tokens: PromptTokens = None,
    think_tokens: ThinkTokens = None,
    no_think_tokens: NoThinkTokens = None,
    prompts: Prompts = None,
    recipe: Recipe = None,
    assignments: Assignments = None,
    calibrate: Calibrate = False,
    as_json: Json = False,
) -> None:
    """What a run needs before it spends anything: what fits, the cheapest layout, time, GPU-hours, money, disk.

    Where nothing fits it says what would, and ends with exit code 2.

    Examples:

      distill plan --teacher 235B --student 4B --gpus 8xH200 --price 3.5

      distill plan --teacher 235B --student 8B --gpus-teacher 8xH100 --gpus-student 8xA100-80

      distill plan --calibrate                         this machine, measured, and the embedded pair on it
    """
    from pipelines.planning import planned
    from pipelines.resolution import resolve_run

    if calibrate:
        from distill.interrupt import deferred_signals

        with deferred_signals():
            from pipelines.calibration import calibrate as measure

            measure()
    config = resolve_run(
        recipe=recipe, teacher=teacher, student=student, prompts=prompts, assignments=assignments or ()
    )
    found = planned(
        config,
        gpus=gpus,
        gpus_teacher=gpus_teacher,
        gpus_student=gpus_student,
        hardware=hardware,
        price=price,
        lengths={"prompt": prompt_tokens, "think": think_tokens, "no_think": no_think_tokens},
        asked=words(prompts=prompts, recipe=recipe, assignments=assignments),
    )
    from pipelines.plan_document import document
    from pipelines.plan_lines import lines

    print(json.dumps(document(found), allow_nan=False) if as_json else "\n".join(lines(found)))


def words(*, prompts: str | None, recipe: str | None, assignments: list[str] | None) -> list[str]:
    """What a command is given beside its models."""
    given = [("--prompts", prompts), ("--recipe", recipe), *(("--set", text) for text in assignments or ())]
    return [word for option, value in given if value is not None for word in (option, value)]
