"""Who spent what: a sampler and a phase clock that keep the cost account as they go."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from distill.costs import Cost, CostAccount, CostRole, rollout_flops
from distill.family import Shape
from distill.sampler import OnFinished, Sampler
from distill.types import Request, Rollout
from students.ranks import Ranks


class _Here(threading.local):
    """Where this thread's costs go, if not into the run's account."""

    account: CostAccount | None = None


@dataclass
class Meter:
    """Watches the clock and the memory while somebody works, and keeps the account."""

    account: CostAccount = field(default_factory=CostAccount)
    _here: _Here = field(default_factory=_Here)

    @contextmanager
    def apart(self) -> Iterator[CostAccount]:
        """Within the block what this thread spends goes into an account of its own, for ``enter`` when it is used.

        No peak is noted in it: the memory is that of everything the process does meanwhile.
        """
        self._here.account = CostAccount()
        try:
            yield self._here.account
        finally:
            self._here.account = None

    def enter(self, spent: CostAccount, *, seconds: float) -> None:
        """Charge what one role spent apart, and ``seconds`` for it: those for which it was waited for."""
        ((role, stages),) = spent.entries.items()
        ((stage, cost),) = stages.items()
        self.account.charge(role, stage, replace(cost, seconds=seconds))

    @contextmanager
    def measure(self, role: CostRole, stage: str) -> Iterator[Cost]:
        """Charge what the block enters into the cost, and the block's time, to ``role``."""
        apart = self._here.account
        if apart is None:
            _reset_peak()
        started = time.perf_counter()
        cost = Cost()
        try:
            yield cost
        finally:
            # Time that ended in an interruption was spent all the same.
            cost.seconds += time.perf_counter() - started
            (self.account if apart is None else apart).charge(role, stage, cost)
            if apart is None:
                self.account.note_peak(role, _peak())

    def pool(self, stage: str, before: Mapping[str, Cost], ranks: Ranks) -> None:
        """Make what all processes spent on ``stage`` since ``before`` every process's account of it.

        A process has no line for who did nothing in its share, so they meet once and sum by name.
        """
        if ranks.count == 1:
            return
        own = {role: cost.since(before.get(role, Cost())) for role, cost in self.account.of_stage(stage).items()}
        pooled = {role: replace(cost) for role, cost in before.items()}
        for part in ranks.gather(own):
            for role, cost in part.items():
                pooled.setdefault(role, Cost()).add(cost)
        for role, cost in pooled.items():
            self.account.entries.setdefault(role, {})[stage] = cost


class MeteredSampler:
    """A sampler whose work is charged to a role and a stage."""

    def __init__(self, sampler: Sampler, meter: Meter, shape: Shape, role: CostRole, stage: str) -> None:
        self.sampler, self.meter, self.shape, self.role, self.stage = sampler, meter, shape, role, stage

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        with self.meter.measure(self.role, self.stage) as cost:
            rollouts = self.sampler.generate(requests, on_finished)
            cost.tokens = sum(len(rollout.response_ids) for rollout in rollouts)
            cost.flops = rollout_flops(self.shape, rollouts)
        return rollouts


_CLEAR_REFS = Path("/proc/self/clear_refs")


def _reset_peak() -> None:
    """Forget the memory peak so far, where the system can (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def _peak() -> int:
    """Most bytes held since ``_reset_peak``: of the GPU where there is one, else of the process.

    Off Linux the process's figure is since its start: an upper bound.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
