"""One sampler made of every process's own: the main process asks, all of them answer.

What only the main process does (it reads and writes the files of an examination, or of the response store) can so use
all of the run's devices to sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from distill.errors import DistillError, PeerError
from distill.sampler import OnFinished, Sampler
from distill.types import Request, Rollout
from students.ranks import Ranks

Result = TypeVar("Result")


def with_all_samplers(ranks: Ranks, sampler: Sampler, work: Callable[[Sampler], Result]) -> Result | None:
    """``work`` on the main process, with a sampler that is all processes' ``sampler``; None on the others.

    Every process must call it. An error of the main process's work becomes everyone's.
    """
    if ranks.count == 1:
        return work(sampler)
    shared = _SharedSampler(ranks, sampler)
    result: Result | None = None
    with ranks.together():
        if ranks.is_main:
            # Another error than these may have met the others in the middle of something else than to be asked: who
            # would talk to them then waits for ever, as they do. They hear of this process's end.
            try:
                result = work(shared)
            except PeerError as error:
                shared.ask(None)
                # What another met alone; it does not know whether the work outlives it, and says nothing.
                raise DistillError(str(error)) from error
            except DistillError:
                shared.ask(None)
                raise
            shared.ask(None)
        else:
            shared.serve()
    return result


class _SharedSampler:
    def __init__(self, ranks: Ranks, sampler: Sampler) -> None:
        self.ranks, self.sampler = ranks, sampler

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        """On the main process: what all sampled, in the order of the requests."""
        self.ask(list(requests))
        return self._answer(requests, on_finished)

    def ask(self, requests: list[Request] | None) -> None:
        """Tells the others what to sample next; None lets them go."""
        self.ranks.from_main(requests)

    def serve(self) -> None:
        """On the other processes: samples its share of whatever the main one asks, until it asks no more."""
        while (requests := self.ranks.from_main(None)) is not None:
            # All have met an error, if perhaps not the same one: the main process alone says what becomes of it. An
            # examination may ask again for less; a request to stop lets the others go.
            with suppress(DistillError):
                self._answer(requests, None)

    def _answer(self, requests: Sequence[Request], on_finished: OnFinished | None) -> list[Rollout]:
        number, count = self.ranks.number, self.ranks.count
        with self.ranks.together():
            mine = self.sampler.generate(requests[number::count], on_finished)
        parts = self.ranks.gather(mine)
        rollouts = [parts[place % count][place // count] for place in range(len(requests))]
        if on_finished is not None:
            for place, rollout in enumerate(rollouts):
                if place % count != number:
                    on_finished(rollout)
        return rollouts
