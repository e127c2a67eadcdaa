"""A job as SkyPilot's managed job: one task, or a group of the student and the teacher's servers.

The student is the group's primary task: the servers end when it has. SkyPilot recovers a task whose machines it lost
and, by ``recover_on_exit_codes``, one that stopped with a checkpoint (75); other exit codes as often as
``schedule.backoff_limit`` says.

Left out on purpose: cron, which SkyPilot does not have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distill.errors import UserError
from pipelines.clusters.documents import dump
from pipelines.clusters.fleet import STUDENT_PORT, Fleet, Part, Server, lies_in
from pipelines.clusters.shell import Read, joined, line, opening, written

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")
_KEY = "DISTILL_TEACHER_API_KEY"

Task = dict[str, Any]


def render(fleet: Fleet) -> str:
    """The YAML file. Raises UserError for settings that are missing or that SkyPilot has no word for."""
    _refuse(fleet)
    begin = f"# {fleet.name}: made by `distill launch --on skypilot`; change the job file, not this.\n"
    if not fleet.servers:
        return begin + dump(_task(fleet, fleet.student, fleet.name))
    header = {"name": fleet.name, "execution": "parallel", "primary_tasks": [fleet.student.name]}
    documents = [header, *(_task(fleet, part, part.name) for part in fleet.parts)]
    return begin + "".join(f"---\n{dump(one)}" for one in documents)


def command(fleet: Fleet, file: Path) -> list[str]:
    """What submits it; the values of secrets stay in the environment, by name."""
    secrets = [word for name in fleet.settings.skypilot.secrets for word in ("--secret", name)]
    return ["sky", "jobs", "launch", "--yes", "--detach-run", *secrets, str(file)]


def _refuse(fleet: Fleet) -> None:
    settings = fleet.settings.skypilot
    if not _NAME.fullmatch(fleet.name):
        raise UserError(
            f"{fleet.name!r} is no name on SkyPilot: 52 lower-case letters, digits and '-' at most, a letter first; "
            "give one with --name"
        )
    if fleet.schedule.active_deadline_seconds is not None:
        raise UserError("schedule.active_deadline_seconds is set, and SkyPilot limits no job's time; leave it out")
    out = fleet.needed("out", "SkyPilot", example="/checkpoints/runs")
    if not any(lies_in(out, path) for path in (*settings.volumes, *settings.file_mounts)):
        raise UserError(
            f"launch.out is {out}, which lies in no volume or bucket, so that checkpoints would be lost with the "
            "machine; add one to launch.skypilot.volumes or launch.skypilot.file_mounts"
        )
    if fleet.servers and _KEY not in settings.secrets:
        raise UserError(
            f"the teacher's servers listen to other machines and want a key; set {_KEY} where you submit, and add it "
            "to launch.skypilot.secrets"
        )


def _task(fleet: Fleet, part: Part, name: str) -> Task:
    settings = fleet.settings.skypilot
    return {
        "name": name,
        "num_nodes": part.machines,
        "resources": _resources(fleet, part),
        **({"volumes": dict(settings.volumes)} if settings.volumes else {}),
        **({"file_mounts": dict(settings.file_mounts)} if settings.file_mounts else {}),
        # Null: the value comes from where the job is submitted.
        **({"secrets": dict.fromkeys(settings.secrets)} if settings.secrets else {}),
        "run": _script(fleet, part),
    }


def _resources(fleet: Fleet, part: Part) -> Task:
    settings, sky = fleet.settings, fleet.settings.skypilot
    cpus, memory = settings.cpus_per_gpu, settings.memory_gb_per_gpu
    return {
        **({} if sky.infra is None else {"infra": sky.infra}),
        **({"accelerators": {_accelerator(part.device): part.gpus}} if part.has_gpus else {}),
        **({} if cpus is None else {"cpus": f"{cpus * part.devices}+"}),
        **({} if memory is None else {"memory": f"{memory * part.devices}+"}),
        **({} if settings.image is None else {"image_id": f"docker:{settings.image}"}),
        **({} if sky.disk_size is None else {"disk_size": sky.disk_size}),
        **({"use_spot": True} if sky.use_spot else {}),
        "job_recovery": {
            "max_restarts_on_errors": fleet.schedule.backoff_limit,
            "recover_on_exit_codes": [75],
        },
    }


def _accelerator(device: str) -> str:
    """SkyPilot's name of a device of the table; one's own devices have the name that one gave them."""
    return {"A100-40": "A100", "A100-80": "A100-80GB", "RTX4090": "RTX4090"}.get(device, device)


def _script(fleet: Fleet, part: Part) -> str:
    run = joined(f"{fleet.settings.out}/{fleet.name}")
    lines = opening(fleet.settings, run)
    nodes = 'mapfile -t nodes <<< "$SKYPILOT_NODE_IPS"'
    if isinstance(part, Server):
        command = part.command(host="0.0.0.0", machine=Read('"$SKYPILOT_NODE_RANK"'), first=Read('"${nodes[0]}"'))
        return "\n".join([*lines, nodes, f"exec {line(command)}"]) + "\n"
    recipe = Read('"$HOME/distill-recipe.yaml"')
    # In a group a task's machine has its task's name and its number before the group's.
    hosts = {
        server.name: [Read(f"{server.name}-{number}.{fleet.name}") for number in range(server.machines)]
        for server in fleet.servers
    }
    command = [*fleet.run_command(recipe, hosts=hosts), "--processes", str(part.processes)]
    if part.machines > 1:
        command += ["--nodes", str(part.machines), "--node-rank", Read('"$SKYPILOT_NODE_RANK"')]
        command += ["--node-address", joined(Read('"${nodes[0]}"'), f":{STUDENT_PORT}")]
    return "\n".join([*lines, nodes, written(recipe, fleet.recipe), f"exec {line(command)}"]) + "\n"
