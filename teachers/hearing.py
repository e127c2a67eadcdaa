"""Judging in the background: responses that have ended are sent to be scored while others are still being spoken.

Two batches may be under way at once, the one that is trained on next and the one behind it. Neither is the other's
business: whoever speaks the second learns nothing of what went wrong with the first, and ends none of it; whoever asks
for the answers of the first leaves the second alone. ``hear`` may be called in another thread than ``answers``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from distill.spans import Span
from distill.types import Rollout
from distill.vllm.client import Client, Job

R = TypeVar("R")

REQUEST_TOKENS = 8192
"""Most tokens in one request, so that replicas share the work evenly."""
REQUEST_SEQUENCES = 32
"""Most sequences in one request: each takes about 130 bytes of the reply's header."""
HEARD_TOKENS = 2048
"""Tokens of finished responses that are worth a request while others are still being spoken and judged."""


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """Rollouts that are scored by one request."""

    rollouts: tuple[Rollout, ...]

    @property
    def inputs(self) -> list[list[int]]:
        """The token ids that are sent."""
        return [list(rollout.read_ids) for rollout in self.rollouts]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.inputs))


@dataclass(slots=True, eq=False)
class _Asked(Generic[R]):
    """A request that was sent, and when it was and when it was answered."""

    request: ScoringRequest
    future: Future[Sequence[R]]
    begun: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    def __post_init__(self) -> None:
        self.future.add_done_callback(self._note)

    def _note(self, _: Future[Sequence[R]]) -> None:
        self.ended = time.perf_counter()


class Hearing(Generic[R]):
    """Scoring requests under way. ``ask`` has one answered: an answer for each of its rollouts, in their order."""

    def __init__(self, client: Client, ask: Callable[[ScoringRequest], Awaitable[Sequence[R]]]) -> None:
        self.client, self.ask = client, ask
        # Entered again by the thread that has it where a request is done before it is noted down.
        self._lock = threading.RLock()
        self._held_back: list[Rollout] = []
        """Heard, and waiting for others to be asked about with them."""
        self._held_tokens = 0
        self._open: list[_Asked[R]] = []
        """Of the batch that is being spoken."""
        self._closed: list[_Asked[R]] = []
        """Of batches that were spoken whole."""
        self._awaited: list[_Asked[R]] = []
        """Those that ``answers`` waits for."""
        self._worked: list[Span] = []

    def hear(self, rollout: Rollout) -> None:
        """Start judging ``rollout`` in the background, with others that end while the servers are busy.

        Raises what ``check`` raises.
        """
        with self._lock:
            self.check()
            self._held_back.append(rollout)
            self._held_tokens += _num_inputs(rollout)
            is_enough = self._held_tokens >= HEARD_TOKENS or len(self._held_back) >= REQUEST_SEQUENCES
            if is_enough or self._is_idle():
                self._open.append(self._submit(self._take_held_back()))

    def check(self) -> None:
        """Raise what went wrong with what was heard of the batch that is being spoken.

        And what the client's ``check`` raises while something is under way: a server that is gone for good answers none
        of it, and nobody waits for it yet.
        """
        with self._lock:
            if not self._is_idle():  # else no server is needed yet, and those of another role may be on duty
                self.client.check()
            for asked in self._open:
                if asked.future.done():
                    asked.future.result()

    def heard_all(self) -> None:
        """Close the batch: ask about what is held back, since nothing else is coming that could go with it.

        What goes wrong with the batch from now on, whoever asks for its answers is told.
        """
        with self._lock:
            self._open += map(self._submit, scoring_requests(self._take_held_back().rollouts))
            self._closed += self._open
            self._open = []

    def break_off(self) -> None:
        """Drop what was heard of the batch that is being spoken; its requests under way are ended."""
        with self._lock:
            for asked in self._open:
                asked.future.cancel()
            self._take_held_back()
            self._open = []

    def forget(self) -> None:
        """Drop what was heard and not asked for, of every batch; requests under way are ended."""
        self.break_off()
        with self._lock:
            for asked in self._closed:
                asked.future.cancel()
            self._closed = []

    def answers(self, rollouts: Sequence[Rollout]) -> list[R]:
        """The answer for each of ``rollouts``, in their order.

        What was heard of them is under way already; the rest is asked for now. What else was heard stays under way.
        """
        wanted = {id(rollout): rollout for rollout in rollouts}
        with self._lock:
            asked = [
                one
                for one in (*self._closed, *self._open)
                if all(id(rollout) in wanted for rollout in one.request.rollouts)
            ]
            self._closed = [one for one in self._closed if one not in asked]
            self._open = [one for one in self._open if one not in asked]
            self._held_back = [rollout for rollout in self._held_back if id(rollout) not in wanted]
            self._held_tokens = sum(map(_num_inputs, self._held_back))
            self._awaited = asked
        known = {id(rollout) for one in asked for rollout in one.request.rollouts}
        missing = [rollout for place, rollout in wanted.items() if place not in known]
        found: dict[int, R] = {}
        try:
            asked += map(self._submit, scoring_requests(missing))
            for request, answers in self.client.collect([(one.request, one.future) for one in asked]):
                found |= zip(map(id, request.rollouts), answers, strict=True)
        finally:
            self._awaited = []
        now = time.perf_counter()
        self._worked += [(one.begun, now if one.ended is None else one.ended) for one in asked]
        return [found[id(rollout)] for rollout in rollouts]

    def worked(self) -> list[Span]:
        """When requests were under way of which ``answers`` gave the answers since this was asked last."""
        worked, self._worked = self._worked, []
        return worked

    def _is_idle(self) -> bool:
        return all(asked.future.done() for asked in (*self._open, *self._closed, *self._awaited))

    def _take_held_back(self) -> ScoringRequest:
        held, self._held_back, self._held_tokens = self._held_back, [], 0
        return ScoringRequest(tuple(held))

    def _submit(self, request: ScoringRequest) -> _Asked[R]:
        return self._noted(request, self.client.submit(self._job(request), self.ask))

    def _job(self, request: ScoringRequest) -> Job[ScoringRequest]:
        return Job(request, request.num_tokens)

    def _noted(self, request: ScoringRequest, future: Future[Sequence[R]]) -> _Asked[R]:
        future.add_done_callback(self._go_on)
        return _Asked(request, future)

    def _go_on(self, answered: Future[Sequence[R]]) -> None:
        """Ask about what is held back as soon as the servers have nothing else to do, not when the next one ends."""
        if answered.cancelled() or answered.exception() is not None:
            return  # whoever asks next, or for the answers, is told
        with self._lock:
            if self._held_back and self._is_idle():
                request = self._take_held_back()
                # There is a server: it has just answered. To make sure of one could take this thread, the client's.
                self._open.append(self._noted(request, self.client.follow_up(self._job(request), self.ask)))


class HearingTeacher(Generic[R]):
    """A teacher behind servers: what it hears of is under way in the background."""

    hears = True

    def __init__(self, client: Client, ask: Callable[[ScoringRequest], Awaitable[Sequence[R]]]) -> None:
        self.client = client
        self._hearing = Hearing(client, ask)

    def hear(self, rollout: Rollout) -> None:
        """Start judging ``rollout`` in the background; see ``Hearing.hear``."""
        self._hearing.hear(rollout)

    def check(self) -> None:
        """Raise what went wrong with what it heard; see ``Hearing.check``."""
        self._hearing.check()

    def heard_all(self) -> None:
        """Close the batch; see ``Hearing.heard_all``."""
        self._hearing.heard_all()

    def break_off(self) -> None:
        """Drop what was heard of the batch that is being spoken."""
        self._hearing.break_off()

    def forget(self) -> None:
        """Drop what was heard and not asked for, of every batch."""
        self._hearing.forget()

    def worked(self) -> list[Span]:
        """When requests were under way."""
        return self._hearing.worked()


def scoring_requests(rollouts: Sequence[Rollout]) -> list[ScoringRequest]:
    """The rollouts by length, longest first, in requests of bounded size."""
    groups: list[list[Rollout]] = []
    size = 0
    for rollout in sorted(rollouts, key=_num_inputs, reverse=True):
        if groups and size + _num_inputs(rollout) <= REQUEST_TOKENS and len(groups[-1]) < REQUEST_SEQUENCES:
            groups[-1].append(rollout)
            size += _num_inputs(rollout)
        else:
            groups.append([rollout])
            size = _num_inputs(rollout)
    return [ScoringRequest(tuple(group)) for group in groups]


def _num_inputs(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.response_ids) - 1
