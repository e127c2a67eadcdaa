"""``distill queue``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import JobName, JobOut, Json, QueueFolder
from distill.errors import UserError
from distill.progress import say

if TYPE_CHECKING:
    from pipelines.queue import Job, Queue

app = typer.Typer(help="Jobs: waiting, running and finished.", no_args_is_help=True)

JobId = Annotated[int, typer.Argument(min=1, max=2**63 - 1, help="A job's number.")]
RECENT = 20


def _queue(folder: Path | None, *, create: bool = False) -> Queue:
    from pipelines.database import default_folder
    from pipelines.queue import Queue

    return Queue(folder or default_folder(), create=create)


@app.command("list")
def queue_list(
    schedule: Annotated[str | None, typer.Option(help="Only jobs of this schedule.")] = None,
    last: Annotated[int, typer.Option(min=1, max=2**63 - 1, help="How many that are finished, the newest.")] = RECENT,
    queue: QueueFolder = None,
    as_json: Json = False,
) -> None:
    """List the jobs that wait or run, and the newest that are finished, with what became of them.

    Example:

      distill queue list --schedule nightly --last 7
    """
    from pipelines.board import print_jobs
    from pipelines.database import is_unused
    from pipelines.verdict import ACTIVE, FINISHED

    found: list[Job] = []
    if not is_unused(queue):
        waiting = _queue(queue)
        found += waiting.jobs(states=FINISHED, schedule=schedule, last=last)
        found += waiting.jobs(states=ACTIVE, schedule=schedule)
    documents = [job.to_json() for job in sorted(found, key=lambda job: job.id)]
    if as_json:
        print(json.dumps({"jobs": documents}, allow_nan=False))
    else:
        print_jobs(documents)


@app.command("add")
def queue_add(
    file: Annotated[Path, typer.Argument(help="A job file: a recipe, with or without a schedule block.")],
    name: JobName = None,
    out: JobOut = None,
    queue: QueueFolder = None,
    as_json: Json = False,
) -> None:
    """Have the job in FILE run once, when its turn comes; what its schedule block says of due times plays no part.

    Examples:

      distill queue add runs/tiny-to-nano/config.yaml --name again

      distill queue add sizes.yaml                       a sweep
    """
    from pipelines.job import resolve_job

    # First: a job that is none leaves no queue behind.
    spec = resolve_job(file, name=name, out=out)
    job = _queue(queue, create=True).add(spec)
    if unread := spec.settings.of_schedules:
        say(f"job {job.id} runs once: of its schedule block {', '.join(unread)} play no part (distill schedule add)")
    print(json.dumps(job.to_json(), allow_nan=False) if as_json else f"job {job.id} ({job.name}) is queued")


@app.command("cancel")
def queue_cancel(job: JobId, queue: QueueFolder = None, as_json: Json = False) -> None:
    """Take a job out. One that runs is asked to stop with a checkpoint; distill queue retry goes on from there.

    Example:

      distill queue cancel 17
    """
    found = _queue(queue).cancel(job)
    state = "is asked to stop" if found.state == "running" else "is cancelled"
    print(json.dumps(found.to_json(), allow_nan=False) if as_json else f"job {job} {state}")


@app.command("retry")
def queue_retry(job: JobId, queue: QueueFolder = None, as_json: Json = False) -> None:
    """Run a job again that failed, was cancelled or was left out, from its last checkpoint.

    Example:

      distill queue retry 17
    """
    found = _queue(queue).retry(job)
    print(json.dumps(found.to_json(), allow_nan=False) if as_json else f"job {job} is queued")


@app.command("logs")
def queue_logs(
    job: JobId,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt; default the last one.")] = None,
    queue: QueueFolder = None,
    as_json: Json = False,
) -> None:
    """Print what an attempt at a job has said.

    Examples:

      distill queue logs 17

      distill queue logs 17 --attempt 1 --json
    """
    waiting = _queue(queue)
    found = waiting.job(job)
    attempts = waiting.attempts(job)
    if not attempts:
        raise UserError(f"job {job} is {found.state} and has not run yet; distill worker runs it")
    if attempt is not None and attempt > len(attempts):
        raise UserError(f"job {job} has had {len(attempts)} attempts, and --attempt is {attempt}")
    chosen = attempts[-1 if attempt is None else attempt - 1]
    log = Path(chosen["log"])
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"the log of attempt {chosen['number']} at job {job} is gone: there is no file {log}; it was removed, or "
            "the attempt is only just beginning"
        ) from None
    if as_json:
        print(json.dumps({"job": job, "attempts": attempts, "attempt": chosen["number"], "text": text}))
    else:
        print(text, end="")
