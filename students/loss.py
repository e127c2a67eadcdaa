"""What a stage's loss sees of the student, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from students.batch import Batch


@dataclass(frozen=True, slots=True)
class Felt:
    """What a stage's loss says of one batch.

    ``total`` is a scalar, the *sum* over response tokens of weight times loss, differentiable in the student. In the
    weights that the student hands to a loss the division by the global token count is done. ``per_token_N`` are
    detached metrics, one value a token.
    """

    total: Tensor
    per_token_N: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a loss sees: the batch, and the student's states at the rows that predict its response tokens."""

    batch: Batch
    hidden_ND: Tensor
    head_VD: Tensor


Loss = Callable[[Rows], Felt]


@torch.no_grad()
def stop_probability(rows: Rows, felt: Felt, stop_ids: Sequence[int]) -> dict[str, Tensor]:
    """The probability of ending the response, at every row, as a metric; none where the loss does not say log p.

    The loss knows log p of the sampled token, so the normaliser is that token's logit minus it; no second pass over the
    vocabulary is needed.
    """
    if "sampled_logprob" not in felt.per_token_N:
        return {}
    hidden_ND, target_N = rows.hidden_ND.float(), rows.batch.target_N
    sampled_logit_N = (hidden_ND * rows.head_VD[target_N].float()).sum(dim=-1)
    normaliser_N = sampled_logit_N - felt.per_token_N["sampled_logprob"]
    stop_logit_NS = hidden_ND @ rows.head_VD[stop_ids].float().T
    return {"stop_probability": (stop_logit_NS.logsumexp(dim=-1) - normaliser_N).exp()}
