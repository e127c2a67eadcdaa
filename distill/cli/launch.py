"""``distill launch``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Assignments, Hardware, JobName, Json
from distill.progress import say


def launch(
    file: Annotated[Path, typer.Argument(help="A job file: a recipe with a block 'launch' (docs/launch.md).")],
    on: Annotated[str, typer.Option(help="slurm, kubernetes or skypilot.")],
    submit: Annotated[bool, typer.Option("--submit", help="Submit it too, with the engine's own tool.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the files that are written; default launch.")] = None,
    name: JobName = None,
    once: Annotated[bool, typer.Option("--once", help="Leave the schedule's cron out: one run, now.")] = False,
    assignments: Assignments = None,
    hardware: Hardware = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over files that say something else.")] = False,
    as_json: Json = False,
) -> None:
    """Write the job in FILE for a cluster: a batch script, a Kubernetes Job or CronJob, a SkyPilot job.

    How many GPUs it takes is the plan's; where and as whom it runs says the file's block launch.

    Examples:

      distill launch nightly.yaml --on kubernetes

      distill launch big.yaml --on slurm --set launch.slurm.partition=gpu --set launch.slurm.time=24:00:00 --submit

      distill launch big.yaml --on skypilot --once --out clusters --json
    """
    from pipelines.clusters.order import check_tool, order, write
    from pipelines.clusters.order import submit as hand_over
    from pipelines.clusters.rendering import ENGINES

    orders = order(file, on=on, name=name, folder=out, once=once, assignments=assignments or (), hardware=hardware)
    write(orders, replace=replace)
    if submit:
        # After writing: what it says names the files.
        check_tool(orders, ENGINES[on].title)
    documents = []
    for one in orders:
        document = one.to_json()
        for note in document["notes"]:
            say(f"{one.fleet.name}: {note}")
        said = hand_over(one) if submit else None
        documents.append({**document, "submitted": said})
        # At once: of several jobs a later one may fail, and this one is with the cluster all the same.
        if not as_json:
            print(said if submit else f"{one.file}\n  {shlex.join(one.command)}", flush=True)
        elif submit:
            say(f"{one.fleet.name} is submitted: {said}")
    if as_json:
        print(json.dumps({"on": on, "jobs": documents}, allow_nan=False))
