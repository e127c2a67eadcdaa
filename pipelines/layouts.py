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
from distill.memory import Engine, Memory
from distill.server_memory import Bytes, ServerMemory
from distill.vllm.launch import Role as Role  # said again for whoever plans

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
class StudentLayout:
    """How so many processes hold the student, and what each of them needs."""

    processes: int
    engine: Engine
    memory: Memory

    def __str__(self) -> str:
        if self.engine == "alone":
            return "1 process"
        return f"{self.processes} processes, {'FSDP2' if self.engine == 'sharded' else 'DDP'}"


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
        return self.teacher.gpus + self.student.processes

    @property
    def is_shared(self) -> bool:
        """Whether teacher and student take turns on the same GPUs."""
        return self.teacher.backend == "local"

    def usd_per_hour(self) -> float | None:
        """Of all its GPUs together; None where a price is not known."""
        sides = ((self.teacher.gpus, self.teacher_pool), (self.student.processes, self.student_pool))
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

    def __str__(self) -> str:
        return (
            str(self.student) if self.is_one else f"{self.teacher} for the teacher and {self.student} for the student"
        )

    def times(self, factor: int) -> Devices:
        """So many times as many."""
        teacher, student = (pool.of(factor * pool.count) for pool in (self.teacher, self.student))
        return replace(self, teacher=teacher, student=student)
