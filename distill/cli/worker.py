"""``distill worker``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from distill.cli.options import Json, QueueFolder


def worker(
    once: Annotated[
        bool, typer.Option("--once", help="Run what can run now, then end: for cron and the like.")
    ] = False,
    slots: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="On a machine without GPUs: how many jobs' gpu_slots it takes [default: 1]"),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs that jobs get, as CUDA numbers them: 0,1,2 [default: all that are visible]")
    ] = None,
    queue: QueueFolder = None,
    as_json: Json = False,
) -> None:
    """Run jobs as they come due and as there is room for them, until SIGTERM or Ctrl-C.

    Then its jobs stop with a checkpoint and are marked interrupted; the next worker resumes them. With --once the exit
    code is 0 if every job it ran was done, 75 if one is left that a worker can go on with, this or a larger one, and 1
    if one failed.

    Examples:

      distill worker

      distill worker --once --gpus 0,1
    """
    from pipelines.database import default_folder
    from pipelines.queue import Queue
    from pipelines.worker import Worker, exit_code, slots_here

    names, on_gpu = slots_here(None if gpus is None else gpus.split(","), slots)
    jobs = Worker(Queue(queue or default_folder()), slots=names, on_gpu=on_gpu).work(once=once)
    if as_json:
        print(json.dumps({"jobs": [job.to_json() for job in jobs]}, allow_nan=False))
    if once:
        sys.exit(exit_code(jobs))
