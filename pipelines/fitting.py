"""Which layouts fit the devices that there are.

What a layout needs is searched for in what does not change the result: how many GPUs each side gets, how they are cut
(by the rules of ``distill.vllm.cuts``), tokens of a micro-batch and of the sampler's cache, offload. What changes the
result is tried apart (``CHANGES``), and said. This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distill.config import RunConfig
from distill.errors import UserError
from distill.family import SHORT_NAMES, SIZES, Shape
from distill.hardware import Pool
from distill.memory import RESERVED_BYTES, Engine, Memory, longest_sequence, student_memory
from distill.model_config import LoraSettings, TeacherSettings
from distill.server_memory import Bytes, ServerMemory, server_memory
from distill.vllm.cuts import check_cut, needs_expert_parallel
from distill.vllm.launch import Role
from pipelines.layouts import (
    Change,
    Devices,
    Layout,
    Pair,
    SamplerLayout,
    StudentLayout,
    TeacherLayout,
    own_devices,
)
from pipelines.placement import placement

CHANGES: tuple[tuple[Change, ...], ...] = (
    (),
    ("fp8",),
    ("adamw-8bit",),
    ("lora",),
    ("fp8", "adamw-8bit"),
    ("fp8", "lora"),
)
"""What may be changed about the result, the least first."""

FP8_BLOCK = 128
"""Rows of a weight that share one scale in the published FP8 checkpoints."""

LEAST_TOKENS = 2048
"""Micro-batches are not made smaller than this; caches not than the longest sequence."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Something that does not fit: who, bytes that one GPU would need at the least, and of how many GPUs."""

    what: str
    needs: int
    has: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.what} needs {self.needs / 1e9:.1f} GB on each of {self.gpus} and has {self.has / 1e9:.1f}"


@dataclass
class Search:
    """What was found. ``shortages`` hold the one that was missed by least of each kind."""

    layouts: list[Layout] = field(default_factory=list)
    shortages: dict[str, Shortage] = field(default_factory=dict)
    fitted: set[str] = field(default_factory=set)
    """Kinds of which something fits by itself."""

    @property
    def lacks(self) -> str:
        """Why nothing fits, in words."""
        reasons = [str(shortage) for kind, shortage in self.shortages.items() if kind not in self.fitted]
        return "; ".join(reasons) or "there is no room for both"

    def miss(self, kind: str, shortage: Shortage) -> None:
        known = self.shortages.get(kind)
        if known is None or shortage.needs < known.needs:
            self.shortages[kind] = shortage


def check_pair(pair: Pair, config: RunConfig) -> None:
    """Raise UserError for two models that no layout can join."""
    rows = pair.teacher.vocabulary, pair.student.vocabulary
    if rows[0] != rows[1]:
        raise UserError(
            f"the teacher {config.teacher.model} has {rows[0]:,} vocabulary rows and the student "
            f"{config.student.model} {rows[1]:,}; a divergence needs the same rows: take a pair of one family"
        )


def search(
    config: RunConfig,
    pair: Pair,
    devices: Devices,
    changes: Sequence[Change] = (),
    *,
    processes: int | None = None,
) -> Search:
    """Every layout of ``devices`` that fits, and what the others lacked. ``processes`` fixes the student's number.

    A run whose sampler is for one process has one, and none has more than its steps can be shared among.
    """
    found = Search()
    base, assignments = changed(config, changes)
    if base is None:
        return found
    if devices.student.device.kind == "cpu" and base.student.adamw == "8bit":
        return found
    seen = _Students(base, pair, devices.student, found)
    own = own_devices(base, on_gpu=devices.student.device.kind == "gpu")
    most = _most_processes(base, devices, own)

    def add(teacher: TeacherLayout, student: tuple[RunConfig, StudentLayout]) -> None:
        config, layout = student
        new = (*assignments, *_new_settings(base, config, teacher, layout))
        found.layouts.append(Layout(config, teacher, layout, devices.teacher, devices.student, tuple(changes), new))

    item = teacher_bytes(base)
    # Who is quantised as it is loaded is so by vLLM alone.
    if devices.is_one and item > 1 and base.teacher.quantization is None:
        for count in _counts(most, processes):
            for student in seen.local(count):
                add(TeacherLayout("local", item), student)
    for teacher in _servers(base, pair, devices, found):
        left = devices.count - teacher.gpus - own if devices.is_one else most
        for count in _counts(min(left, most), processes):
            for student in seen.remote(count):
                add(teacher, student)
    found.layouts = _kept(found.layouts, devices)
    return found


def _kept(layouts: Sequence[Layout], devices: Devices) -> list[Layout]:
    """Those that the machines can be divided into; offload only where nothing fits without."""
    pools = devices.teacher, devices.student
    placed = [one for one in layouts if placement(one.teacher, one.student, pools, is_one=devices.is_one) is not None]
    return [one for one in placed if not one.config.student.cpu_offload] or placed


def _most_processes(config: RunConfig, devices: Devices, own: int) -> int:
    """Beside ``own`` devices of a vLLM that speaks for them, which reaches those of its machine alone."""
    pool = devices.student
    if config.sampler.backend == "transformers":
        return min(pool.count, config.most_processes)
    most = 1 if config.sampler.confines else min(pool.count, config.most_processes)
    return min(most, min(pool.count, pool.per_node) - own)


def teacher_bytes(config: RunConfig) -> Bytes:
    """Of a weight of the teacher as it is served."""
    if config.teacher.model.endswith("-FP8") or (config.teacher.quantization or "").startswith("fp8"):
        return 1
    return 2 if config.teacher.dtype == "bfloat16" else 4


def teacher_config(shape: Shape, config: RunConfig) -> dict[str, Any]:
    """What the teacher's own configuration says about its cuts."""
    width = "moe_intermediate_size" if shape.num_experts else "intermediate_size"
    found: dict[str, Any] = {width: shape.mlp_width}
    if config.teacher.model.endswith("-FP8"):
        found["quantization_config"] = {"weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    return found


def changed(config: RunConfig, changes: Sequence[Change]) -> tuple[RunConfig | None, tuple[str, ...]]:
    """``config`` with the changes, and the assignments that make them; None where one is there already or cannot be."""
    teacher, student = config.teacher, config.student
    assignments: list[str] = []
    for change in changes:
        if change == "fp8":
            size = SHORT_NAMES.get(teacher.model, teacher.model)
            if teacher_bytes(config) == 1:
                return None, ()
            if size in SIZES:
                teacher = teacher.model_copy(update={"model": f"Qwen/Qwen3-{size}-FP8"})
                assignments.append(f"teacher.model={teacher.model}")
            else:
                teacher = teacher.model_copy(update={"quantization": "fp8"})
                assignments.append("teacher.quantization=fp8")
        elif change == "lora":
            if student.lora is not None or student.cpu_offload:
                return None, ()
            student = student.model_copy(update={"lora": LoraSettings()})
            assignments.append(f"student.lora.rank={LoraSettings().rank}")
        else:
            if student.adamw == "8bit" or student.cpu_offload:
                return None, ()
            student = student.model_copy(update={"adamw": "8bit"})
            assignments.append("student.adamw=8bit")
    return config.model_copy(update={"teacher": teacher, "student": student}), tuple(assignments)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [2**power for power in range(most.bit_length())] if most > 0 else []


def _counts(most: int, fixed: int | None = None) -> list[int]:
    """The same, and ``most`` itself; ``fixed`` alone where that is given and no more."""
    if fixed is not None:
        return [fixed] if fixed <= most else []
    return sorted({*_powers(most), *([most] if most > 0 else [])})


def _servers(config: RunConfig, pair: Pair, devices: Devices, found: Search) -> Iterator[TeacherLayout]:
    """Every way to serve the teacher on its part of the devices."""
    pool = devices.teacher
    roles = devices.roles_at_once
    most = (devices.count - 1 if devices.is_one else pool.count) // roles
    shape, longest = pair.teacher, config.max_prompt_tokens + config.longest_response + 1
    item = teacher_bytes(config)
    for size in (size for size in _counts(min(most, pool.per_node)) if _can_be_cut(config, shape, size)):
        for groups in _powers(min(most // size, shape.num_layers)):
            servers: dict[Role, ServerMemory] = {
                role: server_memory(
                    shape,
                    role,
                    tensor_parallel=size,
                    pipeline_parallel=groups,
                    item=item,
                    gpu_bytes=pool.bytes,
                    tokens_under_way=config.teacher.batch_tokens,
                    on_gpu=pool.device.kind == "gpu",
                )
                for role in ("generate", "score")
            }
            least = max(server.least(longest) for server in servers.values())
            if not all(server.fits(longest) for server in servers.values()):
                found.miss(
                    "server",
                    Shortage(f"a server of the teacher {config.teacher.model}", least, pool.bytes, size * groups),
                )
                continue
            found.fitted.add("server")
            experts = needs_expert_parallel(teacher_config(shape, config), size, config.teacher.quantization)
            for replicas in _counts(most // (size * groups)):
                yield TeacherLayout("vllm", item, size, groups, replicas, experts, servers, roles)
            # A deeper pipeline than the weights need buys nothing that another replica does not.
            break


def _can_be_cut(config: RunConfig, shape: Shape, size: int) -> bool:
    try:
        check_cut(
            config.teacher.model,
            shape,
            teacher_config(shape, config),
            tensor_parallel=size,
            pipeline_parallel=1,
            quantization=config.teacher.quantization,
        )
    except UserError:
        return False
    return True


class _Students:
    """How so many processes hold the student, for each number once."""

    def __init__(self, config: RunConfig, pair: Pair, pool: Pool, found: Search) -> None:
        self._config, self._pair, self._pool, self._found = config, pair, pool, found
        self._known: dict[tuple[str, int], list[tuple[RunConfig, StudentLayout]]] = {}

    def local(self, count: int) -> list[tuple[RunConfig, StudentLayout]]:
        return self._of("local", count)

    def remote(self, count: int) -> list[tuple[RunConfig, StudentLayout]]:
        return self._of("vllm", count)

    def _of(self, backend: str, count: int) -> list[tuple[RunConfig, StudentLayout]]:
        key = backend, count
        if key not in self._known:
            teacher = self._config.teacher.model_copy(update={"backend": backend})
            config = self._config.model_copy(update={"teacher": teacher})
            self._known[key] = list(_layouts_of(config, self._pair, self._pool, count, self._found))
        return self._known[key]


def _layouts_of(
    config: RunConfig, pair: Pair, pool: Pool, count: int, found: Search
) -> Iterator[tuple[RunConfig, StudentLayout]]:
    """Engines that fit, each with the largest micro-batch and cache that do; offload where nothing else does."""
    on_gpu = pool.device.kind == "gpu"
    room = pool.bytes - (RESERVED_BYTES if on_gpu else 0)
    where = f"the student {config.student.model} with the teacher {config.teacher.model} beside it"
    what = where if config.teacher.backend == "local" else f"the student {config.student.model}"
    fits = False
    for offload in (False, True):
        if offload and (fits or count == 1 or not on_gpu or not _may_be_sharded(config)):
            break
        offloaded = _with_student(config, cpu_offload=True) if offload else config
        for engine in _engines(offloaded, count, pair.student):
            sized, memory = _sized(offloaded, pair, count, engine, room, on_gpu=on_gpu)
            if memory.total > room:
                found.miss(config.teacher.backend, Shortage(what, memory.total, room, count))
                continue
            fits = True
            found.fitted.add(config.teacher.backend)
            sampler, longest = SamplerLayout.of(sized, pair.student, memory, pool), longest_sequence(config) + 1
            if sampler is not None and not sampler.memory.fits(longest):
                least, server = sampler.memory.least(longest), f"a server that samples from {config.student.model}"
                found.miss("sampler", Shortage(server, least, sampler.memory.has, 1))
                continue
            found.fitted.add("sampler")
            yield sized, StudentLayout(count, engine, memory, sampler)


def _engines(config: RunConfig, count: int, student: Shape) -> tuple[Engine, ...]:
    settings = config.student
    if count == 1:
        return () if settings.cpu_offload else ("alone",)
    engines: list[Engine] = []
    if settings.parallel != "sharded" and not settings.cpu_offload:
        engines.append("replicated")
    # FSDP2 fills up slices of unlike sizes; the vocabulary's rows, the longest dimension, are cut evenly or not at all.
    if settings.parallel != "replicated" and _may_be_sharded(config) and student.vocabulary % count == 0:
        engines.append("sharded")
    return tuple(engines)


def _may_be_sharded(config: RunConfig) -> bool:
    return config.student.lora is None and config.student.adamw == "fp32"


def _sized(
    config: RunConfig, pair: Pair, count: int, engine: Engine, room: int, *, on_gpu: bool
) -> tuple[RunConfig, Memory]:
    """The largest micro-batch and cache, halved from what is set, that fit; the smallest where none does."""

    def memory_of(sized: RunConfig) -> Memory:
        device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
        return student_memory(sized, pair.student, pair.teacher, processes=count, engine=engine, device=device)

    tokens, cached, least = config.student.micro_batch_tokens, config.sampler_tokens, longest_sequence(config)
    smallest = _with_student(config, micro_batch_tokens=min(tokens or LEAST_TOKENS, LEAST_TOKENS))
    smallest = smallest.model_copy(update={"sampler_tokens": min(cached, least)})
    memory = memory_of(smallest)
    if memory.total > room:
        return smallest, memory
    memory = memory_of(config)
    while memory.stays + memory.training > room:
        tokens = 65536 if tokens is None else tokens // 2
        config = _with_student(config, micro_batch_tokens=tokens)
        memory = memory_of(config)
    while memory.total > room:
        config = config.model_copy(update={"sampler_tokens": max(least, config.sampler_tokens // 2)})
        memory = memory_of(config)
    return config, memory


def _with_student(config: RunConfig, **update: object) -> RunConfig:
    return config.model_copy(update={"student": config.student.model_copy(update=update)})


def _new_settings(
    before: RunConfig, config: RunConfig, teacher: TeacherLayout, student: StudentLayout
) -> Iterator[str]:
    """The assignments that make the layout's settings of ``before``."""
    parallel = before.student.parallel if student.engine == "alone" else student.engine
    for key, old, new in (
        ("teacher.backend", before.teacher.backend, teacher.backend),
        ("student.micro_batch_tokens", before.student.micro_batch_tokens, config.student.micro_batch_tokens),
        ("sampler_tokens", before.sampler_tokens, config.sampler_tokens),
        ("student.cpu_offload", before.student.cpu_offload, config.student.cpu_offload),
        ("student.parallel", before.student.parallel, parallel),
    ):
        if old != new:
            yield f"{key}={str(new).lower()}"
    # A teacher that moves into the student's processes leaves no servers, whose settings a run may not keep.
    for name in before.teacher.model_copy(update={"backend": teacher.backend}).unread_settings:
        yield f"teacher.{name}={json.dumps(TeacherSettings.default_of(name))}"
