"""A job as a cluster has to know it: its parts, the machines of each, and the command that each runs.

The student is one part: processes on one machine or on several. A teacher that the plan puts behind vLLM is a part for
each of its roles, up as long as the student works: what a single process of a run does with its own servers, having
the roles take turns on the same GPUs, several machines cannot. So the job's plan is made for servers of both roles at
once (``roles_to_serve``), each on GPUs of its own. Servers that the job file names (``teacher.urls``) are somebody
else's and no part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import yaml

from distill.clusters import LaunchSettings
from distill.config import RunConfig
from distill.errors import UserError
from distill.hardware import Pool
from distill.jobs import ScheduleSettings
from distill.model_config import TeacherSettings
from distill.recipe import assign, parse_assignment, validate
from distill.vllm.launch import Role
from pipelines.clusters.shell import Read, joined
from pipelines.layouts import Layout, StudentLayout, TeacherLayout
from pipelines.plan import Plan
from pipelines.plan_document import PORTS

STUDENT_PORT = 29500
"""Where the student's processes meet, on the first of their machines."""

MEETING_PORT = 29501
"""Where the machines of one server meet; a further role's is the next."""

PortAt = Callable[[int], str]
"""How a port is written in a command: as it is, or, where jobs share a machine, moved by what the shell knows."""


@dataclass(frozen=True, slots=True)
class Part:
    """Processes of one kind. ``processes`` are those of a machine; each has a GPU where there are any."""

    name: str
    machines: int
    processes: int
    device: str
    """The GPUs' name in the table of devices."""
    has_gpus: bool
    _: KW_ONLY
    sampler_devices: int = 0
    """Of the vLLM that speaks for the student, beside those of its processes."""

    @property
    def devices(self) -> int:
        """Of one machine."""
        return self.processes + self.sampler_devices

    @property
    def gpus(self) -> int:
        """Of one machine."""
        return self.devices if self.has_gpus else 0


@dataclass(frozen=True, slots=True)
class Server(Part):
    """The teacher in one role. Each of its machines serves ``replicas``; several machines serve one together."""

    role: Role
    replicas: int
    port: int
    meeting_port: int
    words: tuple[str, ...]

    @property
    def ports(self) -> range:
        return range(self.port, self.port + self.replicas)

    @property
    def is_spread(self) -> bool:
        """Whether one server is spread over several machines."""
        return "--nodes" in self.words

    def command(self, *, host: str, machine: Read, first: Read, at: PortAt = str) -> list[str]:
        """What each machine runs; ``machine`` is its number among the part's, ``first`` the name of number 0."""
        spread = ["--node-rank", machine, "--node-address", joined(first, ":", at(self.meeting_port))]
        log = joined(Read('"$run"'), f"-{self.name}-", machine, ".log")
        serve = [*self.words, "--port", at(self.port)]
        return [*serve, "--host", host, "--log", log, *(spread if self.is_spread else [])]

    def urls(self, hosts: Sequence[Read], at: PortAt = str) -> Read:
        """The assignment that names the role's servers to a run; ``hosts`` are all of the part's machines."""
        found = hosts[:1] if self.is_spread else hosts
        places = [(host, port) for host in found for port in self.ports]
        parts = [part for host, port in places for part in (', "http://', host, ":", at(port), '"')]
        return joined(f"teacher.urls.{self.role}=[", parts[0].removeprefix(", "), *parts[1:], "]")


@dataclass(frozen=True, slots=True)
class Fleet:
    """One run of a job, ready to be rendered."""

    name: str
    config: RunConfig
    settings: LaunchSettings
    schedule: ScheduleSettings
    student: Part
    servers: tuple[Server, ...]
    plan: Plan

    @property
    def recipe(self) -> str:
        """The run's configuration as YAML."""
        tree = self.config.model_dump(mode="json")
        return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=False, width=100))

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.student, *self.servers)

    @property
    def gpus(self) -> int:
        """Of all machines together."""
        return sum(part.machines * part.gpus for part in self.parts)

    def run_command(self, recipe: Read, *, hosts: Mapping[str, Sequence[Read]], at: PortAt = str) -> list[str]:
        """The student's command; ``hosts`` are the machines of each server, by the part's name.

        The student has the first of the job's GPUs on its machine, counted from 0, and its vLLM those behind them.
        """
        settings: list[str] = [server.urls(hosts[server.name], at) for server in self.servers]
        if self.student.has_gpus and self.student.sampler_devices:
            gpus = range(self.student.processes, self.student.devices)
            settings.append(f"sampler.devices={json.dumps([str(gpu) for gpu in gpus])}")
        words = [word for setting in settings for word in ("--set", setting)]
        return ["distill", "run", "--recipe", recipe, "--out", Read('"$run"'), *words]

    def needed(self, key: str, engine: str, *, example: str) -> str:
        """A setting of the launch block that an engine cannot do without."""
        value: object = self.settings
        for name in key.split("."):
            value = getattr(value, name)
        if value is None:
            raise UserError(
                f"launch.{key} is missing, and {engine} needs it; write it into the job file, or add "
                f"--set launch.{key}={example}"
            )
        return str(value)


def lies_in(path: str, folder: str) -> bool:
    """Whether ``path`` is below ``folder`` or is it; one that climbs (``..``) is taken to leave it."""
    parts, above = path.rstrip("/").split("/"), folder.rstrip("/").split("/")
    return ".." not in parts and parts[: len(above)] == above


def make_fleet(name: str, plan: Plan, settings: LaunchSettings, schedule: ScheduleSettings) -> Fleet:
    """The parts of the plan's layout. Raises UserError for a plan that changes the result, or that no parts make."""
    layout = plan.best.layout
    if layout.changes:
        both = ", the servers of both roles of the teacher being up at once," if plan.devices.roles_at_once > 1 else ""
        raise UserError(
            f"{plan.devices} hold this job{both} only with {', '.join(layout.changes)}, which is another result "
            f"({', '.join(layout.assignments)}); write that into the job file, or name more GPUs"
        )
    config, pool = _as_planned(layout), layout.student_pool
    student = _student(layout.student, pool)
    roles = () if layout.is_shared else roles_to_serve(config.teacher)
    if roles:
        _refuse_unserved(config)
        patience = max(config.teacher.patience_seconds, settings.teacher_start_seconds)
        config = config.model_copy(
            update={"teacher": config.teacher.model_copy(update={"patience_seconds": patience})},
        )
    return Fleet(
        name=name,
        config=config,
        settings=settings,
        schedule=schedule,
        student=student,
        servers=tuple(
            _server(config.teacher, role, MEETING_PORT + number, layout.teacher, layout.teacher_pool)
            for number, role in enumerate(roles)
        ),
        plan=plan,
    )


def _as_planned(layout: Layout) -> RunConfig:
    """The configuration with what the plan has settled."""
    tree = layout.config.model_dump(mode="json")
    for text in layout.assignments:
        assign(tree, *parse_assignment(text))
    return validate(tree, where="the configuration as it is planned")


def _student(layout: StudentLayout, pool: Pool) -> Part:
    processes, own = layout.processes, layout.devices - layout.processes
    machines = -(-layout.devices // pool.per_node)
    if own and machines > 1:
        raise UserError(
            f"the plan has {processes} processes for the student and {own} devices for the vLLM that speaks for it, "
            f"which its own machine alone can reach, and a machine has {pool.per_node}; name larger machines, or set "
            "sampler.backend to transformers"
        )
    if processes % machines:
        raise UserError(
            f"the plan has {processes} processes for the student, which are not equally many on each of {machines} "
            f"machines of {pool.per_node}; name a pool of whole machines with launch.gpus_student, or fewer GPUs"
        )
    on_gpu = pool.device.kind == "gpu"
    return Part("student", machines, processes // machines, pool.name, on_gpu, sampler_devices=own)


def roles_to_serve(teacher: TeacherSettings) -> tuple[Role, ...]:
    """The roles that no server of somebody else's has."""
    needs: list[Role] = [] if teacher.urls.generate else ["generate"]
    # Log-probabilities are read by the servers that generate.
    if not teacher.urls.score and teacher.signal == "hidden":
        needs.append("score")
    return tuple(needs)


def _refuse_unserved(config: RunConfig) -> None:
    if config.teacher.revision is not None:
        raise UserError(
            "teacher.revision is set, and servers that a launch starts take the hub's default branch; download the "
            "revision and name its folder, or name servers in teacher.urls"
        )
    for domain, settings in config.specialists.items():
        if settings.backend == "vllm" and not (settings.urls.generate and settings.urls.score):
            raise UserError(
                f"specialists.{domain} is behind vLLM, and a launch starts the servers of the teacher alone; name its "
                f"servers in specialists.{domain}.urls"
            )


def _server(teacher: TeacherSettings, role: Role, meeting_port: int, layout: TeacherLayout, pool: Pool) -> Server:
    each = layout.tensor_parallel * layout.pipeline_parallel
    words = ["distill", "teacher", "serve", "--teacher", teacher.model, "--role", role]
    words += ["--dtype", teacher.dtype, "--tp", str(layout.tensor_parallel), "--pp", str(layout.pipeline_parallel)]
    if teacher.quantization is not None:
        words += ["--quantization", teacher.quantization]
    for argument in (*_flags(teacher, role), *teacher.server_args):
        words.append(f"--server-arg={argument}")
    if each > pool.per_node:
        machines, replicas, processes = -(-each // pool.per_node), 1, pool.per_node
        if layout.replicas > 1 or each % pool.per_node:
            raise UserError(
                f"the plan has {layout.replicas} teacher's servers of {each} GPUs each, on machines of "
                f"{pool.per_node}; a launch starts one that fills its machines, or several that fit into one"
            )
        words += ["--nodes", str(machines)]
    else:
        fit = min(layout.replicas, pool.per_node // each)
        machines, replicas, processes = -(-layout.replicas // fit), fit, fit * each
        if layout.replicas % fit:
            raise UserError(
                f"the plan has {layout.replicas} teacher's servers, which are not equally many on each of {machines} "
                f"machines; set teacher.replicas to {machines * fit} or {(machines - 1) * fit}"
            )
        words += ["--replicas", str(replicas)]
    return Server(
        name=f"teacher-{role}",
        machines=machines,
        processes=processes,
        device=pool.name,
        has_gpus=pool.device.kind == "gpu",
        role=role,
        replicas=replicas,
        port=PORTS[role],
        meeting_port=meeting_port,
        words=tuple(words),
    )


def _flags(teacher: TeacherSettings, role: Role) -> Sequence[str]:
    if teacher.signal == "hidden" or role == "score":
        return ()
    from pipelines.signals import SIGNALS

    return SIGNALS[teacher.signal].flags(teacher)
