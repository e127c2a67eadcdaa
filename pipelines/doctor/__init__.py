"""``distill doctor``: whether this machine can do the work, and for whatever stands in the way, the cure.

Nothing here imports torch, transformers or vLLM: a broken one of them is what a doctor is called for. They are imported
in processes of their own, with a time limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.doctor.finding import Finding
from pipelines.doctor.machine import disk, memory, shared_memory
from pipelines.doctor.outside import look_outside
from pipelines.doctor.software import imports, pins, python
from pipelines.doctor.strays import find_strays

__all__ = ["Finding", "examine_machine"]

EXAMINATIONS: tuple[Callable[[], Sequence[Finding]], ...] = (
    python,
    imports,
    pins,
    memory,
    shared_memory,
    disk,
    find_strays,
    look_outside,
)
"""In the order in which their findings are shown."""


def examine_machine() -> list[Finding]:
    """Every finding; the examinations wait at the same time."""
    with ThreadPoolExecutor(len(EXAMINATIONS)) as pool:
        return [finding for found in pool.map(lambda examine: examine(), EXAMINATIONS) for finding in found]
