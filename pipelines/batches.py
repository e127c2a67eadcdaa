"""Where a stage's batches come from: sampled and judged when they are wanted, or one batch ahead.

At staleness 0 a step samples with the weights that it trains, so it can only hide the judging of responses that have
ended behind those that are still being spoken. At staleness 1 the sampler has weights of its own, and speaks batch n+1
while the teacher judges batch n and the trainer learns from it:

    trainer    | wait for sample n | send weights n | collect score n | train n | wait for sample n+1 | ...
    sampler                                         | sample n+1, with weights n                      | sample n+2 ...
    teacher       score n, as its responses end ...      | score n+1, as its responses end ...

Batch n+1 is trained on when n+1 updates were made and was sampled after n: its staleness is 1, never more, and the
first batch of a stage, and of a process that resumes one, has 0. One batch ahead is the bound: the sampler waits for
the trainer, and the trainer for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self, cast

from distill import interrupt
from distill.costs import CostAccount
from distill.errors import DistillError, name_place
from distill.sampler import IndependentSampler
from distill.spans import Span, length
from distill.types import Rollout
from pipelines.crew import Crew, Judged, Stage

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's responses and what was made of them.

    ``waited`` are the seconds that the step spent on each phase, one after the other; ``rested`` those of them that it
    had spent before it asked for the batch. ``spans`` are when each phase worked on it. ``weights`` is what the sampler
    knows of the weights that spoke.
    """

    rollouts: list[Rollout]
    judged: Judged
    waited: Mapping[str, float]
    spans: Mapping[str, Sequence[Span]]
    weights: Mapping[str, float]
    rested: float = 0.0


class Batches(Protocol):
    """A stage's batches in the order of its steps; what works in the background ends with the block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def rest(self) -> None:
        """Wait until nobody speaks, so that the sampler may be used for something else before the next ``take``.

        Raises what went wrong in the background.
        """
        ...

    def take(self, step: int) -> Batch:
        """The batch of ``step``. Raises what went wrong with it, and says in which stage, phase and step."""
        ...


def batches_of(stage: Stage, crew: Crew, *, staleness: int) -> Batches:
    """How ``stage`` gets its batches: where its teacher has spoken already, there is nothing to be ahead with."""
    if staleness == 0 or stage.teacher_part == "speaks":
        return AtOnce(stage, crew)
    return Ahead(stage, crew)


class AtOnce:
    """Staleness 0: a batch is sampled and judged when it is wanted, in the calling thread."""

    def __init__(self, stage: Stage, crew: Crew) -> None:
        self.stage, self.crew = stage, crew

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.crew.teachers.forget()

    def rest(self) -> None:
        """Nobody speaks."""

    def take(self, step: int) -> Batch:
        stage, crew = self.stage, self.crew
        began, weights = time.perf_counter(), dict[str, float]()
        with crew.student.whole(), crew.ranks.together():
            with _naming(stage, crew, step, "sampling"):
                if stage.teacher_part != "speaks":
                    weights.update(_send_weights(stage, crew))
                synced = time.perf_counter()
                rollouts = stage.sample(step)
                sampled = time.perf_counter()
            with _naming(stage, crew, step, "scoring"):
                judged, spans = _judged(stage, crew, rollouts)
        scored = time.perf_counter()
        read = [] if judged.read is None else [judged.read]
        return Batch(
            rollouts,
            judged,
            waited={"sync": synced - began, "sample": sampled - synced, "score": scored - sampled - length(read)},
            spans={"sync": [(began, synced)], "sample": [(synced, sampled)], "score": spans, "train": read},
            weights=weights,
        )


@dataclass(frozen=True, slots=True)
class _Spoken:
    step: int
    rollouts: list[Rollout]
    spent: CostAccount
    span: Span
    weights: Mapping[str, float]


class Ahead:
    """Staleness 1: while a batch is trained on, the next one is sampled in a thread of its own.

    Everything that needs the student's weights (sending them, the judging that asks the student) is done in the calling
    thread, between two optimiser steps.
    """

    def __init__(self, stage: Stage, crew: Crew) -> None:
        assert crew.ranks.count == 1, "a sampler with weights of its own is for one process"
        self.stage, self.crew = stage, crew
        self._sampler = cast(IndependentSampler, crew.student_sampler)
        self._called_off = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{stage.name} sampling")
        self._keeping, self._watching = ExitStack(), ExitStack()
        self._under_way: tuple[int, Future[_Spoken]] | None = None
        self._ready: _Spoken | None = None
        self._sent: Span = (0.0, 0.0)
        """When the newest weights were sent."""
        self._rested = 0.0

    def __enter__(self) -> Self:
        self._watching.enter_context(interrupt.watching(self._look))
        return self

    def __exit__(self, *_: object) -> None:
        self._watching.close()
        self._called_off.set()
        self._thread.shutdown(cancel_futures=True)
        self._keeping.close()
        self.crew.teachers.forget()

    def rest(self) -> None:
        if self._under_way is None:
            return
        began = time.perf_counter()
        step, future = self._under_way
        while not wait([future], timeout=_POLL_SECONDS).done:
            interrupt.check()
        self._under_way = None
        self._keeping.close()
        with _naming(self.stage, self.crew, step, "sampling"):
            self._ready = future.result()
        self._rested += time.perf_counter() - began

    def take(self, step: int) -> Batch:
        stage, crew = self.stage, self.crew
        began = time.perf_counter()
        already, self._rested = self._rested, 0.0
        if self._ready is None and self._under_way is None:
            self._begin(step)
        begun, own = time.perf_counter(), self._sent
        self.rest()
        self._rested = 0.0
        spoken, self._ready = self._ready, None
        assert spoken is not None and spoken.step == step, "batches are taken in the order of the steps"
        sampled = time.perf_counter()
        crew.meter.enter(spoken.spent, seconds=already + sampled - begun)
        if step + 1 < stage.num_steps:
            self._begin(step + 1)
        synced = time.perf_counter()
        with crew.student.whole(), _naming(stage, crew, step, "scoring"):
            judged, spans = _judged(stage, crew, spoken.rollouts)
        scored = time.perf_counter()
        read = [] if judged.read is None else [judged.read]
        return Batch(
            spoken.rollouts,
            judged,
            waited={
                "sample": already + sampled - begun,
                "sync": begun - began + synced - sampled,
                "score": scored - synced - length(read),
            },
            spans={"sample": [spoken.span], "sync": [own], "score": spans, "train": read},
            weights=spoken.weights,
            rested=already,
        )

    def _look(self) -> None:
        """What went wrong with the batch under way is not kept until the one before it is judged and trained on."""
        if self._under_way is not None and (future := self._under_way[1]).done() and future.exception() is not None:
            self.rest()

    def _begin(self, step: int) -> None:
        began = time.perf_counter()
        with self.crew.student.whole(), _naming(self.stage, self.crew, step, "sampling"):
            weights = _send_weights(self.stage, self.crew)
        self._sent = began, time.perf_counter()
        self._keeping.enter_context(self._sampler.keeping())
        self._under_way = step, self._thread.submit(self._speak, step, weights)

    def _speak(self, step: int, weights: Mapping[str, float]) -> _Spoken:
        with interrupt.until(self._called_off), self.crew.meter.apart() as spent:
            began = time.perf_counter()
            rollouts = self.stage.sample(step)
            return _Spoken(step, rollouts, spent, (began, time.perf_counter()), weights)


def _send_weights(stage: Stage, crew: Crew) -> Mapping[str, float]:
    with crew.meter.measure("student_sample", stage.name):
        return crew.student_sampler.take_weights()


def _judged(stage: Stage, crew: Crew, rollouts: Sequence[Rollout]) -> tuple[Judged, list[Span]]:
    """What the judge says, and when it worked on it: since the first response ended, where it was told of that."""
    crew.teachers.worked()  # on something else
    began = time.perf_counter()
    judged = stage.signal(rollouts)
    own = began if judged.read is None else judged.read[1]
    return judged, [*crew.teachers.worked(), (own, time.perf_counter())]


@contextmanager
def _naming(stage: Stage, crew: Crew, step: int, phase: str) -> Iterator[None]:
    """Says of an error where it happened, unless that is known."""
    try:
        yield
    except Exception as error:
        # A judge that hears of a response while others are still being spoken fails in the midst of sampling.
        # Of a run that was asked to stop, an error is how it stops.
        if interrupt.received() is None or not isinstance(error, DistillError):
            name_place(error, f"{stage.name}, {'scoring' if error is crew.teachers.failure else phase} step {step}")
        raise
