"""Which GPUs of which machine each process and each server of a layout gets.

A run has as many processes on each of its machines, and a server as many GPUs: what the commands can start is no more
than that. Of the fewest machines the student takes the last, servers the first GPUs that are left.
This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.hardware import Pool
from pipelines.layouts import StudentLayout, TeacherLayout


@dataclass(frozen=True, slots=True)
class Part:
    """Some GPUs of one machine."""

    machine: int
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """The student's machines, as many processes on each, and each server's; ``sampler`` are the GPUs of the vLLM that
    speaks for the student, on the machine that the processes have then."""

    student: tuple[Part, ...]
    servers: tuple[tuple[Part, ...], ...]
    sampler: tuple[int, ...] = ()


def placement(
    teacher: TeacherLayout, student: StudentLayout, pools: tuple[Pool, Pool], *, is_one: bool
) -> Placement | None:
    """Where both sides are; None where the machines cannot be divided so. ``pools`` are the teacher's and student's."""
    if not is_one:
        return _placed(teacher, student, _free(pools[0]), _free(pools[1]), pools)
    machines = len(_free(pools[1]))
    fewest = -(-(teacher.gpus + student.devices) // pools[1].per_node)
    for num in range(fewest, machines + 1):
        free = _free(pools[1])[:num]
        found = _placed(teacher, student, free, free, pools)
        if found is not None:
            return found
    return None


def _placed(
    teacher: TeacherLayout,
    student: StudentLayout,
    on_teacher: list[list[int]],
    on_student: list[list[int]],
    pools: tuple[Pool, Pool],
) -> Placement | None:
    held = _take(on_student, student.devices, pools[1].per_node, last=True)
    own = student.devices - student.processes
    # It is reached on its own machine alone.
    if held is None or (own and len(held) > 1):
        return None
    sampler = held[0].gpus[student.processes :] if own else ()
    if own:
        held = (Part(held[0].machine, held[0].gpus[: student.processes]),)
    servers = []
    for _ in range(teacher.replicas * teacher.roles_at_once if teacher.gpus else 0):
        size = teacher.tensor_parallel * teacher.pipeline_parallel
        server = _take(on_teacher, size, pools[0].per_node, last=False)
        if server is None:
            return None
        servers.append(server)
    return Placement(held, tuple(servers), sampler)


def _free(pool: Pool) -> list[list[int]]:
    """The GPUs of each machine."""
    firsts = range(0, pool.count, pool.per_node)
    return [list(range(min(pool.per_node, pool.count - first))) for first in firsts]


def _take(free: list[list[int]], num: int, per_node: int, *, last: bool) -> tuple[Part, ...] | None:
    """``num`` GPUs of as few machines as can be, the same number of each; what was taken is no longer free."""
    for machines in range(-(-num // per_node), len(free) + 1 if num > per_node else 2):
        each = num // machines
        roomy = [place for place, gpus in enumerate(free) if len(gpus) >= each]
        if num % machines or len(roomy) < machines:
            continue
        found = []
        for place in roomy[-machines:] if last else roomy[:machines]:
            gpus = free[place]
            taken = gpus[-each:] if last else gpus[:each]
            free[place] = gpus[:-each] if last else gpus[each:]
            found.append(Part(place, tuple(taken)))
        return tuple(found)
    return None
