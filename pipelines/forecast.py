"""What a run that is about to begin will take, said before it spends anything.

A plan (``pipelines.plan``) looks for a layout; a run has one: its configuration as it is, on the devices that are here.
Memory, times and costs of that layout are the plan's own. What an earlier process of the run has done, as far as its
files say, is left out. A forecast stops no run: what does not fit is warned of.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from distill.config import RunConfig
from distill.errors import UserError
from distill.hardware import Device, Pool, load_devices, named_like
from distill.journal import Journal, read_json
from distill.memory import RESERVED_BYTES, student_memory
from distill.progress import say
from distill.server_memory import ServerMemory, server_memory
from distill.vllm.cuts import needs_expert_parallel
from distill.vllm.launch import Role
from pipelines.doctor.machine import free_memory
from pipelines.fitting import Shortage, teacher_bytes, teacher_config
from pipelines.layouts import (
    Devices,
    Layout,
    Pair,
    SamplerLayout,
    StudentLayout,
    TeacherLayout,
    own_devices,
)
from pipelines.plan import Plan, estimate
from pipelines.plan_lines import lines_of_several, short_lines
from pipelines.planning import known_shape
from pipelines.processes import choose_engine, processes_to_start
from pipelines.workload import Job, Workload, workload
from students.ranks import Ranks


def named_pair(config: RunConfig) -> Pair | None:
    """The pair, where both shapes are known before a model is opened, which may be downloaded for it."""
    try:
        teacher, student = known_shape(config.teacher.model), known_shape(config.student.model)
    except UserError:
        # Whoever opens the models says what is wrong with them.
        return None
    return None if teacher is None or student is None else Pair(teacher, student)


def announce(config: RunConfig, pair: Pair, journal: Journal, ranks: Ranks, hosts: Sequence[str] = ()) -> None:
    """Say on standard error what the run will take; of a resumed one, what is left. ``hosts`` as in ``forecast``."""
    try:
        plan = forecast(config, pair, ranks, hosts)
    except UserError as error:
        say(f"plan: none can be made: {error}")
        return
    is_resumed = (journal.path / "config.yaml").exists()
    plan = replace(plan, work=left(plan.work, config, journal)) if is_resumed else plan
    plan = replace(plan, best=estimate(plan.best.layout, pair, plan.work))
    for line in short_lines(plan, is_resumed=is_resumed, free_disk=_free_disk(journal.path)):
        say(line)


def announce_several(runs: Sequence[tuple[RunConfig, Pair]]) -> None:
    """The same of runs that begin one after the other, each in processes of its own, and say their own then."""
    ranks = Ranks(0, processes_to_start(None))
    try:
        plans = [forecast(config, pair, ranks) for config, pair in runs]
    except UserError as error:
        say(f"plan: none can be made: {error}")
        return
    for line in lines_of_several(plans):
        say(line)


def forecast(config: RunConfig, pair: Pair, ranks: Ranks, hosts: Sequence[str] = ()) -> Plan:
    """The plan of ``config`` as it is. ``hosts`` are the machines of its processes, in order; without any all are on
    this one.

    Raises UserError for a device that no table has figures of, and for settings that the run will refuse itself.
    """
    here = sum(host == hosts[ranks.number] for host in hosts) or ranks.count
    pool = _pool(load_devices(), ranks, here, config)
    student = _student(config, pair, ranks, pool)
    teacher = _teacher(config, pair, pool)
    layout = Layout(config, teacher, student, pool, pool, (), ())
    pool = pool.of(layout.gpus)
    layout = replace(layout, teacher_pool=pool, student_pool=pool)
    work = workload(config)
    return Plan(
        config=config,
        pair=pair,
        devices=Devices(pool, pool, is_one=True),
        work=work,
        best=estimate(layout, pair, work),
        others=(),
        shortages=tuple(str(shortage) for shortage in _shortages(layout)),
    )


def _pool(known: Mapping[str, Device], ranks: Ranks, here: int, config: RunConfig) -> Pool:
    """The devices here, which ``here`` of the run's processes share; every machine of the run is taken to have the
    same, and as many processes."""
    if ranks.device.type == "cpu":
        name = next((name for name, device in known.items() if device.measured and device.kind == "cpu"), "CPU")
        device, has = known[name], free_memory() / here
        if math.isfinite(has):
            device = device.model_copy(update={"memory": has / 1e9})
        # A server that samples has a core beside the processes, and all have the machine's memory.
        return Pool(name, device, ranks.count, here + own_devices(config, on_gpu=False))
    has = torch.cuda.get_device_properties(ranks.device).total_memory
    called = torch.cuda.get_device_name(ranks.device)
    name = named_like(called, has / 1e9, known)
    if name not in known:
        raise UserError(f"no table has figures of {called}; `distill plan --calibrate` measures it")
    device = known[name].model_copy(update={"memory": has / 1e9})
    return Pool(name, device, ranks.count, torch.cuda.device_count() if here == ranks.count else here)


def _student(config: RunConfig, pair: Pair, ranks: Ranks, pool: Pool) -> StudentLayout:
    engine = choose_engine(config, pair.student, ranks, pair.teacher)
    device: Literal["cpu", "cuda"] = "cuda" if ranks.device.type == "cuda" else "cpu"
    memory = student_memory(config, pair.student, pair.teacher, processes=ranks.count, engine=engine, device=device)
    return StudentLayout(ranks.count, engine, memory, SamplerLayout.of(config, pair.student, memory, pool))


def _teacher(config: RunConfig, pair: Pair, pool: Pool) -> TeacherLayout:
    """In this process, or behind servers; those that somebody else runs are taken to have such devices too, which are
    not the run's to pay for."""
    settings, item = config.teacher, teacher_bytes(config)
    if settings.backend == "local":
        return TeacherLayout("local", item)
    given = settings.urls.generate or settings.urls.score
    are_ours = not (settings.urls.generate and settings.urls.score)
    servers: dict[Role, ServerMemory] = {
        role: server_memory(
            pair.teacher,
            role,
            tensor_parallel=settings.tensor_parallel,
            pipeline_parallel=settings.pipeline_parallel,
            item=item,
            gpu_bytes=pool.bytes,
            tokens_under_way=settings.batch_tokens,
            on_gpu=pool.device.kind == "gpu",
        )
        for role in ("generate", "score")
    }
    return TeacherLayout(
        "vllm",
        item,
        settings.tensor_parallel,
        settings.pipeline_parallel,
        len(given) if given else settings.replicas,
        needs_expert_parallel(teacher_config(pair.teacher, config), settings.tensor_parallel, settings.quantization),
        servers,
        roles_at_once=1 if are_ours else 0,
    )


def _shortages(layout: Layout) -> list[Shortage]:
    """What does not fit. Of servers that somebody else runs nothing is known."""
    config, pool = layout.config, layout.student_pool
    found = []
    room = pool.bytes - (RESERVED_BYTES if pool.device.kind == "gpu" else 0)
    needs = layout.student.memory.total
    if needs > room:
        beside = f" with the teacher {config.teacher.model} beside it" if layout.is_shared else ""
        beside += " and its own vLLM server" if layout.student.memory.parts["server"] else ""
        found.append(Shortage(f"the student {config.student.model}{beside}", needs, room, layout.student.processes))
    longest = config.max_prompt_tokens + config.longest_response + 1
    sampler = layout.student.sampler
    if sampler is not None and config.sampler.devices and not sampler.memory.fits(longest):
        what = f"a server that samples from {config.student.model}"
        found.append(Shortage(what, sampler.memory.least(longest), sampler.memory.has, 1))
    least = max((server.least(longest) for server in layout.teacher.servers.values()), default=0)
    if layout.teacher.gpus and not all(server.fits(longest) for server in layout.teacher.servers.values()):
        gpus = layout.teacher.tensor_parallel * layout.teacher.pipeline_parallel
        found.append(Shortage(f"a server of the teacher {config.teacher.model}", least, pool.bytes, gpus))
    return found


def left(work: Workload, config: RunConfig, journal: Journal) -> Workload:
    """What of ``work`` the run has not done, as far as its last checkpoint and its account of costs say."""
    checkpoint = journal.last_checkpoint()
    stage, step = (0, 0) if checkpoint is None else (checkpoint[0]["stage"], checkpoint[0]["step"])
    costs = journal.path / "costs.json"
    account: dict[str, Any] = read_json(costs) if costs.exists() else {}
    names = list(config.stages)

    def is_charged(job: Job) -> bool:
        return job.stage in account.get(job.role, {}).get("stages", {})

    def times_of(job: Job) -> int:
        if job.role == "evaluate" and not job.is_between:
            return 0 if is_charged(job) else job.times
        number = names.index(job.stage)
        if number != stage:
            return job.times if number > stage else 0
        if job.role == "teacher_generate":
            return 0 if step or is_charged(job) else job.times
        return max(0, math.ceil(job.times * (1 - step / _num_steps(job.stage, work))))

    return replace(work, jobs=tuple(replace(job, times=times_of(job)) for job in work.jobs))


def _num_steps(stage: str, work: Workload) -> int:
    """Of a stage, as its checkpoints count them: one for each time the student samples, where it does."""
    jobs = {job.role: job for job in reversed(work.of(stage)) if not job.is_between}
    return jobs.get("student_sample", jobs["student_train"]).times


def _free_disk(path: Path) -> int:
    """Bytes where the run directory is or will be."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
