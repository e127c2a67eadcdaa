"""Cross-entropy to one token a row, exact over the whole vocabulary, from hidden states and a head.

The loop over tiles is ``distill.tiles``; no [N, V] tensor exists. Shapes are those of ``distill.divergence``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.divergence import eager, log_softmax_, pick, row_dot
from distill.loss_arguments import check_ids, check_linear, weights_of
from distill.tiles import tiled_total


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """What ``linear_cross_entropy`` returns: a differentiable total, and detached ``values`` and ``entropy`` [N]."""

    total: Tensor
    values: Tensor
    entropy: Tensor


class _TargetLoss:
    """Cross-entropy to one target id a row; a ``distill.tiles.TileLoss``."""

    def __init__(self, target_ids_N: Tensor, *, like_N: Tensor) -> None:
        self.target_ids_N = target_ids_N
        self.values_N, self.entropy_N = (torch.empty_like(like_N) for _ in range(2))

    def form_(self, rows: slice, logits: Sequence[Tensor], weights_B1: Tensor, spare: Sequence[Tensor]) -> None:
        (logits_BV,), (p_BV, spare_BV) = logits, spare
        log_softmax_(logits_BV, 1.0, p_BV)
        target_ids_B = self.target_ids_N[rows]
        self.values_N[rows] = -pick(logits_BV, target_ids_B)
        self.entropy_N[rows] = -row_dot(p_BV, logits_BV, spare_BV)
        torch.mul(p_BV, weights_B1, out=logits_BV)
        logits_BV.scatter_add_(-1, target_ids_B[:, None], -weights_B1)


@eager
def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target_ids: Tensor,
    *,
    weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> CrossEntropy:
    """Weighted sum over tokens of -log softmax(hidden @ head.T)[target], in nats.

    ``hidden`` [N, d], ``head`` [V, d] and ``target_ids`` [N]; a token that must not count has weight 0 and any id of
    the vocabulary. ``weights``, ``chunk_rows``, dtypes and errors are as in ``linear_divergence``.
    """
    check_linear("the model", hidden, head)
    check_ids("target_ids", target_ids, len(hidden), len(head))
    weights_N = weights_of(weights, hidden)
    loss = _TargetLoss(target_ids, like_N=weights_N)
    total = tiled_total([(hidden, head)], loss, weights_N, chunk_rows)
    return CrossEntropy(total=total, values=loss.values_N, entropy=loss.entropy_N)


@torch.no_grad()
def linear_logprobs(hidden: Tensor, head: Tensor, ids: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """log softmax(hidden @ head.T)[ids] for ``hidden`` [N, d], ``head`` [V, d] and ``ids`` [N]; [N], no gradient."""
    return -linear_cross_entropy(hidden, head, ids, chunk_rows=chunk_rows).values
