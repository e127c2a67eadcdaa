"""Sampler, teacher and trainer on three devices that take their time elsewhere: here they sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.loop import crew_of, encoder, only_judge
from distill import interrupt
from distill.checkpoint import open_checkpoint
from distill.family import resolve
from distill.sampler import OnFinished
from distill.spans import Span
from distill.types import HiddenStates, Request, Rollout
from pipelines.crew import Crew
from students.vllm_sampler import Keeping

NUM_PROMPTS = 16
SLICE_SECONDS = 0.005


def work(until: float) -> None:
    """What a device elsewhere does to this process: time goes by, and a request to stop is heard."""
    while (left := until - time.perf_counter()) > 0:
        interrupt.check()
        time.sleep(min(left, SLICE_SECONDS))


@dataclass
class SimulatedSampler(Keeping):
    """Has weights of its own, and speaks for ``seconds`` a batch: a response ends every now and then."""

    seconds: float
    trainer: SimulatedTrainer
    weight_version: int = 0
    asked: list[Sequence[Request]] = field(default_factory=list)
    _version: int = 0

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        if not self._keeps:
            self.take_weights()
        self.asked.append(requests)
        began, rollouts = time.perf_counter(), list[Rollout]()
        for number, request in enumerate(requests, start=1):
            work(began + self.seconds * number / len(requests))
            ids = (1 + number, encoder().stop_ids[0])
            rollouts.append(Rollout(request, ids, (False,) * 2, (-0.5,) * 2, "stop", "student", self._version))
            if on_finished is not None:
                on_finished(rollouts[-1])
        return rollouts

    def take_weights(self) -> Mapping[str, float]:
        assert not self._keeps, "weights were sent while they are to be kept"
        self._version = self.trainer.num_changes
        return {}

    def facts(self) -> Mapping[str, float]:
        return {}


@dataclass
class SimulatedTeacher:
    """Takes one response after the other, ``seconds`` for a batch, from when it hears of it."""

    seconds: float
    name: str = "teacher"
    hears: bool = True
    head_VD: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    _done: dict[int, Span] = field(default_factory=dict)
    _free_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _worked: list[Span] = field(default_factory=list)

    def hear(self, rollout: Rollout) -> None:
        with self._lock:
            begin = max(time.perf_counter(), self._free_at)
            self._free_at = begin + self.seconds / NUM_PROMPTS
            self._done[id(rollout)] = begin, self._free_at

    def check(self) -> None:
        """Nothing goes wrong here."""

    def heard_all(self) -> None:
        """Nothing is held back."""

    def break_off(self) -> None:
        """Nothing is broken off here."""

    def forget(self) -> None:
        with self._lock:
            self._done = {}

    def worked(self) -> list[Span]:
        worked, self._worked = self._worked, []
        return worked

    def score(self, rollouts: Sequence[Rollout]) -> list[HiddenStates]:
        for rollout in rollouts:
            if id(rollout) not in self._done:
                self.hear(rollout)
        spans = [self._done.pop(id(rollout)) for rollout in rollouts]
        work(max(end for _, end in spans))
        self._worked += spans
        return [HiddenStates(torch.zeros(len(rollout.response_ids), 1), self.name) for rollout in rollouts]


@dataclass
class SimulatedTrainer:
    """Stands for the student: a step takes ``seconds``."""

    seconds: float
    num_changes: int = 0
    passes: int = 3

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing is done in advance."""

    def step(self, examples: Sequence[Any], loss: object, **_: object) -> dict[str, Any]:
        work(time.perf_counter() + self.seconds)
        self.num_changes += 1
        return {"loss": 0.0, "num_tokens": len(examples), "seconds.train": self.seconds}


def simulated_crew(*, sample: float, score: float, train: float) -> Crew:
    """Three devices elsewhere; the seconds are those of a batch."""
    shape = open_checkpoint(resolve("nano", role="student")).shape
    trainer = SimulatedTrainer(train)
    sampler = SimulatedSampler(sample, trainer)
    return crew_of(only_judge(SimulatedTeacher(score), shape), cast(Any, trainer), sampler, shape)
