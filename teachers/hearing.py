"""Judging in the background: responses that have ended are sent to be scored while others are still being spoken."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from distill.types import Rollout
from distill.vllm.client import Client, Job

R = TypeVar("R")

REQUEST_TOKENS = 8192
"""Most tokens in one request, so that replicas share the work evenly."""
REQUEST_SEQUENCES = 32
"""Most sequences in one request: each takes about 130 bytes of the reply's header."""
HEARD_TOKENS = 2048
"""Tokens of finished responses that are worth a request while others are still being spoken."""


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """Rollouts that are scored by one request."""

    rollouts: tuple[Rollout, ...]

    @property
    def inputs(self) -> list[list[int]]:
        """The token ids that are sent: all but a response's last token, whose row would predict what comes after."""
        return [[*rollout.prompt_ids, *rollout.response_ids[:-1]] for rollout in self.rollouts]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.inputs))


class Hearing(Generic[R]):
    """Scoring requests under way. ``ask`` has one answered: an answer for each of its rollouts, in their order."""

    def __init__(self, client: Client, ask: Callable[[ScoringRequest], Awaitable[Sequence[R]]]) -> None:
        self.client, self.ask = client, ask
        self._heard: list[Rollout] = []
        self._under_way: list[tuple[ScoringRequest, Future[Sequence[R]]]] = []

    def hear(self, rollout: Rollout) -> None:
        """Start judging ``rollout`` in the background, with others that end at about the same time.

        Raises what went wrong with those that were heard before.
        """
        for _, future in self._under_way:
            if future.done():
                future.result()
        self._heard.append(rollout)
        request = ScoringRequest(tuple(self._heard))
        if request.num_tokens >= HEARD_TOKENS or len(self._heard) >= REQUEST_SEQUENCES:
            self._heard = []
            self._under_way.append((request, self._submit(request)))

    def forget(self) -> None:
        """Drop what was heard and not asked for; requests under way are ended."""
        for _, future in self._under_way:
            future.cancel()
        self._heard, self._under_way = [], []

    def answers(self, rollouts: Sequence[Rollout]) -> list[R]:
        """The answer for each of ``rollouts``, in their order.

        What was heard of them is under way already; the rest is asked for now, and what else was heard is dropped.
        """
        wanted = {id(rollout): rollout for rollout in rollouts}
        under_way: list[tuple[ScoringRequest, Future[Sequence[R]]]] = []
        others: list[tuple[ScoringRequest, Future[Sequence[R]]]] = []
        for request, future in self._under_way:
            is_wanted = all(id(rollout) in wanted for rollout in request.rollouts)
            (under_way if is_wanted else others).append((request, future))
        self._under_way = others
        self.forget()
        known = {id(rollout) for request, _ in under_way for rollout in request.rollouts}
        missing = [rollout for place, rollout in wanted.items() if place not in known]
        under_way += [(request, self._submit(request)) for request in scoring_requests(missing)]
        found: dict[int, R] = {}
        for request, answers in self.client.collect(under_way):
            found |= zip(map(id, request.rollouts), answers, strict=True)
        return [found[id(rollout)] for rollout in rollouts]

    def _submit(self, request: ScoringRequest) -> Future[Sequence[R]]:
        return self.client.submit(Job(request, request.num_tokens), self.ask)


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
