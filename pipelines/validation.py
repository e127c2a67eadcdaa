"""Whether a file is one that the commands take: what ``distill config validate`` says of it.

A recipe of one run, of a comparison, or a job file, whose blocks are checked by what a worker, a schedule and a launch
read them with. Nothing is opened, and nothing is asked of the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.clusters import LaunchSettings
from distill.config import RunConfig
from distill.errors import UserError
from distill.jobs import BLOCKS, JobFile, split_job
from pipelines.job import check_new_data, resolve_runs
from pipelines.resolution import (
    assigned,
    check_names,
    is_comparison,
    is_of_job,
    recipe_tree,
    resolve_comparison,
    resolve_run,
)


def check_recipe(recipe: str, assignments: Sequence[str] = ()) -> str:
    """What ``recipe`` is, once all that is in it is known to be right (``check_names``).

    Raises UserError for anything that is wrong with a run of it or with one of its blocks.
    """
    tree = assigned(recipe_tree(recipe), assignments)
    job = split_job(tree, where=f"the recipe {recipe}")
    blocks = [block for block in BLOCKS if block != "sweep" and tree.get(block) is not None]
    if blocks and is_comparison(recipe):
        raise UserError(
            f"the recipe {recipe} is a comparison of several runs, which `distill run` makes, and has "
            f"{' and '.join(blocks)} of a job beside it; leave that out, or name a recipe of one run"
        )
    beside = f", with what it says of {' and '.join(blocks)}" if blocks else ""
    return f"{_check_runs(recipe, job, assignments)}{beside}"


def _check_runs(recipe: str, job: JobFile, assignments: Sequence[str]) -> str:
    path = Path(recipe)
    if job.sweep is not None:
        configs = resolve_runs(job, path)
        check_new_data(job.schedule, configs, path)
        _check_teachers(job, configs)
        return f"a sweep of {len(configs)} runs, {', '.join(str(config.name) for config in configs)}"
    own = [text for text in assignments if not is_of_job(text)]
    if is_comparison(recipe):
        return _check_comparison(recipe, own)
    config = resolve_run(recipe=recipe, assignments=own)
    _check_teachers(job, [config])
    check_names(config)
    check_new_data(job.schedule, [config], path)
    return f"{config.teacher.model} to {config.student.model}, stages {', '.join(config.stages)}"


def _check_teachers(job: JobFile, configs: Sequence[RunConfig]) -> None:
    # Where a job is launched, its plan says where the teacher is.
    for config in configs if job.launch == LaunchSettings() else ():
        config.check_teachers()


def _check_comparison(recipe: str, assignments: Sequence[str]) -> str:
    from pipelines.comparison import OFF_POLICY, check

    comparison = resolve_comparison(recipe, assignments=assignments)
    runs = check(comparison, Path("runs") / comparison.name)
    for member, config in runs:
        # The others' students are what these runs will leave.
        check_names(config, has_student=member.arm == OFF_POLICY)
    return f"a comparison of {len(runs)} runs"
