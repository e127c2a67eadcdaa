"""The clipped policy gradient of GRPO over a whole vocabulary, from hidden states and a head.

For a token with ratio r = p(action) / p_old(action) and advantage A it is -min(r A, clip(r, 1 - low, 1 + high) A):
PPO's (arXiv 1707.06347, equation 7), with DAPO's higher upper bound (arXiv 2503.14476, equation 8), which leaves an
unlikely token of a good response more room to rise. The loop over tiles is ``distill.tiles``.

Stop tokens are one action. A base model ends on one of them and its chat template on another; whichever is drawn, the
response ends and the reward is the same. So p(stop) is the sum over the group, for the ratio and for its clipping. The
gradient of log p(stop) is the mean of the members' own, weighted by their shares: the expectation of the plain policy
gradient, without the noise of which of them was drawn, and without a pull that turns one stop token against the other.
The sampler reports the log-probability of the very token that it drew, so the importance weight compares that.

Shapes: N rows (response tokens), V vocabulary rows, D width; a block has B rows; G ids count as one action.

Left out on purpose: k3 and its kin for a KL penalty. ``linear_divergence`` gives the KL itself, over the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.divergence import eager, log_softmax_, pick, row_dot
from distill.errors import UserError
from distill.loss_arguments import check_groups, check_ids, check_linear, weights_of
from distill.tiles import tiled_total
from distill.types import ActionLogprobs


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """What ``linear_policy_gradient`` returns: one differentiable number, and detached per-token facts of shape [N].

    ``values`` are the losses, importance weight included, the caller's weights not. ``action_logprob`` is that of what
    was done (any stop token is one action), ``token_logprob`` that of the token itself. ``clipped`` is 1 where the
    clipping took the gradient away. ``importance`` is 1 without ``sampler_logprobs``.
    """

    total: Tensor
    values: Tensor
    action_logprob: Tensor
    token_logprob: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    importance: Tensor


@dataclass(frozen=True, slots=True)
class Clip:
    """How far the ratio may move before a token stops teaching: to 1 - ``low`` and 1 + ``high``."""

    low: float = 0.2
    high: float = 0.28


class _ActionLoss:
    """The clipped policy gradient of one action a row; a ``distill.tiles.TileLoss``."""

    def __init__(
        self,
        target_ids_N: Tensor,
        advantages_N: Tensor,
        old: ActionLogprobs | None,
        sampler_logprobs_N: Tensor | None,
        *,
        clip: Clip,
        importance_cap: float,
        groups: Sequence[Tensor],
        like_N: Tensor,
    ) -> None:
        self.target_ids_N, self.advantages_N = target_ids_N, advantages_N
        self.old, self.sampler_logprobs_N = old, sampler_logprobs_N
        self.clip, self.importance_cap, self.groups = clip, importance_cap, groups
        self.values_N, self.action_logprob_N, self.token_logprob_N = (torch.empty_like(like_N) for _ in range(3))
        self.entropy_N, self.clipped_N = (torch.empty_like(like_N) for _ in range(2))
        self.ratio_N, self.importance_N = (torch.ones_like(like_N) for _ in range(2))

    def form_(self, rows: slice, logits: Sequence[Tensor], weights_B1: Tensor, spare: Sequence[Tensor]) -> None:
        (logits_BV,), (p_BV, spare_BV) = logits, spare
        log_softmax_(logits_BV, 1.0, p_BV)
        target_ids_B = self.target_ids_N[rows]
        token_logprob_B = action_logprob_B = pick(logits_BV, target_ids_B)
        members = [_Members.of(logits_BV, target_ids_B, group_G) for group_G in self.groups]
        for group in members:
            action_logprob_B = torch.where(group.drawn_B1[:, 0], group.merged_B1[:, 0], action_logprob_B)
        slope_B1 = weights_B1 * self._judge(rows, token_logprob_B, action_logprob_B)[:, None]

        self.entropy_N[rows] = -row_dot(p_BV, logits_BV, spare_BV)
        # The gradient of an action's log-probability: its members' shares in it, less every token's probability.
        torch.mul(p_BV, -slope_B1, out=logits_BV)
        alone_B1 = torch.ones_like(slope_B1)
        for group in members:
            logits_BV[:, group.ids_G] += slope_B1 * group.share_BG * group.drawn_B1
            alone_B1 = alone_B1.masked_fill(group.drawn_B1, 0.0)
        logits_BV.scatter_add_(-1, target_ids_B[:, None], slope_B1 * alone_B1)

    def _judge(self, rows: slice, token_logprob_B: Tensor, action_logprob_B: Tensor) -> Tensor:
        """Records the rows' facts; the derivative of their values to the log-probability of the action."""
        self.token_logprob_N[rows], self.action_logprob_N[rows] = token_logprob_B, action_logprob_B
        advantages_B, start_B = self.advantages_N[rows], token_logprob_B
        if self.old is not None:
            self.ratio_N[rows] = (action_logprob_B - self.old.action_R[rows]).exp()
            start_B = self.old.token_R[rows]
        if self.sampler_logprobs_N is not None:
            self.importance_N[rows] = (start_B - self.sampler_logprobs_N[rows]).exp().clamp(max=self.importance_cap)
        ratio_B, importance_B = self.ratio_N[rows], self.importance_N[rows]
        free_B = ratio_B * advantages_B
        bounded_B = ratio_B.clamp(1 - self.clip.low, 1 + self.clip.high) * advantages_B
        clipped_B = bounded_B < free_B
        self.clipped_N[rows] = clipped_B.to(ratio_B.dtype)
        self.values_N[rows] = -torch.minimum(free_B, bounded_B) * importance_B
        return -(free_B * importance_B).masked_fill(clipped_B, 0.0)


@dataclass(frozen=True, slots=True)
class _Members:
    """The tokens of one merged action in a block of rows: where one was drawn, their sum, and each one's share."""

    ids_G: Tensor
    drawn_B1: Tensor
    merged_B1: Tensor
    share_BG: Tensor

    @classmethod
    def of(cls, logprobs_BV: Tensor, target_ids_B: Tensor, ids_G: Tensor) -> _Members:
        members_BG = logprobs_BV[:, ids_G]
        merged_B1 = members_BG.logsumexp(-1, keepdim=True)
        drawn_B1 = (target_ids_B[:, None] == ids_G).any(-1, keepdim=True)
        return cls(ids_G, drawn_B1, merged_B1, (members_BG - merged_B1).exp())


@eager
def linear_policy_gradient(
    hidden: Tensor,
    head: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    *,
    old: ActionLogprobs | None = None,
    sampler_logprobs: Tensor | None = None,
    clip: Clip = Clip(),
    importance_cap: float = 2.0,
    weights: Tensor | None = None,
    merged_ids: Sequence[Sequence[int]] | None = None,
    chunk_rows: int | None = None,
) -> PolicyGradient:
    """Weighted sum over tokens of -min(r A, clip(r) A), r the ratio of the action's probability to its old one.

    ``hidden`` [N, d] are the states that predict the response tokens ``target_ids`` [N], ``head`` [V, d] the LM head,
    ``advantages`` [N] one number a token. ``old`` [N] are the log-probabilities before the first optimiser step on this
    batch, as an earlier call returned them; None means that there was no step yet: the ratio is 1 and nothing is
    clipped, but the gradient is there.

    ``sampler_logprobs`` [N] are the log-probabilities that the sampler drew the tokens with. Where its arithmetic or
    its weights are not the trainer's, a token weighs p / p_sampler, a constant taken where the ratio starts and cut off
    at ``importance_cap`` (truncated importance sampling, arXiv 1802.01561). Without them every token weighs 1.

    ``weights``, ``merged_ids``, ``chunk_rows``, dtypes and errors are those of ``linear_divergence``.
    """
    check_linear("the policy", hidden, head)
    num_rows, num_vocab = len(hidden), len(head)
    check_ids("target_ids", target_ids, num_rows, num_vocab)
    _check_choices(clip, importance_cap)
    weights_N = weights_of(weights, hidden)
    loss = _ActionLoss(
        target_ids,
        _row_numbers("advantages", advantages, weights_N),
        None
        if old is None
        else ActionLogprobs(_row_numbers("old", old.token_R, weights_N), _row_numbers("old", old.action_R, weights_N)),
        None if sampler_logprobs is None else _row_numbers("sampler_logprobs", sampler_logprobs, weights_N),
        clip=clip,
        importance_cap=importance_cap,
        groups=[torch.tensor(ids, device=hidden.device) for ids in check_groups(merged_ids or (), num_vocab)],
        like_N=weights_N,
    )
    total = tiled_total([(hidden, head)], loss, weights_N, chunk_rows)
    return PolicyGradient(
        total=total,
        values=loss.values_N,
        action_logprob=loss.action_logprob_N,
        token_logprob=loss.token_logprob_N,
        entropy=loss.entropy_N,
        ratio=loss.ratio_N,
        clipped=loss.clipped_N,
        importance=loss.importance_N,
    )


def _row_numbers(name: str, values: Tensor, like_N: Tensor) -> Tensor:
    if values.shape != like_N.shape:
        raise UserError(f"{name} has shape {list(values.shape)}; there are {len(like_N)} rows, one number each.")
    return values.detach().to(like_N)


def _check_choices(clip: Clip, importance_cap: float) -> None:
    if not (0 < clip.low < 1 and 0 < clip.high < math.inf):
        raise UserError(f"clip is {clip}; low must lie between 0 and 1 and high must be a positive number.")
    if not 1 <= importance_cap < math.inf:
        raise UserError(f"importance_cap is {importance_cap}; it must be a number of at least 1.")
