"""What the student says of responses that exist already, at the weights that it has now. Nothing is learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distill import interrupt
from distill.policy_gradient import linear_policy_gradient
from distill.topk import linear_topk
from distill.types import ActionLogprobs, Example, Rollout
from students.batch import collate, micro_batches
from students.loss import Loss, Rows
from students.student import Student


def rescore(student: Student, rollouts: Sequence[Rollout]) -> list[ActionLogprobs]:
    """Log-probabilities of the response tokens, each [R], in the order of ``rollouts``.

    The arithmetic is that of the policy gradient itself, so the first optimiser step finds ratios of 1 up to the
    rounding of a batch that is packed otherwise.
    """

    def logprobs(rows: Rows) -> dict[str, Tensor]:
        batch = rows.batch
        nothing_N = torch.zeros_like(batch.weight_N)
        scored = linear_policy_gradient(
            rows.hidden_ND, rows.head_VD, batch.target_N, nothing_N, merged_ids=(student.stop_ids,)
        )
        return {"token": scored.token_logprob, "action": scored.action_logprob}

    return [ActionLogprobs(said["token"], said["action"]) for said in _said(student, _unjudged(rollouts), logprobs)]


def most_probable(student: Student, rollouts: Sequence[Rollout], k: int) -> list[Tensor]:
    """The k ids [R, k] that the student holds most probable at each response token; the stop ids are among them."""

    def ids(rows: Rows) -> dict[str, Tensor]:
        return {"ids": linear_topk(rows.hidden_ND, rows.head_VD, k, always=student.stop_ids)[0]}

    with student.whole():
        return [said["ids"] for said in _said(student, _unjudged(rollouts), ids)]


def measured(student: Student, examples: Sequence[Example], loss: Loss) -> list[dict[str, Tensor]]:
    """What ``loss`` says of each example's response tokens, [R] a metric."""
    return _said(student, examples, lambda rows: loss(rows).per_token_N)


def _unjudged(rollouts: Sequence[Rollout]) -> list[Example]:
    return [Example(rollout) for rollout in rollouts]


@torch.no_grad()
def _said(
    student: Student, examples: Sequence[Example], measure: Callable[[Rows], Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """What ``measure`` finds, [N, ...] a name, for each example by itself, [R, ...]; without dropout."""
    found: dict[int, dict[str, Tensor]] = {}
    with student.evaluating():
        for group in micro_batches(examples, student.settings.micro_batch_tokens) if examples else []:
            interrupt.check()
            rows, _ = student.rows(collate(group, student.model.device))
            lengths = [len(example.rollout.response_ids) for example in group]
            parts = {name: value_N.split(lengths) for name, value_N in measure(rows).items()}
            for place, example in enumerate(group):
                found[id(example)] = {name: split[place] for name, split in parts.items()}
    return [found[id(example)] for example in examples]
