"""Losses for teachers that say less than their whole distribution.

Two signals: the teacher's k most probable tokens with the mass of all others (``linear_topk_divergence``), and its
log-probability of the sampled token alone (``linear_sampled_divergence``). The student's whole distribution is known
either way, and the loop over tiles is the one of ``distill.tiles``: no [N, V] tensor exists.

Top k. The ids of a row and one action for everything else, the tail, are a partition of the vocabulary into k + 1
actions, the same one for student and teacher. The divergence between the two distributions over these actions is a
divergence, and at most the one over the whole vocabulary: what is lost is how the tail is spread. Without the tail the
sum is none: it can be negative, and is smallest for a student that leaves the k tokens. So it exists for experiments
alone (``tail=False``), and a run cannot ask for it.

Stop ids that count as one action are merged where the partition allows it: those of a row's k ids become one action, on
both sides. A stop id outside the row's k is in the tail, also on both sides: the teacher's probability of it is not
known, and adding the student's to the merged action would compare two different events.

The sampled token. With y drawn from the student p, and the teacher q, log p(y) - log q(y) (k1) and r - 1 - log r with
r = q(y) / p(y) (k3) both have the reverse KL as their mean; k3 is never negative and varies less near the teacher.
Their derivatives do not have its gradient as their mean, since y itself depends on p: the derivative of k1 is
grad log p(y), whose mean is zero, and that of k3 has the gradient of the *forward* KL as its mean. What is missing is
the estimate times grad log p(y). The sum of both, less the grad log p(y) of k1, is the same for k1 and k3, for k3
because (r - 1 - log r) + (1 - r) = -log r:

    (log p(y) - log q(y)) * grad log p(y)

This is the gradient here, the policy gradient with the reward log q(y) - log p(y); its mean is the gradient that
``linear_divergence`` takes exactly. The choice of an estimator decides what is reported.

Left out on purpose: temperature (a teacher that gives some log-probabilities gives them at 1), and stop ids as one
action for the sampled token (the teacher's probability of the other one is not known).

Shapes: N rows, V vocabulary rows, D width, K ids a row; a block has B rows, and A = K + 1 actions.
Source of the estimators: J. Schulman, Approximating KL divergence (2020), http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.divergence import KINDS, LOG_ZERO, Pair, check_choices, eager, log_softmax_, pick, row_dot
from distill.errors import UserError
from distill.loss_arguments import check_groups, check_ids, check_linear, check_rows_of_ids, weights_of
from distill.tiles import tiled_total


@dataclass(frozen=True, slots=True)
class TopKDivergence:
    """What ``linear_topk_divergence`` returns: a differentiable total, and detached facts of shape [N] in nats.

    ``values``, ``reverse_kl`` and ``forward_kl`` are of the k + 1 actions; with a tail, and nothing merged, they are
    lower bounds of what ``linear_divergence`` reports. ``student_tail`` is the student's probability of the tail.
    ``student_entropy`` and ``sampled_logprob`` are of the student's whole distribution, unmerged.
    """

    total: Tensor
    values: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    student_tail: Tensor
    student_entropy: Tensor
    sampled_logprob: Tensor | None


@dataclass(frozen=True, slots=True)
class SampledDivergence:
    """What ``linear_sampled_divergence`` returns: a total, and detached facts of shape [N] in nats.

    The gradient of ``total`` is the policy gradient of this module's docstring, not the derivative of ``values``.
    """

    total: Tensor
    values: Tensor
    student_entropy: Tensor
    sampled_logprob: Tensor


# --- The top k and the tail -------------------------------------------------------------------------------------------


def _mass_term(kind: str, beta: float) -> float:
    """The multiple of p that the slope of ``KINDS`` leaves out, which matters where the probabilities do not sum to
    one."""
    terms = {"reverse_kl": 1.0, "forward_kl": -1.0, "skew_forward_kl": beta - 1, "skew_reverse_kl": 1 - beta}
    return terms.get(kind, 0.0)


class _TopKLoss:
    """Divergence over the k + 1 actions of each row; a ``distill.tiles.TileLoss``."""

    def __init__(
        self,
        kind: str,
        beta: float,
        *,
        ids_NK: Tensor,
        log_q_NA: Tensor,
        groups: list[Tensor],
        sampled_ids_N: Tensor | None,
        tail: bool,
    ) -> None:
        self.kind, self.beta, self.mass_term = KINDS[kind], beta, 0.0 if tail else _mass_term(kind, beta)
        self.ids_NK, self.log_q_NA, self.groups, self.tail = ids_NK, log_q_NA, groups, tail
        self.sampled_ids_N = sampled_ids_N
        like_N = log_q_NA[:, 0]
        self.values_N, self.reverse_kl_N, self.forward_kl_N = (torch.empty_like(like_N) for _ in range(3))
        self.student_tail_N, self.student_entropy_N = (torch.empty_like(like_N) for _ in range(2))
        self.sampled_logprob_N = None if sampled_ids_N is None else torch.empty_like(like_N)

    def form_(self, rows: slice, logits: Sequence[Tensor], weights_B1: Tensor, spare: Sequence[Tensor]) -> None:
        (logits_BV,), (p_BV, spare_BV) = logits, spare
        ids_BK, log_q_BA = self.ids_NK[rows], self.log_q_NA[rows].clone()
        log_softmax_(logits_BV, 1.0, p_BV)
        self.student_entropy_N[rows] = -row_dot(p_BV, logits_BV, spare_BV)
        if self.sampled_ids_N is not None and self.sampled_logprob_N is not None:
            self.sampled_logprob_N[rows] = pick(logits_BV, self.sampled_ids_N[rows])
        log_p_BK = logits_BV.gather(-1, ids_BK)
        logits_BV.scatter_(-1, ids_BK, LOG_ZERO)  # what stays is the tail
        tail_B1 = logits_BV.logsumexp(-1, keepdim=True)
        self.student_tail_N[rows] = tail_p_B = tail_B1.squeeze(-1).exp()
        log_p_BA = torch.cat([log_p_BK, tail_B1], -1)
        if not self.tail:
            log_p_BA[:, -1] = log_q_BA[:, -1] = LOG_ZERO
        members = [torch.isin(ids_BK, group_G) for group_G in self.groups]
        shares = [_merge_members_(log_p_BA[:, :-1], member_BK) for member_BK in members]
        for member_BK in members:
            _merge_members_(log_q_BA[:, :-1], member_BK)

        p_BA, q_BA = log_p_BA.exp(), log_q_BA.exp()
        ratio_BA = log_p_BA - log_q_BA
        spare_BA = torch.empty_like(ratio_BA)
        self.reverse_kl_N[rows] = row_dot(p_BA, ratio_BA, spare_BA)
        self.forward_kl_N[rows] = forward_kl_B = -row_dot(q_BA, ratio_BA, spare_BA)
        self.values_N[rows], slope_BA = self.kind(Pair(p_BA, q_BA, ratio_BA, forward_kl_B, spare_BA), self.beta)
        if self.mass_term:
            slope_BA = slope_BA + self.mass_term * p_BA

        sum_B1 = slope_BA.sum(-1, keepdim=True)
        grad_BK = slope_BA[:, :-1] - p_BA[:, :-1] * sum_B1
        for member_BK, share_BK in zip(members, shares, strict=True):
            grad_BK = torch.where(member_BK, share_BK * (grad_BK * _first(member_BK)).sum(-1, keepdim=True), grad_BK)
        # A token of the tail receives the tail's gradient by its share of it.
        grad_tail_B1 = slope_BA[:, -1:] - tail_p_B[:, None] * sum_B1
        logits_BV.sub_(tail_B1).exp_().mul_(grad_tail_B1 * weights_B1)
        logits_BV.scatter_(-1, ids_BK, grad_BK * weights_B1)


def _first(member_BK: Tensor) -> Tensor:
    """True at the first True of each row."""
    return member_BK & (member_BK.cumsum(-1) == 1)


def _merge_members_(log_probs_BK: Tensor, member_BK: Tensor) -> Tensor:
    """Adds the probabilities of each row's members into the first of them, in place; each one's share of the sum."""
    members_BK = log_probs_BK.masked_fill(~member_BK, -math.inf)
    merged_B1 = members_BK.logsumexp(-1, keepdim=True)
    log_probs_BK.masked_fill_(member_BK, LOG_ZERO)
    log_probs_BK.copy_(torch.where(_first(member_BK), merged_B1, log_probs_BK))
    return torch.where(member_BK, (members_BK - merged_B1).exp(), 0.0)


@eager
def linear_topk_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail_logprob: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    weights: Tensor | None = None,
    merged_ids: Sequence[Sequence[int]] | None = None,
    sampled_ids: Tensor | None = None,
    tail: bool = True,
    chunk_rows: int | None = None,
) -> TopKDivergence:
    """Weighted sum over tokens of the divergence to a teacher that gave k log-probabilities a token, in nats.

    ``ids`` [N, K] are distinct in each row, ``logprobs`` [N, K] the teacher's log-probabilities of them and
    ``tail_logprob`` [N] that of all other tokens together. ``tail=False`` leaves the tail's term out of the sum: no
    divergence any more, see the module's docstring. Everything else is as in ``linear_divergence``, at temperature 1.

    Raises ``UserError`` for an unknown kind, a parameter out of range or shapes that do not fit together.
    """
    check_linear("student", student_hidden, student_head)
    check_choices(kind, beta, 1.0)
    num_rows, num_vocab = len(student_hidden), len(student_head)
    check_rows_of_ids(ids, num_rows, num_vocab)
    if logprobs.shape != ids.shape or tail_logprob.shape != (num_rows,):
        raise UserError(
            f"ids are {list(ids.shape)}, their log-probabilities {list(logprobs.shape)} and the tail's "
            f"{list(tail_logprob.shape)}; one each for every id, and one tail for every row, are needed."
        )
    weights_N = weights_of(weights, student_hidden)
    groups = [torch.tensor(group, device=ids.device) for group in check_groups(merged_ids or (), num_vocab)]
    if sampled_ids is not None:
        check_ids("sampled_ids", sampled_ids, num_rows, num_vocab)
    log_q_NA = torch.cat([logprobs, tail_logprob[:, None]], -1).detach().to(weights_N.dtype).clamp_(min=LOG_ZERO)
    loss = _TopKLoss(kind, beta, ids_NK=ids, log_q_NA=log_q_NA, groups=groups, sampled_ids_N=sampled_ids, tail=tail)
    return TopKDivergence(
        total=tiled_total([(student_hidden, student_head)], loss, weights_N, chunk_rows),
        values=loss.values_N,
        reverse_kl=loss.reverse_kl_N,
        forward_kl=loss.forward_kl_N,
        student_tail=loss.student_tail_N,
        student_entropy=loss.student_entropy_N,
        sampled_logprob=loss.sampled_logprob_N,
    )


# --- The sampled token ------------------------------------------------------------------------------------------------

_STEEPEST = 60.0
"""Where a token's log q - log p is larger, k3 stands still: from 88 on it is infinite in float32, and the weight 0 of a
token that was forced would make no number of that. The gradient has no exponential in it."""

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio_B: log_ratio_B,
    "k3": lambda log_ratio_B: torch.expm1((-log_ratio_B).clamp(max=_STEEPEST)) + log_ratio_B,
}
"""Estimates of the reverse KL from log p(y) - log q(y) of one y drawn from p."""


class _SampledLoss:
    """An estimate of the reverse KL with its policy gradient; a ``distill.tiles.TileLoss``."""

    def __init__(self, estimator: str, *, sampled_ids_N: Tensor, log_q_N: Tensor) -> None:
        self.estimate, self.sampled_ids_N, self.log_q_N = ESTIMATORS[estimator], sampled_ids_N, log_q_N
        self.values_N, self.student_entropy_N, self.sampled_logprob_N = (torch.empty_like(log_q_N) for _ in range(3))

    def form_(self, rows: slice, logits: Sequence[Tensor], weights_B1: Tensor, spare: Sequence[Tensor]) -> None:
        (logits_BV,), (p_BV, spare_BV) = logits, spare
        sampled_ids_B = self.sampled_ids_N[rows]
        log_softmax_(logits_BV, 1.0, p_BV)
        self.sampled_logprob_N[rows] = log_p_B = pick(logits_BV, sampled_ids_B)
        log_ratio_B = log_p_B - self.log_q_N[rows]
        self.values_N[rows] = self.estimate(log_ratio_B)
        self.student_entropy_N[rows] = -row_dot(p_BV, logits_BV, spare_BV)
        scale_B1 = weights_B1 * log_ratio_B[:, None]
        torch.mul(p_BV, -scale_B1, out=logits_BV)
        logits_BV.scatter_add_(-1, sampled_ids_B[:, None], scale_B1)


@eager
def linear_sampled_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    sampled_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    estimator: str = "k1",
    weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> SampledDivergence:
    """Weighted sum over tokens of an estimate of the reverse KL from one sampled token each, in nats.

    ``sampled_ids`` [N] were drawn from the student's own distribution: temperature 1, nothing cut off, no penalty; a
    token drawn otherwise makes the estimate and its gradient wrong. ``teacher_logprobs`` [N] are the teacher's
    log-probabilities of them. ``estimator`` is a key of ``ESTIMATORS``; the gradient is the same for each (see the
    module's docstring). ``weights`` and ``chunk_rows`` are those of ``linear_divergence``.

    Raises ``UserError`` for an unknown estimator or shapes that do not fit together.
    """
    check_linear("student", student_hidden, student_head)
    if estimator not in ESTIMATORS:
        near = difflib.get_close_matches(estimator, ESTIMATORS, n=1, cutoff=0)[0]
        raise UserError(f"There is no estimator {estimator!r}; did you mean {near!r}? There are: k1, k3.")
    check_ids("sampled_ids", sampled_ids, len(student_hidden), len(student_head))
    if teacher_logprobs.shape != sampled_ids.shape:
        raise UserError(
            f"teacher_logprobs has shape {list(teacher_logprobs.shape)}; there are {len(sampled_ids)} sampled ids."
        )
    weights_N = weights_of(weights, student_hidden)
    log_q_N = teacher_logprobs.detach().to(weights_N.dtype)
    loss = _SampledLoss(estimator, sampled_ids_N=sampled_ids, log_q_N=log_q_N)
    return SampledDivergence(
        total=tiled_total([(student_hidden, student_head)], loss, weights_N, chunk_rows),
        values=loss.values_N,
        student_entropy=loss.student_entropy_N,
        sampled_logprob=loss.sampled_logprob_N,
    )
