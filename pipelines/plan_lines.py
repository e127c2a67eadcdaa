"""A plan in lines, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from distill.hardware import Pool, config_home
from distill.memory import RESERVED_BYTES
from pipelines.fitting import changed
from pipelines.layouts import Layout
from pipelines.plan import Estimate, Plan
from pipelines.plan_document import commands, memory_by_phase, phase_memory
from pipelines.plan_notes import notes

LONG_HOURS = 0.1
"""From here on durations are shown in hours."""


def lines(plan: Plan) -> Iterator[str]:
    """The plan for people."""
    best, layout = plan.best, plan.best.layout
    on, busy = "", {"teacher": "", "student": ""}
    if not layout.is_shared:
        on = f" on {layout.teacher_pool.of(layout.teacher.gpus)}"
        hours = {"teacher": layout.teacher.gpus, "student": layout.student.devices}
        busy = {who: f", busy {best.busy(who) / (gpus * best.seconds / 3600):.0%}" for who, gpus in hours.items()}
    if layout.changes:
        sets = " ".join(f"--set {text}" for text in changed(plan.config, layout.changes)[1])
        yield f"nothing fits {plan.devices} as configured; with {sets}:"
    yield (
        f"{plan.config.teacher.model} -> {plan.config.student.model} on {plan.devices}: {layout.gpus} of "
        f"{plan.devices.count}, {_duration(best.seconds)}, {best.gpu_hours:,.2f} GPU-hours{_money(best)}"
    )
    yield f"  teacher: {layout.teacher}{on}{busy['teacher']}"
    yield f"  student: {layout.student} on {layout.student_pool.of(layout.student.devices)}{busy['student']}"
    yield ""
    yield from _memory_lines(plan)
    yield ""
    yield from _phase_lines(plan)
    yield ""
    yield "tokens and FLOPs by role:"
    for role, (tokens, flops) in plan.flops_by_role().items():
        yield f"  {role:18} {tokens:>15,.0f} {flops:>10.2e}"
    yield f"on the wire: {plan.wire_bytes():,.0f} bytes a token that the teacher judges"
    disk = plan.disk()
    shown = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in disk.items() if size)
    yield f"disk: {sum(disk.values()) / 1e9:,.2f} GB ({shown})"
    if plan.others:
        yield "other layouts:"
        for name, one in plan.others:
            yield (
                f"  {name}: {one.layout.gpus} GPUs, {_duration(one.seconds)}, {one.gpu_hours:,.2f} GPU-hours"
                f"{_money(one)}; teacher {one.layout.teacher}; student {one.layout.student}"
                f"{'; --set ' + ' --set '.join(one.layout.assignments) if one.layout.changes else ''}"
            )
    for shortage in plan.shortages:
        yield f"does not fit: {shortage}"
    yield "commands:"
    for command in commands(plan):
        yield f"  {command}"
    for note in notes(plan):
        yield f"note: {note}"


def short_lines(plan: Plan, *, is_resumed: bool = False, free_disk: int | None = None) -> Iterator[str]:
    """The plan for whoever watches the run begin; of a resumed one what is left. ``free_disk`` is what the run's disk
    has, where it is known."""
    best, layout = plan.best, plan.best.layout
    what = "what is left of " if is_resumed else ""
    elsewhere = ", besides the teacher's servers, which are not its own" if not layout.teacher.roles_at_once else ""
    yield (
        f"plan: {what}{plan.config.teacher.model} -> {plan.config.student.model} on {plan.devices}: about "
        f"{_duration(best.seconds)}, {best.gpu_hours:,.2f} GPU-hours{_money(best)}{elsewhere}"
    )
    yield f"  layout: teacher {layout.teacher}; student {layout.student}"
    parts = [f"{name} {_duration(seconds)}" for name, seconds in _by_stage(plan).items()]
    yield f"  time: {', '.join(parts) or 'nothing but the report is left'}"
    yield from _step_lines(plan)
    most = [
        f"{name.partition(',')[0]} {held / 1e9:,.2f} of {pool.device.memory:,.2f} GB"
        for name, held, pool in _most_memory(plan)
    ]
    yield f"  memory of one device at the most: {', '.join(most)}"
    disk = sum(plan.disk().values())
    yield f"  disk: {disk / 1e9:,.2f} GB" + (
        "" if free_disk is None else f" of {free_disk / 1e9:,.2f} GB that are free"
    )
    for note in (*plan.work.notes, *_source(layout)):
        yield f"  {note}"
    yield from _warnings(plan.shortages)
    if free_disk is not None and not is_resumed and disk > free_disk:
        yield "warning: by the plan the disk is too small; the run goes on and stops where it is full, to be resumed"


def lines_of_several(plans: Sequence[Plan]) -> Iterator[str]:
    """Of several runs together, one after the other."""
    if not plans:
        return
    prices = [plan.best.usd for plan in plans]
    money = "" if None in prices else f", ${sum(price or 0.0 for price in prices):,.2f}"
    hours, disk = sum(plan.best.gpu_hours for plan in plans), sum(sum(plan.disk().values()) for plan in plans)
    seconds = sum(plan.best.seconds for plan in plans)
    yield (
        f"plan: {len(plans)} run{'s' if len(plans) > 1 else ''} on {plans[0].devices}, about {_duration(seconds)} one "
        f"after the other, {hours:,.2f} GPU-hours{money}, {disk / 1e9:,.2f} GB of disk; each one's own is in its log"
    )
    yield from _warnings(dict.fromkeys(shortage for plan in plans for shortage in plan.shortages))


def _warnings(shortages: Iterable[str]) -> Iterator[str]:
    for shortage in shortages:
        yield (
            f"warning: by the plan it does not fit: {shortage}. The run goes on as it is configured and may run out of "
            "memory; `distill plan --gpus` says what fits"
        )


def _by_stage(plan: Plan) -> dict[str, float]:
    """Seconds of each stage that has something to do, and of the examinations together."""
    found: dict[str, float] = {}
    for phase in plan.best.phases:
        if phase.seconds > phase.hidden:
            is_examination = phase.job.role == "evaluate" and not phase.job.is_between
            name = "examinations" if is_examination else phase.job.stage
            found[name] = found.get(name, 0.0) + phase.seconds - phase.hidden
    return found


def _most_memory(plan: Plan) -> Iterator[tuple[str, int, Pool]]:
    """Of one device of each side, in the phase that takes most."""
    layout = plan.best.layout
    by_phase = {name: sum(parts.values()) for name, parts in memory_by_phase(layout).items()}
    for side, pool in (("student", layout.student_pool), ("teacher", layout.teacher_pool)):
        held = {name: size for name, size in by_phase.items() if name.startswith(side)}
        if held:
            name = max(held, key=lambda name: held[name])
            yield name, held[name], pool


def _source(layout: Layout) -> Iterator[str]:
    device, name, here = layout.student_pool.device, layout.student_pool.name, layout.student_pool.per_node
    if device.measured:
        yield f"{name} as measured on {device.measured}"
    else:
        yield f"by the table's figures of {name}, which are not this machine's; `distill plan --calibrate` measures it"
    if layout.student.processes > here:
        yield (
            f"the other machines are taken to be like this one, with {here} of the processes each, and the network "
            f"between them for {device.network:g} GB/s a process, the table's figure, which is not measured: `network` "
            f"of {name} in {config_home() / 'hardware.yaml'} replaces it"
        )


def _memory_lines(plan: Plan) -> Iterator[str]:
    layout = plan.best.layout
    yield "memory of one device, GB:"
    for name, parts in memory_by_phase(layout).items():
        pool = layout.teacher_pool if name.startswith("teacher") else layout.student_pool
        shown = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items())
        whole = sum(parts.values()) / 1e9
        yield f"  {name}: {whole:.2f} of {pool.device.memory:g} ({shown})"
    if layout.student_pool.device.kind == "gpu":
        left = RESERVED_BYTES / 1e9
        yield f"  {left:g} GB of the student's GPUs are left to the CUDA context, NCCL and fragmentation"


def _phase_lines(plan: Plan) -> Iterator[str]:
    yield f"  {'stage':12} {'role':18} {'GB':>7} {'times':>6} {'each':>10} {'together':>10}  limited by"
    for phase in plan.best.phases:
        beside = " (beside a longer one)" if phase.is_hidden else ""
        if phase.seconds > phase.hidden > 0:
            beside = f" ({_duration(phase.hidden)} of it beside something longer)"
        held = sum(phase_memory(phase, plan).values()) / 1e9
        yield (
            f"  {phase.job.stage:12} {phase.job.role:18} {held:>7.2f} {phase.job.times:>6} "
            f"{_duration(phase.each.seconds):>10} {_duration(phase.seconds):>10}  {phase.bottleneck}{beside}"
        )
    yield from _step_lines(plan)


def _step_lines(plan: Plan) -> Iterator[str]:
    for step in plan.best.steps:
        yield f"  a step of {step.stage}: {_duration(step.seconds)}, {step.order}"


def _duration(seconds: float) -> str:
    if seconds >= LONG_HOURS * 3600:
        return f"{seconds / 3600:,.2f} h"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _money(one: Estimate) -> str:
    return "" if one.usd is None else f", ${one.usd:,.2f}"
