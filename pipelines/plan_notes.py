"""What a plan assumed, and rules that hold on its layout, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from distill.memory import student_memory
from pipelines.layouts import Layout
from pipelines.pace import rows_together
from pipelines.plan import Plan

FEW_ROWS = 16
"""Fewer responses than this, decoded together, leave a GPU idle."""


def notes(plan: Plan) -> list[str]:
    """What was assumed, and rules that hold on this layout."""
    layout = plan.best.layout
    found = list(plan.work.notes)
    if plan.work.is_assumed:
        # Not among those of the work: a run that begins says them too, and its reader has none of these options.
        found.append(
            "`distill plan` takes other lengths by --think-tokens, --no-think-tokens and --prompt-tokens; yours are in "
            "`distill responses stats`"
        )
    for pool in plan.devices.pools:
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
    if layout.config.student.cpu_offload:
        found.append(
            f"offload: the student's machines have to hold {_offloaded(plan) / 1e9:,.0f} GB of it in their own memory "
            "together"
        )
    urls = plan.config.teacher.urls
    if not layout.is_shared and (urls.generate or urls.score):
        found.append(
            "servers that teacher.urls names are planned, paid for and started like the run's own: name their GPUs "
            "apart with --gpus-teacher and --gpus-student, and leave out of the commands what serves there already"
        )
    found += _sampler_notes(layout)
    if not layout.is_shared and plan.config.teacher.signal != "hidden":
        found.append(
            f"teacher.signal={plan.config.teacher.signal} is timed as if it were read as fast as hidden states; "
            "servers read log-probabilities slower"
        )
    elif not layout.is_shared:
        found.append(
            "servers of the two roles take turns on the teacher's GPUs: where the run misses one it stops with exit "
            "code 75; end the other, start it, and give the run's command again"
        )
    found += _few_rows(plan)
    found.append("left out: loading models, starting servers, writing checkpoints, waiting of uneven processes")
    return found


def _offloaded(plan: Plan) -> int:
    """Bytes that all processes together keep in their machines' memory: what each would hold on its GPU."""
    config, pair, num = plan.best.layout.config, plan.pair, plan.best.layout.student.processes
    settings = config.student.model_copy(update={"cpu_offload": False})
    whole = config.model_copy(update={"student": settings})
    parts = student_memory(whole, pair.student, pair.teacher, processes=num, engine="sharded").parts
    return num * (parts["weights"] + parts["moments"] + parts["gradients"])


def _sampler_notes(layout: Layout) -> Iterator[str]:
    """Of a vLLM that speaks for the student."""
    sampler, settings, memory = layout.student.sampler, layout.config.sampler, layout.student.memory
    if sampler is None:
        return
    on_gpu = layout.student_pool.device.kind == "gpu"
    if sampler.devices and on_gpu:
        yield "sampler.backend=vllm: one server on the first of sampler.devices; sending weights is left out"
    elif sampler.devices:
        yield (
            f"sampler.backend=vllm: one server, taken to have {sampler.devices} core(s) of its own beside the trainer's"
            "; sending weights is left out"
        )
    else:
        yield "sampler.backend=vllm: on the trainer's device, in turns with it; sending weights is left out"
    if on_gpu and not settings.devices:
        most = sampler.memory.has / layout.student_pool.bytes
        meanwhile = "while it is awake" if settings.sleep else "while it trains too"
        yield (
            f"vLLM takes {math.floor(100 * most) / 100:.2f} of the GPU beside the trainer, {meanwhile}, unless "
            f"sampler.server_args says --gpu-memory-utilization"
        )
    if settings.staleness:
        kept = "the server does not sleep, so that what both hold is held at once; " if memory.parts["server"] else ""
        yield (
            f"sampler.staleness=1: {kept}responses are taken to end one after the other. Where all end at once, a step "
            "takes at least half of sampling, scoring and training together"
        )


def _few_rows(plan: Plan) -> Iterator[str]:
    """Where a process decodes so few responses together that it mostly waits."""
    config = plan.best.layout.config
    few: dict[int, list[str]] = {}
    for phase in plan.best.phases:
        job = phase.job
        rows = min(rows_together(part, config) for part in job.sequences)
        speaks_here = plan.best.layout.student.sampler is None
        is_here = speaks_here if job.who == "student" else plan.best.layout.is_shared
        if job.kind == "decode" and is_here and rows < min(FEW_ROWS, sum(part.num for part in job.sequences)):
            few.setdefault(rows, []).append(f"{job.stage} {job.role}")
    for rows, places in few.items():
        yield (
            f"{', '.join(places)}: {rows} responses are decoded together, since sampler_tokens "
            f"{config.sampler_tokens:,} counts each at its limit; a lower max_new_tokens is faster"
        )
