"""``distill schedule``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import JobName, JobOut, Json, QueueFolder

if TYPE_CHECKING:
    from pipelines.schedule import Schedules

app = typer.Typer(help="Jobs that run again and again.", no_args_is_help=True)

RECENT = 20

Name = Annotated[str, typer.Argument(help="A schedule's name.")]


def _schedules(folder: Path | None, *, create: bool = False) -> Schedules:
    from pipelines.database import default_folder
    from pipelines.queue import Queue
    from pipelines.schedule import Schedules

    return Schedules(Queue(folder or default_folder(), create=create))


@app.command("add")
def schedule_add(
    file: Annotated[Path, typer.Argument(help="A job file: a recipe, with or without a schedule block.")],
    cron: Annotated[str | None, typer.Option(help="When it comes due: 'minute hour day month weekday'.")] = None,
    timezone: Annotated[str | None, typer.Option(help="The clock of --cron, such as Europe/Berlin.")] = None,
    name: JobName = None,
    out: JobOut = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of the one of its name.")] = False,
    queue: QueueFolder = None,
    as_json: Json = False,
) -> None:
    """Have the job in FILE come due; a worker (distill worker) runs it.

    FILE is read now: to change the schedule later, add it again with --replace.

    Examples:

      distill schedule add nightly.yaml --cron "0 2 * * *" --timezone Europe/Berlin

      distill schedule add weekly.yaml --out /data/runs/weekly
    """
    from pipelines.board import print_schedule
    from pipelines.job import resolve_job
    from pipelines.schedule import timetable_of

    # First: a job that is none leaves no queue behind.
    spec = resolve_job(file, name=name, out=out, schedule={"cron": cron, "timezone": timezone})
    timetable_of(spec)
    schedules = _schedules(queue, create=True)
    added = schedules.add(spec, replace=replace)
    document = {**added.to_json(), "upcoming": schedules.upcoming(added)}
    if as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        print_schedule(document)


@app.command("list")
def schedule_list(queue: QueueFolder = None, as_json: Json = False) -> None:
    """List the schedules with the next time each comes due.

    Example:

      distill schedule list --json
    """
    from pipelines.board import print_schedules
    from pipelines.database import is_unused

    documents = [] if is_unused(queue) else [schedule.to_json() for schedule in _schedules(queue).all()]
    if as_json:
        print(json.dumps({"schedules": documents}, allow_nan=False))
    else:
        print_schedules(documents)


@app.command("show")
def schedule_show(name: Name, queue: QueueFolder = None, as_json: Json = False) -> None:
    """Show a schedule: its settings, its newest jobs, what it missed and why.

    Example:

      distill schedule show nightly
    """
    from pipelines.board import print_jobs, print_missed, print_schedule

    schedules = _schedules(queue)
    found = schedules.get(name)
    document = {
        **found.to_json(),
        "upcoming": schedules.upcoming(found),
        "jobs": [job.to_json() for job in schedules.queue.jobs(schedule=name, last=RECENT)],
        "missed": schedules.missed(name),
    }
    if as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        print_schedule(document)
        print_jobs(document["jobs"])
        print_missed(document["missed"])


@app.command("pause")
def schedule_pause(name: Name, queue: QueueFolder = None, as_json: Json = False) -> None:
    """Make no jobs of a schedule until it is resumed; what comes due meanwhile is recorded as missed.

    Example:

      distill schedule pause nightly
    """
    _pause(name, queue, as_json, paused=True)


@app.command("resume")
def schedule_resume(name: Name, queue: QueueFolder = None, as_json: Json = False) -> None:
    """Make jobs of a paused schedule again, from its next due time on.

    Example:

      distill schedule resume nightly
    """
    _pause(name, queue, as_json, paused=False)


def _pause(name: str, queue: Path | None, as_json: bool, *, paused: bool) -> None:
    schedule = _schedules(queue).pause(name, paused=paused)
    if as_json:
        print(json.dumps(schedule.to_json(), allow_nan=False))
    else:
        print(f"{name} is {'paused' if paused else 'on'}")


@app.command("remove")
def schedule_remove(name: Name, queue: QueueFolder = None, as_json: Json = False) -> None:
    """Forget a schedule. Its jobs stay; those that are not finished are named.

    Example:

      distill schedule remove nightly
    """
    left = [job.id for job in _schedules(queue).remove(name)]
    if as_json:
        print(json.dumps({"name": name, "unfinished_jobs": left}))
        return
    print(f"{name} is removed")
    for job in left:
        print(f"job {job} of it is not finished; distill queue cancel {job} takes it out")


@app.command("run-now")
def schedule_run_now(name: Name, queue: QueueFolder = None, as_json: Json = False) -> None:
    """Make a job of a schedule at once, besides those that come due.

    Example:

      distill schedule run-now nightly
    """
    job = _schedules(queue).run_now(name)
    print(json.dumps(job.to_json(), allow_nan=False) if as_json else f"job {job.id} of {name} is queued")
