"""The smaller signals of a model: log-probabilities of its most probable tokens, or of given ones, and of all others.

``distill.sparse`` has the losses for a teacher that says no more than this. The loop over tiles is the one of
``distill.tiles``: no [N, V] tensor exists. Shapes: N rows, V vocabulary rows, d width, K ids a row, S ids that are
always among them; a block has B rows, a response R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.divergence import LOG_ZERO, log_softmax_
from distill.errors import UserError
from distill.loss_arguments import check_linear, check_rows_of_ids, weights_of
from distill.tiles import tiled_total

TAIL_FLOOR = 2.0**-24
"""Least mass of a tail that was found as one minus a sum of float32 probabilities: below, it is rounding."""


class _TopKFacts:
    """The log-probabilities of given ids of each row; a ``distill.tiles.TileLoss`` that has no gradient.

    With ``always_S`` the ids are found: these, and the most probable ones.
    """

    def __init__(self, ids_NK: Tensor, *, always_S: Tensor | None, like_N: Tensor) -> None:
        self.ids_NK, self.always_S = ids_NK, always_S
        self.logprobs_NK = like_N.new_empty(ids_NK.shape)
        self.tail_logprob_N = torch.empty_like(like_N)
        self.values_N = torch.zeros_like(like_N)

    def form_(self, rows: slice, logits: Sequence[Tensor], weights_B1: Tensor, spare: Sequence[Tensor]) -> None:
        (logits_BV,), (p_BV, _) = logits, spare
        log_softmax_(logits_BV, 1.0, p_BV)
        if self.always_S is not None:
            standing_BV = logits_BV.index_fill(-1, self.always_S, math.inf) if len(self.always_S) else logits_BV
            self.ids_NK[rows] = standing_BV.topk(self.ids_NK.shape[1]).indices
        ids_BK = self.ids_NK[rows]
        self.logprobs_NK[rows] = logits_BV.gather(-1, ids_BK)
        logits_BV.scatter_(-1, ids_BK, LOG_ZERO)
        self.tail_logprob_N[rows] = logits_BV.logsumexp(-1)


@torch.no_grad()
def linear_topk(
    hidden: Tensor, head: Tensor, k: int, *, always: Sequence[int] = (), chunk_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable ids of each row, most probable first, their log-probabilities, and that of all others.

    ``hidden`` [N, d] and ``head`` [V, d]; returns [N, k] (int64), [N, k] and [N], the latter exact, not one minus a
    sum. The ids of ``always`` are among the k wherever they stand, and come first. Raises ``UserError`` for a k that
    leaves no tail, or no room for ``always``.
    """
    check_linear("the model", hidden, head)
    if not max(1, len(always)) <= k < len(head):
        raise UserError(f"k is {k}; it must be at least {max(1, len(always))} and below the {len(head)} ids there are.")
    ids_NK = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    return _facts(
        hidden,
        head,
        ids_NK,
        always_S=torch.tensor(always, dtype=torch.int64, device=hidden.device),
        chunk_rows=chunk_rows,
    )


@torch.no_grad()
def linear_logprobs_at(
    hidden: Tensor, head: Tensor, ids: Tensor, *, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``ids`` [N, K], their log-probabilities [N, K] and that of all other tokens of each row [N].

    ``hidden`` [N, d] and ``head`` [V, d]; the ids of a row are distinct.
    """
    check_linear("the model", hidden, head)
    check_rows_of_ids(ids, len(hidden), len(head))
    return _facts(hidden, head, ids, always_S=None, chunk_rows=chunk_rows)


def _facts(
    hidden: Tensor, head: Tensor, ids_NK: Tensor, *, always_S: Tensor | None, chunk_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    weights_N = weights_of(None, hidden)
    facts = _TopKFacts(ids_NK, always_S=always_S, like_N=weights_N)
    tiled_total([(hidden, head)], facts, weights_N, chunk_rows)
    return facts.ids_NK, facts.logprobs_NK, facts.tail_logprob_N


def tail_of(logprobs: Tensor) -> Tensor:
    """log(1 - sum of the probabilities) [R] of ``logprobs`` [R, K], at least that of ``TAIL_FLOOR``; in float32."""
    mass_R = logprobs.double().exp().sum(-1)
    return (1 - mass_R).clamp_(min=TAIL_FLOOR).log().float()
