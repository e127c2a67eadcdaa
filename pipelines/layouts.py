"""How a teacher and a student are laid out over devices: the nouns of a plan.

The student's processes hold it whole or in slices (``distill.memory``). The teacher is in each of these processes, or
behind vLLM servers on GPUs of its own (``distill.server_memory``). ``pipelines.fitting`` finds the ones that fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from distill.config import RunConfig
from distill.family import Shape
from distill.hardware import Pool
from distill.memory import RESERVED_BYTES, Engine, Memory
from distill.server_memory import USABLE, Bytes, ServerMemory, student_server
from distill.vllm.launch import Role

Change = Literal["fp8", "lora", "adamw-8bit"]
"""What may be changed about a run's result to make it fit."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models."""

    teacher: Shape
    student: Shape


@dataclass(frozen=True, slots=True)
class TeacherLayout:
    """Where the teacher is: in each of the student's processes (no GPUs of its own), or ``replicas`` servers."""

    backend: Literal["local", "vllm"]
    item: Bytes
    """Bytes of a weight."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    replicas: int = 1
    expert_parallel: bool = False
    servers: dict[Role, ServerMemory] = field(default_factory=dict)
    roles_at_once: int = 1
    """Roles whose servers are up together, each on GPUs of its own; 1 where they take turns."""

    @property
    def gpus(self) -> int:
        return self.roles_at_once * self.gpus_of_a_role

    @property
    def gpus_of_a_role(self) -> int:
        return 0 if self.backend == "local" else self.tensor_parallel * self.pipeline_parallel * self.replicas

    def __str__(self) -> str:
        if self.backend == "local":
            return "in each of the student's processes"
        cut = [f"tp {self.tensor_parallel}"]
        cut += [f"pp {self.pipeline_parallel}"] if self.pipeline_parallel > 1 else []
        cut += [f"ep {self.tensor_parallel}"] if self.expert_parallel else []
        servers = f"{self.replicas} vLLM server{'s' if self.replicas > 1 else ''}"
        return f"{servers}, {', '.join(cut)}, {'fp8' if self.item == 1 else 'bf16' if self.item == 2 else 'fp32'}"


@dataclass(frozen=True, slots=True)
class SamplerLayout:
    """The vLLM that speaks for the student: what one of its devices holds, and how many are its own; 0 where it is on
    the first of the trainer's and takes turns with it."""

    memory: ServerMemory
    devices: int

    @classmethod
    def of(cls, config: RunConfig, student: Shape, memory: Memory, pool: Pool) -> SamplerLayout | None:
        """Beside a process that needs ``memory``; None where the student speaks in its own processes."""
        settings, on_gpu = config.sampler, pool.device.kind == "gpu"
        if settings.backend == "transformers":
            return None
        if on_gpu:
            room = int(USABLE * pool.bytes) if settings.devices else room_beside(config, memory, pool.bytes)
        else:
            room = pool.bytes - _others(config, memory)
        devices = own_devices(config, on_gpu=on_gpu)
        return cls(student_server(config, student, room=room, on_gpu=on_gpu), devices)


def room_beside(config: RunConfig, memory: Memory, gpu_bytes: int) -> int:
    """Bytes of a GPU that the student's own vLLM may take beside a process that needs ``memory`` there."""
    return min(int(USABLE * gpu_bytes), gpu_bytes - _others(config, memory) - RESERVED_BYTES)


def _others(config: RunConfig, memory: Memory) -> int:
    """Bytes of the process itself while vLLM speaks: one that sleeps takes turns with what comes and goes."""
    return memory.stays if config.sampler.sleep else memory.total - memory.parts["server"]


def own_devices(config: RunConfig, *, on_gpu: bool) -> int:
    """Of the student's own vLLM. On a CPU it has cores of its own, one at the least."""
    settings = config.sampler
    if settings.backend == "transformers" or settings.place == "in_process":
        return 0
    return len(settings.devices) or (0 if on_gpu else 1)


@dataclass(frozen=True, slots=True)
class StudentLayout:
    """How so many processes hold the student, and what each of them needs."""

    processes: int
    engine: Engine
    memory: Memory
    sampler: SamplerLayout | None = None

    @property
    def devices(self) -> int:
        """Of the processes, and of the vLLM that speaks for them."""
        return self.processes + (0 if self.sampler is None else self.sampler.devices)

    def __str__(self) -> str:
        held = "1 process"
        if self.engine != "alone":
            held = f"{self.processes} processes, {'FSDP2' if self.engine == 'sharded' else 'DDP'}"
        if self.sampler is None:
            return held
        return f"{held}, sampled by a vLLM on {'another' if self.sampler.devices else 'the first'} device"


@dataclass(frozen=True, slots=True)
class Layout:
    """Both together. ``config`` has the settings that the layout takes, ``assignments`` are those that are new."""

    config: RunConfig
    teacher: TeacherLayout
    student: StudentLayout
    teacher_pool: Pool
    student_pool: Pool
    changes: tuple[Change, ...]
    assignments: tuple[str, ...]

    @property
    def gpus(self) -> int:
        return self.teacher.gpus + self.student.devices

    @property
    def is_shared(self) -> bool:
        """Whether teacher and student take turns on the same GPUs."""
        return self.teacher.backend == "local"

    def usd_per_hour(self) -> float | None:
        """Of all its GPUs together; None where a price is not known."""
        sides = ((self.teacher.gpus, self.teacher_pool), (self.student.devices, self.student_pool))
        prices = [(count, pool.device.usd_per_hour) for count, pool in sides if count]
        if any(price is None for _, price in prices):
            return None
        return sum(count * price for count, price in prices if price is not None)


@dataclass(frozen=True, slots=True)
class Devices:
    """What there is: one pool for both sides, or one for each."""

    teacher: Pool
    student: Pool
    is_one: bool
    """Whether both are the same devices, to be divided."""
    roles_at_once: int = 1
    """Of the teacher's servers, as in its layout."""

    @property
    def count(self) -> int:
        return self.student.count if self.is_one else self.teacher.count + self.student.count

    @property
    def pools(self) -> list[Pool]:
        return [self.student] if self.is_one else [self.teacher, self.student]

    def __str__(self) -> str:
        return (
            str(self.student) if self.is_one else f"{self.teacher} for the teacher and {self.student} for the student"
        )

    def times(self, factor: int) -> Devices:
        """So many times as many."""
        teacher, student = (pool.of(factor * pool.count) for pool in (self.teacher, self.student))
        return replace(self, teacher=teacher, student=student)
