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
    NodeAddress,
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


Out = Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")]
StoreFolder = Annotated[str | None, typer.Option(help="Folder of the teacher-response store.")]
TeacherUrls = Annotated[
    list[str] | None,
    typer.Option("--teacher-url", help="A vLLM server of the teacher that runs already; again for a further one."),
]
Processes = Annotated[
    int | None, typer.Option(min=1, max=PROCESSES, help="Processes that share the work; default one a GPU, else one.")
]
Nodes = Annotated[int, typer.Option("--nodes", min=1, max=MACHINES, help="Machines with as many processes each.")]
NodeRank = Annotated[int, typer.Option(min=0, max=MACHINES - 1, help="This machine's number among them, from 0 on.")]
SkipPreflight = Annotated[
    list[str] | None, typer.Option("--skip-preflight", metavar="NAME", help="Leave out one check; recorded.")
]
Quick = Annotated[bool, typer.Option("--quick", help="The short variant of a comparison.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the configuration and what would run.")]


OF_A_RUN = (
    "teacher",
    "student",
    "prompts",
    "teacher_urls",
    "processes",
    "num_nodes",
    "node_rank",
    "node_address",
    "store",
    "skip_preflight",
)
"""Options that a comparison has no use for: its recipe says it of all its runs."""


def run(
    context: typer.Context,
    teacher: Teacher = None,
    student: Student = None,
    prompts: Prompts = None,
    out: Out = None,
    seed: Seed = None,
    store: StoreFolder = None,
    recipe: Recipe = None,
    assignments: Assignments = None,
    teacher_urls: TeacherUrls = None,
    processes: Processes = None,
    num_nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    node_address: NodeAddress = None,
    skip_preflight: SkipPreflight = None,
    quick: Quick = False,
    dry_run: DryRun = False,
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

    given = assignments or []
    if recipe is not None and is_comparison(recipe):
        _refuse_options_of_a_run(context, recipe)
        _compare(recipe, out, seed, quick, given, dry_run, as_json)
        return
    if quick:
        raise UserError("--quick is the short variant of a comparison; give --recipe table21 with it, or leave it out")
    served, absent = _served(teacher_urls or [], waits=not dry_run)
    given = [*given, *served]
    overrides = {"store": store, "preflight.skip": skip_preflight}
    laid = [*given, *(f"{key}={json.dumps(value)}" for key, value in overrides.items() if value)]
    config = resolve_run(recipe=recipe, teacher=teacher, student=student, prompts=prompts, seed=seed, assignments=laid)
    folder, nodes = out or Path("runs") / str(config.name), (num_nodes, node_rank, node_address)
    if dry_run:
        asked = words(prompts=prompts, recipe=recipe, assignments=given)
        _rehearse(config, folder, as_json, processes, nodes, asked, absent)
    else:
        _start(config, folder, as_json, processes, nodes)


def _served(urls: list[str], *, waits: bool) -> tuple[list[str], dict[str, str]]:
    """The assignments that have a run use servers which run already; and which of them do not answer, with what is the
    matter, where nobody waits for them."""
    if not urls:
        return [], {}
    from pipelines.hiring import found_servers, seen_servers

    return (found_servers(urls), {}) if waits else seen_servers(urls)


def _rehearse(
    config: RunConfig,
    folder: Path,
    as_json: bool,
    processes: int | None,
    nodes: tuple[int, int, str | None],
    asked: list[str],
    absent: dict[str, str],
) -> None:
    """Say what would run."""
    from distill.cli.dry_run import print_dry_run

    num_nodes = nodes[0]
    if nodes != (1, 0, None):
        from pipelines.processes import Machines

        one_of_many(Machines, *nodes)
    everywhere = None if processes is None else processes * num_nodes
    print_dry_run(config, folder, as_json, processes=everywhere, machines=num_nodes, asked=asked, absent=absent)


def _start(
    config: RunConfig, folder: Path, as_json: bool, processes: int | None, nodes: tuple[int, int, str | None]
) -> None:
    """Do the work in this process, as one of several or alone, or start the processes that do."""
    from pipelines.processes import Machines, own_command, processes_to_start, run_processes

    machines = one_of_many(Machines, *nodes)
    count = processes_to_start(processes, num_machines=nodes[0])
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


def _refuse_options_of_a_run(context: typer.Context, recipe: str) -> None:
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name in OF_A_RUN and source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"{option.opts[0]} is an option of a single run, and the recipe {recipe} compares several; say it for "
                "all of them, for example --set common.teacher.model=NAME"
            )


def _compare(
    recipe: str, out: Path | None, seed: int | None, quick: bool, assignments: list[str], dry_run: bool, as_json: bool
) -> None:
    """Run a comparison, or say what would run."""
    from pipelines.resolution import resolve_comparison

    config = resolve_comparison(recipe, quick=quick, seed=seed, assignments=assignments)
    folder = out or Path("runs") / (f"{config.name}-quick" if quick else config.name)
    if dry_run:
        from distill.cli.dry_run import print_comparison_dry_run

        print_comparison_dry_run(config, folder, as_json)
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
