"""``distill run --dry-run``: the configuration, what would run, and what it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError

if TYPE_CHECKING:
    from distill.comparison import ComparisonConfig
    from distill.config import RunConfig
    from distill.memory import Held
    from pipelines.plan import Plan


def print_dry_run(
    config: RunConfig,
    folder: Path,
    as_json: bool,
    *,
    processes: int | None,
    machines: int,
    asked: list[str],
    absent: Mapping[str, str],
) -> None:
    """A run's; ``processes`` are all of the run's where somebody says how many, ``asked`` as for a plan. ``absent`` are
    servers of the teacher that do not answer, with what is the matter."""
    from pipelines.rehearsal import rehearse

    rehearse(config, folder, processes=machines if processes is None else processes)
    waits = [
        f"wait for the teacher's server {url}, which does not answer now ({trouble}), and ask it what it is for; until "
        "then this configuration is without it"
        for url, trouble in absent.items()
    ]
    steps = [*waits, *_steps(config, folder)]
    held = _held(config, processes, machines)
    plan, obstacle = _plan(config, held, processes, machines, asked)
    if as_json:
        from pipelines.plan_document import document

        shown = {
            "out": str(folder),
            "config": config.model_dump(mode="json"),
            "plan": steps,
            "memory": None if held is None else held.to_json(),
            "estimate": None if plan is None else document(plan),
            "no_estimate": obstacle,
        }
        print(json.dumps(shown, allow_nan=False))
        return
    from distill.memory import GPU_BYTES
    from distill.recipe import dump_yaml
    from pipelines.plan_lines import lines

    print(dump_yaml(config), end="")
    _print_comment(f"into {folder}:", steps)
    if held is None:
        _print_comment("memory: the models' shapes are not known before they are opened", [])
    else:
        _print_comment("memory of the configuration as it is:", held.lines(GPU_BYTES))
    print("#")
    title = "the cheapest layout that fits, with what it changes (`distill plan --gpus ...` for other devices):"
    _print_comment(title, [f"none: {obstacle}"] if plan is None else list(lines(plan)))


def print_comparison_dry_run(config: ComparisonConfig, folder: Path, as_json: bool) -> None:
    """A comparison's: its runs."""
    from distill.recipe import dump_yaml
    from pipelines.comparison import check
    from pipelines.rehearsal import rehearse_comparison

    members = check(config, folder)
    rehearse_comparison(config, members, folder)
    runs = {str(member.folder(folder)): found for member, found in members}
    if as_json:
        shown = {path: found.model_dump(mode="json") for path, found in runs.items()}
        print(json.dumps({"out": str(folder), "config": config.model_dump(mode="json"), "runs": shown}))
    else:
        print(dump_yaml(config), end="")
        _print_comment("runs:", list(runs))


def _print_comment(title: str, lines: list[str]) -> None:
    """As comments of the YAML above it, so that the whole is still a recipe."""
    print(f"# {title}")
    for line in lines:
        print(f"#   {line}".rstrip())


def _steps(config: RunConfig, folder: Path) -> list[str]:
    """What the run would do, one after the other."""
    from distill.family import resolve

    teacher = resolve(config.teacher.model, role="teacher", revision=config.teacher.revision)
    student = resolve(config.student.model, role="student", revision=config.student.revision)
    return [
        f"teacher {teacher.name}: {teacher.location}",
        f"student {student.name}: {student.location}",
        f"examine the teacher and the start in {' and '.join(config.evaluation.modes)}",
        *(f"stage {name}: {settings.kind}, then examine" for name, settings in config.stages.items()),
        f"write {folder}/student, summary.json and report.html",
    ]


def _held(config: RunConfig, processes: int | None, machines: int) -> Held | None:
    """How the student would be held; None where a model's shape is not known before it is opened."""
    from distill.family import shape_of
    from distill.memory import hold_student

    student, teacher = shape_of(config.student.model), shape_of(config.teacher.model)
    if student is None or teacher is None:
        return None
    return hold_student(config, student, teacher, processes=processes, machines=machines)


def _plan(
    config: RunConfig, held: Held | None, processes: int | None, machines: int, asked: list[str]
) -> tuple[Plan | None, str | None]:
    """The plan for the usual devices, or why there is none."""
    from pipelines.planning import planned

    if held is None:
        return None, "the models' shapes are not known before they are opened"
    try:
        return planned(config, processes=processes, machines=machines, asked=asked), None
    except UserError as error:
        # What does not fit the usual devices may have others: a plan is asked for with `distill plan --gpus`.
        return None, str(error)
