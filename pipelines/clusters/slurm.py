"""A job as a batch script for sbatch: one allocation, a step for each part, and the exit code decides about the queue.

Before the wall time ends Slurm sends TERM to the script alone (``--signal=B:``), which passes it to the student's step;
the run writes its checkpoint, leaves with 75, and the script queues itself again. Exit code 2 is never queued again,
75 always, others as often as ``schedule.backoff_limit`` says. A job that was cancelled stays so.

Left out on purpose: cron. Slurm's own (scrontab) knows no time zones, no concurrency policy and no deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.errors import UserError
from pipelines.clusters.fleet import STUDENT_PORT, Fleet, Part
from pipelines.clusters.shell import Read, joined, line, opening, written

_LONGEST_SIGNAL = 65535
"""Seconds before the end at which Slurm can send a signal."""

_SOME_GPUS = (
    'IFS=, read -r -a gpus <<< "${CUDA_VISIBLE_DEVICES-}"; chosen=("${gpus[@]:$1:$2}"); '
    '[ "${#chosen[@]}" = "$2" ] || { echo "too few GPUs in CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" >&2; exit 2; }; '
    'shift 2; CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${chosen[*]}") exec "$@"'
)
"""Runs a command on so many of a machine's GPUs, from so far on."""

_ASIDE = "aside=$((SLURM_JOB_ID % 100 * 200))  # jobs that share a machine have ports of their own"

_WAIT = """\
# TERM comes before the wall time ends: the run writes a checkpoint and leaves with 75.
# srun would end the step at once if it got the signal itself.
stop() {
  scancel --signal=TERM "$(squeue --steps --job "$SLURM_JOB_ID" --noheader --format='%i %j' | sed -n 's/ student$//p')"
}
trap stop TERM
broken=
while kill -0 "$student" 2> /dev/null; do
  for server in "${servers[@]}"; do
    if [ -z "$broken" ] && ! kill -0 "$server" 2> /dev/null; then
      echo "a server of the teacher has ended; its log is beside $run" >&2
      broken=yes
      stop
    fi
  done
  sleep 2 &
  wait $!
done
wait "$student"
code=$?
if [ "${#servers[@]}" -gt 0 ]; then
  scancel --signal=TERM "$SLURM_JOB_ID"
  wait "${servers[@]}"
fi
"""

_END = """\
[ -z "$broken" ] || [ "$code" != 75 ] || code=1
case $code in
  0 | 2 | 130) exit "$code" ;;
  75) why="stopped with a checkpoint" ;;
  *)
    echo "exit code $code" >> "$run-failures-$SLURM_JOB_ID"
    [ "$(wc -l < "$run-failures-$SLURM_JOB_ID")" -le {backoff_limit} ] || exit "$code"
    why="failed with exit code $code"
    ;;
esac
# A job that somebody cancelled is not running any more, and stays cancelled.
if scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
  echo "$why: job $SLURM_JOB_ID is queued again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a part is among the allocation's machines, and among the GPUs of each."""

    first: int
    first_gpu: int


def render(fleet: Fleet) -> str:
    """The batch script. Raises UserError for settings that are missing or that Slurm has no word for."""
    _refuse(fleet)
    places, machines, devices = _placed(fleet)
    settings, slurm = fleet.settings, fleet.settings.slurm
    out = fleet.needed("out", "Slurm", example="/shared/runs")
    nodes = 'mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")'
    recipe = joined(f"{out}/{fleet.name}.yaml")
    keyed = [
        ": \"${DISTILL_TEACHER_API_KEY:=$(od -A n -N 24 -t x1 /dev/urandom | tr -d ' \\n')}\"",
        "export DISTILL_TEACHER_API_KEY",
    ]
    lines = [
        "#!/bin/bash",
        f"# {fleet.name}: made by `distill launch --on slurm`; change the job file, not this.",
        *(f"#SBATCH {option}" for option in _options(fleet, machines, devices)),
        "",
        *opening(settings, joined(f"{out}/{fleet.name}")),
        *(f'{name}="$(cat -- {line([file])})" || exit 1; export {name}' for name, file in slurm.secret_files.items()),
        written(recipe, fleet.recipe),
        nodes,
        _ASIDE,
        *(keyed if fleet.servers else []),
        "",
        "servers=()",
    ]
    hosts = {
        server.name: [_node(places[server.name].first + number) for number in range(server.machines)]
        for server in fleet.servers
    }
    for server in fleet.servers:
        # A step for each machine, since its number is part of the command.
        for number in range(server.machines):
            machine = Read(str(number))
            command = server.command(host="0.0.0.0", machine=machine, first=hosts[server.name][0], at=_port)
            lines += [
                f"{_step(server, places[server.name], 1, devices=devices, command=command, machine=number)} &",
                "servers+=($!)",
            ]
    tasks = fleet.student.machines * fleet.student.processes
    run = [*fleet.run_command(recipe, hosts=hosts, at=_port), *(["--processes", "1"] if tasks == 1 else [])]
    meeting = f'MASTER_ADDR="${{nodes[0]}}" MASTER_PORT={_port(STUDENT_PORT)} '
    lines += [
        meeting + _step(fleet.student, places["student"], tasks, devices=devices, command=run) + " &",
        "student=$!",
        "",
    ]
    return "\n".join(lines) + "\n" + _WAIT + _END.replace("{backoff_limit}", str(fleet.schedule.backoff_limit))


def gpus(fleet: Fleet) -> int:
    """Of the whole allocation, those that no part uses included: its machines are equal."""
    _, machines, devices = _placed(fleet)
    return machines * devices if fleet.student.has_gpus else 0


def _refuse(fleet: Fleet) -> None:
    if fleet.schedule.active_deadline_seconds is not None:
        raise UserError(
            "schedule.active_deadline_seconds is set, and Slurm limits each attempt alone; leave it out, and set "
            "launch.slurm.time"
        )
    pools = {part.device for part in fleet.parts}
    if len(pools) > 1:
        raise UserError(
            f"the plan has {' and '.join(sorted(pools))}, and a job on Slurm is one allocation of equal machines; name "
            "one kind with launch.gpus, or start the teacher's servers as a job of their own and name them in "
            "teacher.urls"
        )
    devices = fleet.plan.devices
    if (asked := gpus(fleet)) > devices.count:
        _, machines, each = _placed(fleet)
        raise UserError(
            f"the job file has {devices}, and a job on Slurm is one allocation of equal machines: {machines} of {each} "
            f"GPUs for the {fleet.gpus} that the plan has, {asked} together; name whole machines with launch.gpus "
            f"({machines}x{each}x{fleet.student.device}), or set launch.gpus so that a plan of fewer is made"
        )


def _placed(fleet: Fleet) -> tuple[dict[str, _Place], int, int]:
    """Where each part is; the machines there are; and the devices of the one that has most."""
    layout = fleet.plan.best.layout
    room = min(layout.teacher_pool.per_node, layout.student_pool.per_node)
    used: list[int] = []
    places: dict[str, _Place] = {}
    for part in fleet.parts:
        free = [number for number, taken in enumerate(used) if taken + part.devices <= room]
        if part.machines == 1 and free:
            places[part.name] = _Place(free[0], used[free[0]])
            used[free[0]] += part.devices
        else:
            places[part.name] = _Place(len(used), 0)
            used += [part.devices] * part.machines
    return places, len(used), max(used)


def _options(fleet: Fleet, machines: int, devices: int) -> list[str]:
    settings, slurm = fleet.settings, fleet.settings.slurm
    grace = int(-(-fleet.schedule.termination_grace_period_seconds // 1))
    wall = fleet.needed("slurm.time", "Slurm", example="24:00:00")
    if not grace < min(_seconds(wall), _LONGEST_SIGNAL):
        raise UserError(
            f"launch.slurm.time is {wall}, and schedule.termination_grace_period_seconds {grace}: the run would be "
            "asked to stop as it begins; give it more time, or less to stop"
        )
    named = ("partition", "account", "qos", "constraint", "reservation")
    options = [f"--{key}={value}" for key in named if (value := getattr(slurm, key)) is not None]
    has_gpus = fleet.student.has_gpus
    return [
        f"--job-name={fleet.name}",
        *options,
        f"--time={wall}",
        f"--nodes={machines}",
        f"--ntasks-per-node={devices}",
        *([f"--gres={slurm.gres}:{devices}"] if has_gpus else []),
        *([f"--cpus-per-task={settings.cpus_per_gpu}"] if settings.cpus_per_gpu else []),
        *([f"--mem={settings.memory_gb_per_gpu * devices}G"] if settings.memory_gb_per_gpu else []),
        *(["--exclusive"] if slurm.exclusive else []),
        f"--output={_log(str(settings.out), fleet.name)}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:TERM@{grace}",
    ]


def _log(out: str, name: str) -> str:
    """sbatch reads quotes and percent signs in a path itself."""
    if set(out) & set("\"'\\%#"):
        raise UserError(f"launch.out is {out}, and sbatch takes no path with quotes, backslashes, % or # in it")
    return f'"{out}/{name}-%j.log"' if " " in out else f"{out}/{name}-%j.log"


def _seconds(wall: str) -> int:
    """sbatch's forms: minutes, minutes:seconds, hours:minutes:seconds, and days-hours with either after them."""
    days, _, rest = wall.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if days:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _port(port: int) -> Read:
    """As the shell reads it: a port of this job."""
    return Read(f"$(({port} + aside))")


def _node(number: int) -> Read:
    return Read(f'"${{nodes[{number}]}}"')


def _step(
    part: Part, place: _Place, tasks: int, *, devices: int, command: list[str], machine: int | None = None
) -> str:
    """A step's command: ``tasks`` tasks on the part's machines, or on one of them, with its GPUs of them."""
    first, machines = (place.first, part.machines) if machine is None else (place.first + machine, 1)
    words = [
        "srun",
        f"--job-name={part.name}",
        f"--nodes={machines}",
        f"--ntasks={tasks}",
        f"--ntasks-per-node={tasks // machines}",
    ]
    # Steps share the machines' processors and memory; their GPUs are told apart below.
    words += ["--overlap", "--cpu-bind=none", "--kill-on-bad-exit=0"]
    words += ["--nodelist", Read(f'"$(IFS=,; echo "${{nodes[*]:{first}:{machines}}}")"')]
    if part.has_gpus and part.gpus < devices:
        words += ["bash", "-c", _SOME_GPUS, "bash", str(place.first_gpu), str(part.gpus)]
    return line([*words, *command])
