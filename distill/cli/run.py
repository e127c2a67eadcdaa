"""``distill run``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import (
    MACHINES,
    PROCESSES,
    Assignments,
    Json,
    Prompts,
    Recipe,
    Seed,
    Student,
    Teacher,
    one_of_many,
)
from distill.cli.plan import words
from distill.errors import DistillError, UserError
from distill.interrupt import EXIT_CODES
from distill.progress import say

if TYPE_CHECKING:
    from distill.config import RunConfig


def run(
    teacher: Teacher = None,
    student: Student = None,
    prompts: Prompts = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    seed: Seed = None,
    store: Annotated[str | None, typer.Option(help="Folder of the teacher-response store.")] = None,
    recipe: Recipe = None,
    assignments: Assignments = None,
    teacher_urls: Annotated[
        list[str] | None,
        typer.Option("--teacher-url", help="A vLLM server of the teacher that runs already; again for a further one."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=PROCESSES, help="Processes that share the work; default one a GPU, else one."),
    ] = None,
    num_nodes: Annotated[
        int, typer.Option("--nodes", min=1, max=MACHINES, help="Machines with as many processes each.")
    ] = 1,
    node_rank: Annotated[
        int, typer.Option(min=0, max=MACHINES - 1, help="This machine's number among them, from 0 on.")
    ] = 0,
    node_address: Annotated[
        str | None, typer.Option("--node-address", help="Where machine 0 is for the others, as HOST or HOST:PORT.")
    ] = None,
    skip_preflight: Annotated[
        list[str] | None, typer.Option("--skip-preflight", metavar="NAME", help="Leave out one check; recorded.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The short variant of a comparison.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and what would run.")] = False,
    as_json: Json = False,
) -> None:
    """Distil TEACHER into STUDENT: both stages, examined before, between and after. Or run a comparison of methods.

    The same command again resumes an interrupted run; on a finished one it prints the summary.

    Examples:

      distill run                                      the embedded pair, minutes on a CPU

      distill run --teacher 4B --student 0.6B --prompts my.jsonl --out runs/mine

      distill run --seed 1 --out runs/seed1 --set stages.on_policy.steps=100

      distill run --teacher 32B --student 4B --teacher-url http://gpu-1:8000 --teacher-url http://gpu-2:8000

      distill run --recipe table21 --quick             distillation against reinforcement learning, the short variant
    """
    from pipelines.resolution import is_comparison, resolve_run

    if is_comparison(recipe):
        assert recipe is not None
        given = {
            "--teacher": teacher,
            "--student": student,
            "--prompts": prompts,
            "--teacher-url": teacher_urls,
            "--processes": processes,
            "--nodes": None if num_nodes == 1 else num_nodes,
            "--node-rank": node_rank or None,
            "--node-address": node_address,
            "--store": store,
            "--skip-preflight": skip_preflight,
        }
        _refuse([option for option, value in given.items() if value is not None], recipe)
        _compare(recipe, out, seed, quick, assignments or [], dry_run, as_json)
        return
    if quick:
        raise UserError("--quick is the short variant of a comparison; give --recipe table21 with it, or leave it out")
    if teacher_urls:
        from pipelines.hiring import found_servers

        assignments = [*(assignments or []), *found_servers(teacher_urls)]
    config = resolve_run(
        recipe=recipe,
        teacher=teacher,
        student=student,
        prompts=prompts,
        seed=seed,
        assignments=[
            *(assignments or []),
            *([f"store={json.dumps(store)}"] if store else []),
            *([f"preflight.skip={json.dumps(skip_preflight)}"] if skip_preflight else []),
        ],
    )
    folder = out or Path("runs") / str(config.name)
    if dry_run:
        if num_nodes > 1 or node_rank or node_address is not None:
            from pipelines.launch import Machines

            one_of_many(Machines, num_nodes, node_rank, node_address)
        asked = words(prompts=prompts, recipe=recipe, assignments=assignments)
        everywhere = None if processes is None else processes * num_nodes
        _print_dry_run(config, folder, as_json, processes=everywhere, asked=asked)
        return
    from pipelines.launch import Machines, own_command, processes_to_start, run_processes

    machines = one_of_many(Machines, num_nodes, node_rank, node_address)
    count = processes_to_start(processes, num_machines=num_nodes)
    if count > 1 or (machines is not None and "RANK" not in os.environ):
        sys.exit(run_processes(own_command(sys.argv[1:]), count, machines))
    _distil(config, folder, as_json)


def _distil(config: RunConfig, folder: Path, as_json: bool) -> None:
    """This process's part of a run, and its summary."""
    from distill.interrupt import deferred_signals

    with deferred_signals():
        from pipelines.strong_to_weak import run as run_pipeline
        from students.ranks import joined_ranks

        with joined_ranks() as ranks, _safe("run", folder):
            summary = run_pipeline(config, folder, command=["distill", *sys.argv[1:]], ranks=ranks)
        if not ranks.is_main:
            return
    if as_json:
        print(json.dumps(summary, allow_nan=False))
    else:
        from eval.table import print_summary

        print_summary(summary)


@contextmanager
def _safe(what: str, folder: Path) -> Iterator[None]:
    """Says of what was stopped on request that nothing is lost."""
    try:
        yield
    except DistillError as error:
        if error.exit_code in EXIT_CODES.values():
            say(f"The {what} is safe in {folder}; the same command resumes it.")
        raise


def _refuse(options: list[str], recipe: str) -> None:
    if options:
        raise UserError(
            f"{options[0]} is an option of a single run, and the recipe {recipe} compares several; say it for all of "
            "them, for example --set common.teacher.model=NAME"
        )


def _compare(
    recipe: str, out: Path | None, seed: int | None, quick: bool, assignments: list[str], dry_run: bool, as_json: bool
) -> None:
    """Run a comparison, or say what would run."""
    from pipelines.resolution import resolve_comparison

    config = resolve_comparison(recipe, quick=quick, seed=seed, assignments=assignments)
    folder = out or Path("runs") / (f"{config.name}-quick" if quick else config.name)
    if dry_run:
        from distill.recipe import dump_yaml
        from pipelines.comparison import check

        runs = {str(member.folder(folder)): found for member, found in check(config, folder)}
        if as_json:
            shown = {path: found.model_dump(mode="json") for path, found in runs.items()}
            print(json.dumps({"out": str(folder), "config": config.model_dump(mode="json"), "runs": shown}))
        else:
            print(dump_yaml(config), end="")
            print("\n".join(["# runs:", *(f"#   {path}" for path in runs)]))
        return
    from distill.interrupt import deferred_signals

    with deferred_signals():
        from pipelines.comparison import run_comparison

        with _safe("comparison", folder):
            document = run_comparison(config, folder)
    if as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        from eval.comparison_table import print_comparison

        print_comparison(document)


def _print_dry_run(config: RunConfig, folder: Path, as_json: bool, *, processes: int | None, asked: list[str]) -> None:
    from distill.family import resolve, shape_of
    from distill.memory import GPU_BYTES, Planned, plan
    from distill.recipe import dump_yaml
    from pipelines.plan_document import document
    from pipelines.plan_lines import lines
    from pipelines.planning import planned as estimated

    teacher = resolve(config.teacher.model, role="teacher", revision=config.teacher.revision)
    student = resolve(config.student.model, role="student", revision=config.student.revision)
    shapes = shape_of(config.student.model), shape_of(config.teacher.model)
    planned = None if None in shapes else plan(config, *shapes, processes=processes)  # type: ignore[arg-type]
    estimate, obstacle = None, "the models' shapes are not known before they are opened"
    if planned is not None:
        try:
            estimate = estimated(config, processes=processes, asked=asked)
        except UserError as error:
            # What does not fit the usual devices may have others: a plan is asked for with `distill plan --gpus`.
            obstacle = str(error)
    steps = [
        f"teacher {teacher.name}: {teacher.location}",
        f"student {student.name}: {student.location}",
        f"examine the teacher and the start in {' and '.join(config.evaluation.modes)}",
        *(f"stage {name}: {settings.kind}, then examine" for name, settings in config.stages.items()),
        f"write {folder}/student, summary.json and report.html",
    ]
    if as_json:
        shown = {
            "out": str(folder),
            "config": config.model_dump(mode="json"),
            "plan": steps,
            "memory": None if planned is None else planned.to_json(),
            "estimate": None if estimate is None else document(estimate),
            "no_estimate": obstacle if estimate is None else None,
        }
        print(json.dumps(shown, allow_nan=False))
        return
    print(dump_yaml(config), end="")
    print(f"# into {folder}:")
    for line in steps:
        print(f"#   {line}")
    if isinstance(planned, Planned):
        print("# memory of the configuration as it is:")
        for line in planned.lines(GPU_BYTES):
            print(f"#   {line}")
    else:
        print("# memory: the models' shapes are not known before they are opened")
    print("#\n# the cheapest layout that fits, with what it changes (`distill plan --gpus ...` for other devices):")
    for line in [f"none: {obstacle}"] if estimate is None else lines(estimate):
        print(f"#   {line}".rstrip())
