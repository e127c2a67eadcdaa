"""The student's log-probabilities of responses that exist already, at the weights that it has now."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill import interrupt
from distill.policy_gradient import linear_policy_gradient
from distill.types import ActionLogprobs, Example, Rollout
from students.batch import collate, micro_batches
from students.student import Student


@torch.no_grad()
def rescore(student: Student, rollouts: Sequence[Rollout]) -> list[ActionLogprobs]:
    """Log-probabilities of the response tokens, each [R], in the order of ``rollouts``.

    The arithmetic is that of the policy gradient itself, so the first optimiser step finds ratios of 1 up to the
    rounding of a batch that is packed otherwise.
    """
    found: dict[int, ActionLogprobs] = {}
    examples = [Example(rollout) for rollout in rollouts]
    places = {id(example): place for place, example in enumerate(examples)}
    with student.evaluating():
        for group in micro_batches(examples, student.settings.micro_batch_tokens):
            interrupt.check()
            batch = collate(group, student.model.device)
            rows, _ = student.rows(batch)
            scored = linear_policy_gradient(
                rows.hidden_ND,
                rows.head_VD,
                batch.target_N,
                torch.zeros_like(batch.weight_N),
                merged_ids=(student.stop_ids,),
            )
            lengths = [len(example.rollout.response_ids) for example in group]
            for example, token_R, action_R in zip(
                group, scored.token_logprob.split(lengths), scored.action_logprob.split(lengths), strict=True
            ):
                found[places[id(example)]] = ActionLogprobs(token_R, action_R)
    return [found[place] for place in range(len(rollouts))]
