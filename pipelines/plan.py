"""Before anything is spent: what fits, the cheapest layout that does, how long it takes, and what it costs.

``make_plan`` tries the layouts of ``pipelines.fitting``, times their jobs (``pipelines.workload``, ``pipelines.pace``)
and takes the cheapest. What runs beside something longer costs no time (``pipelines.overlap``). GPUs are paid for from
the run's begin to its end, idle or not.
This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from distill.config import RunConfig
from distill.costs import training_passes
from distill.errors import UserError
from distill.family import EMBEDDED_NAMES
from distill.hardware import PER_NODE, Device, Pool, with_price
from distill.journal import KEPT_CHECKPOINTS
from distill.roofline import Bottleneck, Times
from distill.server_memory import Bytes, weight_bytes
from pipelines.advice import Ways
from pipelines.fitting import CHANGES, Search, check_pair, search
from pipelines.layouts import Change, Devices, Layout, Pair, own_devices
from pipelines.overlap import Step, step_of
from pipelines.pace import job_times, trained_parameters, wire_bytes
from pipelines.workload import Job, Lengths, Workload, workload

DEFAULT_DEVICE = "H100"
"""What is planned for where nobody says."""

STORED_TOKEN_BYTES = 16
"""Of a response in the store or among the samples of an examination (measured on the embedded pair's)."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One job on a layout. ``each`` is one of its times; ``hidden`` are the seconds of all of them that pass while
    something longer goes on."""

    job: Job
    each: Times
    flops: float
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        return self.job.times * self.each.seconds

    @property
    def is_hidden(self) -> bool:
        """Whether at least some of it is."""
        return self.hidden > 0

    @property
    def bottleneck(self) -> Bottleneck:
        return self.each.bottleneck


@dataclass(frozen=True, slots=True)
class Estimate:
    """A layout with its phases, and how the steps of each stage in which the student speaks follow each other."""

    layout: Layout
    phases: tuple[Phase, ...]
    steps: tuple[Step, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(phase.seconds - phase.hidden for phase in self.phases)

    @property
    def gpu_hours(self) -> float:
        return self.layout.gpus * self.seconds / 3600

    @property
    def usd(self) -> float | None:
        price = self.layout.usd_per_hour()
        return None if price is None else price * self.seconds / 3600

    @property
    def cost(self) -> tuple[float, int, float]:
        """What layouts are ranked by: money, or GPU-hours where no price is known; then GPUs, then time."""
        return self.gpu_hours if self.usd is None else self.usd, self.layout.gpus, self.seconds

    def busy(self, who: str) -> float:
        """GPU-hours in which the GPUs of one side work."""
        return sum(self._gpus(phase.job) * phase.seconds for phase in self.phases if phase.job.who == who) / 3600

    def _gpus(self, job: Job) -> int:
        """That work in it."""
        student, teacher = self.layout.student, self.layout.teacher
        if job.who == "teacher" and not self.layout.is_shared:
            return teacher.gpus_of_a_role
        if job.who == "student" and job.kind == "decode" and student.sampler is not None:
            return 1
        return student.processes


@dataclass(frozen=True, slots=True)
class Plan:
    """The cheapest estimate of those that change nothing about the result, and others worth knowing."""

    config: RunConfig
    pair: Pair
    devices: Devices
    work: Workload
    best: Estimate
    others: tuple[tuple[str, Estimate], ...]
    shortages: tuple[str, ...]
    asked: tuple[str, ...] = ()
    """What else the run's command was given, beside its models."""

    def flops_by_role(self) -> dict[str, tuple[float, float]]:
        """Tokens and FLOPs of every role, as the run's account will count them."""
        found: dict[str, tuple[float, float]] = {}
        for phase in self.best.phases:
            tokens, flops = found.get(phase.job.role, (0.0, 0.0))
            found[phase.job.role] = tokens + phase.job.tokens, flops + phase.flops
        return found

    def wire_bytes(self) -> float:
        """Bytes a token that the teacher's judgement takes on the wire."""
        return wire_bytes(self.pair.teacher, self.config.teacher, local=self.best.layout.is_shared)

    def disk(self) -> dict[str, int]:
        """Bytes that the run leaves, by what they are."""
        config, student = self.best.layout.config, self.pair.student
        item = 2 if config.student.dtype == "bfloat16" else 4
        trained = trained_parameters(student, config)
        moments = 2 if config.student.adamw == "8bit" else 8
        masters = 4 + (item if item == 2 else 0)
        checkpoint = item * student.total_parameters + (moments + masters) * trained
        curve = config.evaluation.curve
        kept = len(config.stages) if curve is not None and curve.keep_best else 0
        said = {
            kind: sum(job.tokens for job in self.work.jobs if job.role == kind)
            for kind in ("teacher_generate", "evaluate")
        }
        is_embedded = {config.teacher.model, config.student.model} <= set(EMBEDDED_NAMES)
        # What is served in fp8 or fp32 is made of the published checkpoint while it is loaded.
        published: Bytes = 1 if config.teacher.model.endswith("-FP8") else 2
        download = weight_bytes(self.pair.teacher, published) + 2 * student.total_parameters
        return {
            "download": 0 if is_embedded else download,
            "checkpoints": (len(config.stages) - 1 + KEPT_CHECKPOINTS) * checkpoint,
            "best weights": kept * item * trained,
            "student": item * student.total_parameters,
            "responses": int(STORED_TOKEN_BYTES * said["teacher_generate"]),
            "samples": int(STORED_TOKEN_BYTES * said["evaluate"]),
        }


POOL_OPTIONS = ("--gpus", "--gpus-teacher", "--gpus-student")
"""What the pools of GPUs are called: one for both, the teacher's, the student's."""


def choose_devices(
    *,
    shared: Pool | None,
    teacher: Pool | None,
    student: Pool | None,
    price: float | None,
    options: tuple[str, str, str] = POOL_OPTIONS,
) -> Devices | None:
    """What ``--gpus``, ``--gpus-teacher`` and ``--gpus-student`` mean together; None where none is given."""
    gpus, gpus_teacher, gpus_student = options
    if shared is not None and (teacher or student):
        raise UserError(f"{gpus} is one pool for both; give it, or {gpus_teacher} and {gpus_student}")
    if (teacher is None) != (student is None):
        missing = gpus_teacher if teacher is None else gpus_student
        raise UserError(f"{missing} is missing: the two are given together, or {gpus} for one pool")
    if shared is not None:
        pool = with_price(shared, price)
        return Devices(pool, pool, is_one=True)
    if teacher is not None and student is not None:
        return Devices(with_price(teacher, price), with_price(student, price), is_one=False)
    return None


def make_plan(
    config: RunConfig,
    pair: Pair,
    known: Mapping[str, Device],
    devices: Devices | None,
    *,
    price: float | None = None,
    lengths: Lengths | None = None,
    processes: int | None = None,
    machines: int = 1,
    asked: Sequence[str] = (),
) -> Plan:
    """The plan of ``config`` on ``devices``; None takes the fewest of the usual ones that it fits on. ``processes``
    fixes how many the student has. Of the usual devices it is on so many ``machines``, as many on each.

    Raises UserError where nothing fits, with what would.
    """
    check_pair(pair, config)
    config.check_processes(machines if processes is None else processes)
    if machines > 1 and config.sampler.backend == "vllm":
        raise UserError(
            f"sampler.backend=vllm starts a server that its own machine alone can reach, and the plan is asked for "
            f"{machines} machines; set it to transformers"
        )
    work = workload(config, lengths)
    if devices is not None:
        tried = [devices]
    elif machines > 1:
        tried = _usual_machines(config, known, price, processes, machines)
    else:
        tried = _usual(config, known, price, processes or 1)
    found: list[tuple[Devices, _Estimates]] = []
    for candidate in tried:
        # Machines are named for what the student has on them.
        count = candidate.student.count if machines > 1 and devices is None else processes
        estimates, shortages = _estimates(config, pair, candidate, work, count)
        if estimates:
            found.append((candidate, estimates))
        if () in estimates:
            break
    if not found:
        raise UserError(Ways(config, pair, tried[-1], count).sentence(known, shortages))
    # Rather more devices than another result.
    chosen, estimates = found[-1] if () in found[-1][1] else found[0]
    return replace(_ranked(config, pair, chosen, work, estimates, shortages=shortages), asked=tuple(asked))


def _usual(config: RunConfig, known: Mapping[str, Device], price: float | None, processes: int) -> list[Devices]:
    name = _usual_device(config, known)
    # The embedded models run on what is here.
    own = own_devices(config, on_gpu=known[name].kind == "gpu")
    counts = [processes + own] if _is_embedded(config) else [2**power for power in range(8)]
    pools = [with_price(Pool(name, known[name], count, PER_NODE), price) for count in counts]
    return [Devices(pool, pool, is_one=True) for pool in pools]


def _usual_machines(
    config: RunConfig, known: Mapping[str, Device], price: float | None, processes: int | None, machines: int
) -> list[Devices]:
    """So many machines with what the student has on each, the teacher in the same processes or on others' devices; the
    fewest devices first."""
    name = _usual_device(config, known)
    device = with_price(Pool(name, known[name], 1, 1), price).device
    few = [1] if _is_embedded(config) else [1, 2, 4, PER_NODE]
    found = []
    for each in few if processes is None else [processes // machines]:
        student = Pool(name, device, machines * each, each)
        found.append(Devices(student, student, is_one=True))
        if not _is_embedded(config):
            teachers = [Pool(name, device, 2**power, PER_NODE) for power in range(8)]
            found += [Devices(teacher, student, is_one=False) for teacher in teachers]
    return sorted(found, key=lambda devices: devices.count)


def _is_embedded(config: RunConfig) -> bool:
    return {config.teacher.model, config.student.model} <= set(EMBEDDED_NAMES)


def _usual_device(config: RunConfig, known: Mapping[str, Device]) -> str:
    if not _is_embedded(config):
        return DEFAULT_DEVICE
    # What is here, which may have been measured.
    return next((name for name, device in known.items() if device.measured), "CPU")


_Estimates = dict[tuple[Change, ...], list[Estimate]]


def _estimates(
    config: RunConfig, pair: Pair, devices: Devices, work: Workload, processes: int | None
) -> tuple[_Estimates, Search]:
    """By what was changed: what fits. And what did not, without changes."""
    found: _Estimates = {}
    unchanged = search(config, pair, devices, processes=processes)
    for changes in CHANGES:
        tried = unchanged if not changes else search(config, pair, devices, changes, processes=processes)
        if layouts := tried.layouts:
            found[changes] = [estimate(layout, pair, work) for layout in layouts]
    return found, unchanged


def estimate(layout: Layout, pair: Pair, work: Workload) -> Estimate:
    """The jobs of ``work`` on ``layout``."""
    passes = training_passes(layout.config.student)
    phases = [Phase(job, job_times(job, pair, layout), job.flops(getattr(pair, job.who), passes)) for job in work.jobs]
    steps = tuple(_steps(phases, layout))
    hidden = {(step.stage, role): seconds for step in steps for role, seconds in step.hidden.items()}
    phases = [replace(phase, hidden=hidden.get((phase.job.stage, phase.job.role), 0.0)) for phase in phases]
    return Estimate(layout, tuple(phases), steps)


def _steps(phases: Sequence[Phase], layout: Layout) -> Iterator[Step]:
    for name in layout.config.stages:
        own = {phase.job.role: phase for phase in phases if phase.job.stage == name}
        speaking = own.get("student_sample")
        if speaking is not None and speaking.job.times:
            yield step_of(name, {role: phase.seconds for role, phase in own.items()}, speaking.job.times, layout)


def _ranked(
    config: RunConfig,
    pair: Pair,
    devices: Devices,
    work: Workload,
    estimates: _Estimates,
    *,
    shortages: Search,
) -> Plan:
    first = next(iter(estimates))
    best = min(estimates[first], key=lambda one: one.cost)
    others: list[tuple[str, Estimate]] = []
    for name, group in (
        ("fastest", sorted(estimates[first], key=lambda one: one.seconds)[:1]),
        ("shared GPUs", [one for one in estimates[first] if one.layout.is_shared]),
        ("separate GPUs", [one for one in estimates[first] if not one.layout.is_shared]),
        *((", ".join(changes), group) for changes, group in estimates.items() if changes != first),
    ):
        if group:
            others.append((name, min(group, key=lambda one: one.cost)))
    return Plan(
        config=config,
        pair=pair,
        devices=devices,
        work=work,
        best=best,
        others=tuple((name, one) for name, one in others if one is not best),
        shortages=tuple(str(shortage) for shortage in shortages.shortages.values()),
    )
