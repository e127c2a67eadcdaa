"""A plan for programs (one JSON document) and for people (lines)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from distill.hardware import Pool
from distill.memory import RESERVED_BYTES, STAYS
from pipelines.layouts import Layout, changed
from pipelines.pace import rows_together
from pipelines.plan import Estimate, Phase, Plan

LONG_HOURS = 0.1
"""From here on durations are shown in hours."""

FEW_ROWS = 16
"""Fewer responses than this, decoded together, leave a GPU idle."""

PORTS = {"generate": 8001, "score": 8101}
"""Of the first server of each role, in the commands that a plan proposes."""


def document(plan: Plan) -> dict[str, Any]:
    """Everything the plan knows. Bytes are of one GPU, seconds of the whole run, money in USD."""
    best = plan.best
    return {
        "teacher": {"model": plan.config.teacher.model, **_model(plan, "teacher")},
        "student": {"model": plan.config.student.model, **_model(plan, "student")},
        "devices": str(plan.devices),
        "hardware": {pool.name: pool.device.model_dump(mode="json") for pool in _pools(plan)},
        "layout": _layout(best),
        "memory": memory_by_phase(best.layout),
        "phases": [_phase(phase) for phase in best.phases],
        "roles": {role: {"tokens": tokens, "flops": flops} for role, (tokens, flops) in plan.flops_by_role().items()},
        "wire_bytes_per_token": plan.wire_bytes(),
        "disk_bytes": plan.disk(),
        "commands": commands(plan),
        "others": [{"what": name, **_layout(one)} for name, one in plan.others],
        "does_not_fit": list(plan.shortages),
        "lengths": asdict(plan.work.lengths),
        "notes": notes(plan),
    }


def _model(plan: Plan, who: str) -> dict[str, int]:
    shape = getattr(plan.pair, who)
    return {"parameters": shape.total_parameters, "active_parameters": shape.active_parameters}


def _pools(plan: Plan) -> list[Pool]:
    devices = plan.devices
    return [devices.student] if devices.is_one else [devices.teacher, devices.student]


def _layout(one: Estimate) -> dict[str, Any]:
    layout, teacher = one.layout, one.layout.teacher
    return {
        "gpus": layout.gpus,
        "shared": layout.is_shared,
        "teacher": {
            "backend": teacher.backend,
            "gpus": teacher.gpus,
            "tensor_parallel": teacher.tensor_parallel,
            "pipeline_parallel": teacher.pipeline_parallel,
            "expert_parallel": teacher.expert_parallel,
            "replicas": teacher.replicas,
            "weight_bytes": teacher.item,
        },
        "student": {
            "processes": layout.student.processes,
            "engine": layout.student.engine,
            "lora": layout.config.student.lora is not None,
            "cpu_offload": layout.config.student.cpu_offload,
            "micro_batch_tokens": layout.config.student.micro_batch_tokens,
            "sampler_tokens": layout.config.sampler_tokens,
        },
        "changes": list(layout.changes),
        "assignments": list(layout.assignments),
        "seconds": one.seconds,
        "gpu_hours": one.gpu_hours,
        "busy_gpu_hours": {who: one.busy(who) for who in ("teacher", "student")},
        "usd": one.usd,
    }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "stage": phase.job.stage,
        "role": phase.job.role,
        "who": phase.job.who,
        "times": phase.job.times,
        "seconds_each": phase.each.seconds,
        "seconds": phase.seconds,
        "hidden": phase.is_hidden,
        "bottleneck": phase.bottleneck,
        "seconds_by": asdict(phase.each),
        "tokens": phase.job.tokens,
        "flops": phase.flops,
    }


def memory_by_phase(layout: Layout) -> dict[str, dict[str, int]]:
    """Bytes of one GPU while somebody works on it: by whose GPU and what is done, by part.

    Parts are upper bounds: every response at its limit. A server's cache is what vLLM takes, all that is left.
    """
    parts = layout.student.memory.parts
    stays = {name: parts[name] for name in STAYS if parts[name]}
    training = {name: size for name, size in parts.items() if name not in (*STAYS, "sampling") and size}
    found = {
        "student, training": {**stays, **training},
        "student, sampling": {**stays, "KV cache and gathered weights": parts["sampling"]},
    }
    for role, server in layout.teacher.servers.items():
        held = {name: size for name, size in server.parts.items() if size}
        found[f"teacher, {'generating' if role == 'generate' else 'scoring'}"] = {**held, "KV cache": server.room}
    return found


def commands(plan: Plan) -> list[str]:
    """What to type for the best layout."""
    layout = plan.best.layout
    model = next((text for text in layout.assignments if text.startswith("teacher.model=")), None)
    teacher = plan.config.teacher.model if model is None else model.partition("=")[2]
    rest = [text for text in layout.assignments if text != model]
    run = ["distill", "run", "--teacher", teacher, "--student", plan.config.student.model, *plan.asked]
    if layout.student.processes > 1:
        run += ["--processes", str(layout.student.processes)]
    if layout.is_shared:
        return [shlex.join([*run, *_sets(rest)])]
    held, is_one_machine = layout.teacher, plan.devices.is_one and layout.gpus <= layout.student_pool.per_node
    num_nodes = -(-held.tensor_parallel * held.pipeline_parallel // layout.teacher_pool.per_node)
    serve = ["distill", "teacher", "serve", "--teacher", teacher, "--tp", str(held.tensor_parallel)]
    if held.pipeline_parallel > 1:
        serve += ["--pp", str(held.pipeline_parallel)]
    if num_nodes > 1:
        serve += ["--nodes", str(num_nodes), "--node-address", "TEACHER_HOST", "--node-rank", "RANK"]
    elif held.replicas > 1:
        serve += ["--replicas", str(held.replicas)]
    if plan.config.teacher.quantization or "teacher.quantization=fp8" in rest:
        serve += ["--quantization", plan.config.teacher.quantization or "fp8"]
    on_teacher, on_student = (
        (_visible(range(held.gpus)), _visible(range(held.gpus, layout.gpus))) if is_one_machine else ("", "")
    )
    host = "127.0.0.1" if is_one_machine else "TEACHER_HOST"
    urls = [
        f"teacher.urls.{role}=[{', '.join(f'http://{host}:{PORTS[role] + place}' for place in range(held.replicas))}]"
        for role in ("generate", "score")
    ]
    return [
        *(f"{on_teacher}{shlex.join([*serve, '--role', role, '--port', str(port)])}" for role, port in PORTS.items()),
        on_student + shlex.join([*run, *_sets([text for text in rest if "quantization" not in text]), *_sets(urls)]),
    ]


def _sets(assignments: list[str]) -> list[str]:
    return [word for text in assignments for word in ("--set", text)]


def _visible(places: range) -> str:
    return f"CUDA_VISIBLE_DEVICES={','.join(map(str, places))} "


def notes(plan: Plan) -> list[str]:
    """What was assumed, and rules that hold on this layout."""
    layout = plan.best.layout
    found = list(plan.work.notes)
    for pool in _pools(plan):
        measured = pool.device.measured
        found.append(f"{pool.name}: {'measured, ' + measured if measured else pool.device.source}")
    if layout.teacher.expert_parallel:
        found.append(
            f"tp {layout.teacher.tensor_parallel} would cut a block of the FP8 experts that shares one scale: they "
            "stay whole, each on one GPU (--enable-expert-parallel, which the server is started with)"
        )
    if layout.student.engine == "sharded" and plan.pair.student.tied:
        found.append(
            "embedding and head are one tensor: with the final norm they are one FSDP group, gathered together"
        )
    if not layout.is_shared:
        found.append(
            "servers of the two roles take turns on the teacher's GPUs: where the run misses one it stops with exit "
            "code 75; end the other, start it, and give the run's command again"
        )
    found += _few_rows(plan)
    found.append("left out: loading models, starting servers, writing checkpoints, waiting of uneven processes")
    return found


def _few_rows(plan: Plan) -> Iterator[str]:
    """Where a student's process decodes so few responses together that it mostly waits."""
    config = plan.best.layout.config
    few: dict[int, list[str]] = {}
    for phase in plan.best.phases:
        job, rows = phase.job, rows_together(phase.job, config)
        if job.kind == "decode" and job.who == "student" and rows < min(FEW_ROWS, sum(p.num for p in job.sequences)):
            few.setdefault(rows, []).append(f"{job.stage} {job.role}")
    for rows, places in few.items():
        yield (
            f"{', '.join(places)}: {rows} responses are decoded together, since sampler_tokens "
            f"{config.sampler_tokens:,} counts each at its limit; a lower max_new_tokens is faster"
        )


def lines(plan: Plan) -> Iterator[str]:
    """The plan for people."""
    best, layout = plan.best, plan.best.layout
    on = "" if layout.is_shared else f" on {layout.teacher_pool.of(layout.teacher.gpus)}"
    if layout.changes:
        sets = " ".join(f"--set {text}" for text in changed(plan.config, layout.changes)[1])
        yield f"nothing fits {plan.devices} as configured; with {sets}:"
    yield (
        f"{plan.config.teacher.model} -> {plan.config.student.model} on {plan.devices}: {layout.gpus} of "
        f"{plan.devices.count}, {_duration(best.seconds)}, {best.gpu_hours:,.2f} GPU-hours{_money(best)}"
    )
    yield f"  teacher: {layout.teacher}{on}"
    yield f"  student: {layout.student} on {layout.student_pool.of(layout.student.processes)}"
    yield ""
    yield from _memory_lines(plan)
    yield ""
    yield from _phase_lines(best)
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


def _phase_lines(best: Estimate) -> Iterator[str]:
    yield f"  {'stage':12} {'role':18} {'times':>6} {'each':>10} {'together':>10}  limited by"
    for phase in best.phases:
        beside = " (beside a longer one)" if phase.is_hidden else ""
        yield (
            f"  {phase.job.stage:12} {phase.job.role:18} {phase.job.times:>6} {_duration(phase.each.seconds):>10} "
            f"{_duration(phase.seconds):>10}  {phase.bottleneck}{beside}"
        )


def _duration(seconds: float) -> str:
    if seconds >= LONG_HOURS * 3600:
        return f"{seconds / 3600:,.2f} h"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _money(one: Estimate) -> str:
    return "" if one.usd is None else f", ${one.usd:,.2f}"
