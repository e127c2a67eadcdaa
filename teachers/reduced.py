"""A teacher that says less than it knows: hidden states become the smaller signals, tile by tile.

So every signal exists without a server, exact up to what the signal itself leaves out: the reference for the routes
over HTTP, and the way to compare signals on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.cross_entropy import linear_logprobs
from distill.spans import Span
from distill.topk import linear_logprobs_at, linear_topk
from distill.types import Rollout, SampledLogprobs, Signal, TopK
from teachers.teacher import ExactTeacher

Choose = Callable[[Sequence[Rollout]], Sequence[Tensor]]
"""The ids that the student asks about: [R, k] a rollout, int64, distinct in each row."""

Reduce = Callable[[Tensor, Tensor, Sequence[Rollout]], list[Signal]]
"""The teacher's states [N, d] for the response tokens of all the rollouts, its head [V, d], and the rollouts."""


class ReducedTeacher:
    """Judges as ``teacher`` does and passes on what ``reduce`` keeps of it."""

    head_VD: None = None

    def __init__(self, teacher: ExactTeacher, reduce: Reduce) -> None:
        self.teacher, self.reduce, self.name = teacher, reduce, teacher.name

    @property
    def hears(self) -> bool:
        return self.teacher.hears

    def hear(self, rollout: Rollout) -> None:
        self.teacher.hear(rollout)

    def check(self) -> None:
        self.teacher.check()

    def heard_all(self) -> None:
        self.teacher.heard_all()

    def break_off(self) -> None:
        self.teacher.break_off()

    def forget(self) -> None:
        self.teacher.forget()

    def worked(self) -> Sequence[Span]:
        return self.teacher.worked()

    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        if not rollouts:
            return []
        states_Nd = torch.cat([states.states_Rd for states in self.teacher.score(rollouts)])
        return self.reduce(states_Nd, self.teacher.head_VD, rollouts)


def to_topk(k: int) -> Reduce:
    """The k most probable tokens and the tail."""

    def reduce(states_Nd: Tensor, head_VD: Tensor, rollouts: Sequence[Rollout]) -> list[Signal]:
        return _split_topk(linear_topk(states_Nd, head_VD, k), rollouts)

    return reduce


def to_chosen(choose: Choose) -> Reduce:
    """The tokens that the student chose, and the tail."""

    def reduce(states_Nd: Tensor, head_VD: Tensor, rollouts: Sequence[Rollout]) -> list[Signal]:
        ids_NK = torch.cat(list(choose(rollouts))).to(states_Nd.device)
        return _split_topk(linear_logprobs_at(states_Nd, head_VD, ids_NK), rollouts)

    return reduce


def to_sampled(states_Nd: Tensor, head_VD: Tensor, rollouts: Sequence[Rollout]) -> list[Signal]:
    """The sampled token's log-probability."""
    said_N = torch.tensor([token for rollout in rollouts for token in rollout.response_ids], device=states_Nd.device)
    logprobs_N = linear_logprobs(states_Nd, head_VD, said_N)
    return [SampledLogprobs(part_R) for part_R in logprobs_N.split(_lengths(rollouts))]


def _split_topk(facts: tuple[Tensor, Tensor, Tensor], rollouts: Sequence[Rollout]) -> list[Signal]:
    parts = (fact.split(_lengths(rollouts)) for fact in facts)
    return [TopK(*signal) for signal in zip(*parts, strict=True)]


def _lengths(rollouts: Sequence[Rollout]) -> list[int]:
    return [len(rollout.response_ids) for rollout in rollouts]
