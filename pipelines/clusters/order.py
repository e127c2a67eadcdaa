"""``distill launch``: a job file in, files for a cluster's engine out, and if asked the job in the cluster's hands."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.clusters import LaunchSettings
from distill.config import RunConfig
from distill.errors import DistillError, UserError
from distill.jobs import ScheduleSettings, checked_name, split_job
from distill.journal import write_atomically
from distill.recipe import load_recipe
from pipelines.clusters.fleet import Fleet, make_fleet, roles_to_serve
from pipelines.clusters.rendering import ENGINES, Engine
from pipelines.job import is_teacher_ours, resolve_runs
from pipelines.plan import Plan
from pipelines.planning import planned
from pipelines.resolution import assigned


@dataclass(frozen=True, slots=True)
class Order:
    """One run for one engine: the file and the command that submits it."""

    fleet: Fleet
    file: Path
    text: str
    command: tuple[str, ...]
    gpus: int
    """What the file asks for; on Slurm those of its machines that no part uses too."""

    def to_json(self) -> dict[str, Any]:
        best = self.fleet.plan.best
        return {
            "name": self.fleet.name,
            "file": str(self.file),
            "command": list(self.command),
            "parts": [
                {"name": part.name, "machines": part.machines, "processes": part.processes, "gpus": part.gpus}
                for part in self.fleet.parts
            ],
            "gpus": self.gpus,
            "device": self.fleet.student.device,
            "seconds": best.seconds,
            "notes": list(notes(self.fleet)),
        }


def order(
    path: Path,
    *,
    on: str,
    name: str | None = None,
    folder: Path | None = None,
    once: bool = False,
    assignments: Sequence[str] = (),
    hardware: Path | None = None,
) -> list[Order]:
    """What to write and submit for each run of the job file at ``path``; nothing is written.

    Raises UserError for anything that is wrong, missing, or that the engine has no word for.
    """
    if on not in ENGINES:
        raise UserError(f"--on {on!r} is none of {', '.join(ENGINES)}")
    engine = ENGINES[on]
    job = split_job(assigned(load_recipe(path), assignments), where=f"the job file {path}")
    schedule = job.schedule.model_copy(update={"cron": None}) if once else job.schedule
    name = checked_name(path.stem if name is None else name)
    _refuse(schedule, engine)
    configs = resolve_runs(job, path, is_here=False)
    if job.sweep is not None and job.sweep.share_teacher and is_teacher_ours(configs[0]):
        raise UserError(
            "sweep.share_teacher is true, and on a cluster each run is a job with servers of its own; set it to false, "
            "or start the servers apart and name them in teacher.urls"
        )
    folder = Path("launch") if folder is None else folder
    orders = []
    for config in configs:
        called = name if job.sweep is None else f"{name}-{config.name}"
        fleet = make_fleet(called, _plan(config, job.launch, hardware), job.launch, schedule)
        file = (folder / f"{called}{engine.suffix}").absolute()
        orders.append(Order(fleet, file, engine.render(fleet), tuple(engine.command(fleet, file)), engine.gpus(fleet)))
    return orders


def _refuse(schedule: ScheduleSettings, engine: Engine) -> None:
    if schedule.cron is not None and not engine.has_cron:
        raise UserError(
            f"schedule.cron is {schedule.cron!r}, and {engine.title} starts nothing by the clock; --once launches the "
            "job one time, now (a worker, or Kubernetes, keeps the schedule)"
        )
    for key, usual in (("when", "always"), ("start_from", "configured")):
        if (value := getattr(schedule, key)) != usual:
            raise UserError(
                f"schedule.{key} is {value}, and a cluster does not know what earlier runs left; set it to {usual}, or "
                "have a worker run the job"
            )


def _plan(config: RunConfig, settings: LaunchSettings, hardware: Path | None) -> Plan:
    if not (settings.gpus or settings.gpus_teacher or settings.gpus_student):
        raise UserError(
            "launch.gpus is missing: what the cluster has for the job; write it into the job file, or add "
            "--set launch.gpus=8xH100 (2x8xH100 for two machines of eight)"
        )
    return planned(
        config,
        gpus=settings.gpus,
        gpus_teacher=settings.gpus_teacher,
        gpus_student=settings.gpus_student,
        hardware=hardware,
        options=("launch.gpus", "launch.gpus_teacher", "launch.gpus_student"),
        # Somebody else's servers count once: the plan has room for them too.
        roles_at_once=max(1, len(roles_to_serve(config.teacher))),
    )


def notes(fleet: Fleet) -> list[str]:
    """What to see to before the job is submitted."""
    found = [
        f"schedule.{key} is for a worker, and the cluster does not read it"
        for key in ("gpu_slots", "backoff_seconds", "backoff_cap_seconds")
        if key in fleet.schedule.model_fields_set
    ]
    config = fleet.config
    if config.prompts.kind == "file":
        found.append(f"the prompts {config.prompts.path} have to be there on the cluster too")
    models = (config.teacher.model, config.student.model)
    found += [f"the model {model} has to be there on the cluster too" for model in models if Path(model).is_dir()]
    if config.store is None and "DISTILL_STORE" not in fleet.settings.environment:
        found.append(
            "the store of the teacher's responses is in the cluster user's cache; set launch.environment.DISTILL_STORE "
            "to a folder that stays, or an attempt that begins anew pays for them again"
        )
    layout = fleet.plan.best.layout
    if len(fleet.servers) > 1:
        found.append(
            f"the servers of both roles are up at once, so that the teacher has {layout.teacher.gpus} GPUs, "
            f"{layout.teacher.gpus_of_a_role} for each (in `distill plan` the roles take turns)"
        )
    return found


def write(orders: Sequence[Order], *, replace: bool) -> None:
    """Write the files, each whole or not at all, and none before all of them may be.

    Raises UserError where one is there already and says something else, or cannot be written.
    """
    for one in orders:
        _check_folder(one.file)
        try:
            there = one.file.read_text(encoding="utf-8") if one.file.exists() else one.text
        except (OSError, UnicodeDecodeError):
            there = ""
        if there != one.text and not replace:
            raise UserError(f"{one.file} is there already and says something else; add --replace, or another --out")
    for one in orders:
        write_atomically(one.file, one.text)


def _check_folder(file: Path) -> None:
    """Makes the folder of ``file``. Raises UserError where no file can be put there, or not under this name."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        code = errno.EISDIR if file.is_dir() else 0 if os.access(file.parent, os.W_OK | os.X_OK) else errno.EACCES
    except OSError as error:
        code = error.errno or errno.EIO
    if code:
        raise UserError(f"{file} cannot be written: {os.strerror(code)}; name another folder with --out")


def check_tool(orders: Sequence[Order], title: str) -> None:
    """Raises UserError where the tool that submits is not on this machine."""
    tool = orders[0].command[0]
    if shutil.which(tool) is None:
        raise UserError(
            f"--submit needs {tool}, which is not on this machine; nothing is submitted, the files are written; submit "
            f"from where {title}'s tools are: {'; '.join(shlex.join(one.command) for one in orders)}"
        )


def submit(one: Order) -> str:
    """Hand the job over; what the tool said. Raises DistillError where the tool refuses."""
    done = subprocess.run(one.command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise DistillError(
            f"{shlex.join(one.command)} ended with exit code {done.returncode}: "
            f"{' '.join((done.stderr or done.stdout).split())[-2000:]}"
        )
    sys.stderr.write(done.stderr)
    return done.stdout.strip()
