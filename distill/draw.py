"""Logits to tokens, each row by its own sampling and its own random number.

Legend: B rows decoded together, V vocabulary rows, K the most probable tokens of a row, N the rows that truncate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.types import Sampling


@dataclass
class Draw:
    """Turns logits into tokens, each row by its own sampling: a row's token does not depend on the other rows."""

    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    presence_B: Tensor
    seen_BV: Tensor | None
    """What each row has said; None where no row is penalised for it."""
    truncating_N: Tensor | None
    """Places of the rows that draw from a part of the distribution; None where there is none."""
    untouched: bool
    """Every row draws from the model's own distribution, or from a part of it."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling], vocabulary: int, device: torch.device) -> Draw:
        penalised = any(sampling.presence_penalty for sampling in samplings)
        truncating = [place for place, sampling in enumerate(samplings) if sampling.top_p < 1 or sampling.top_k]
        return cls(
            temperature_B=torch.tensor([sampling.temperature for sampling in samplings], device=device),
            top_p_B=torch.tensor([sampling.top_p for sampling in samplings], device=device),
            # More than there is leaves the distribution whole, as in vLLM.
            top_k_B=torch.tensor(
                [min(sampling.top_k or vocabulary, vocabulary) for sampling in samplings], device=device
            ),
            presence_B=torch.tensor([sampling.presence_penalty for sampling in samplings], device=device),
            seen_BV=torch.zeros(len(samplings), vocabulary, dtype=torch.bool, device=device) if penalised else None,
            truncating_N=torch.tensor(truncating, device=device) if truncating else None,
            untouched=not penalised and all(sampling.temperature == 1 for sampling in samplings),
        )

    def followed_by(self, samplings: Sequence[Sampling], source_N: Tensor, vocabulary: int) -> Draw:
        """The draw of other rows: row n is row ``source_N[n]`` of this one, and those behind them are new."""
        draw = Draw.of(samplings, vocabulary, source_N.device)
        if draw.seen_BV is not None and self.seen_BV is not None:
            draw.seen_BV[: len(source_N)] = self.seen_BV[source_N]
        return draw

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] by inverse transform of ``uniform_B``, and the untouched log-probabilities [B, V]."""
        logprob_BV = logits_BV.log_softmax(dim=-1)
        if self.seen_BV is not None:
            logits_BV = logits_BV - self.presence_B[:, None] * self.seen_BV
        if self.untouched:
            probability_BV = logprob_BV.exp()
        else:
            probability_BV = (logits_BV / self.temperature_B[:, None]).softmax(dim=-1)
        if self.truncating_N is None:
            return inverse_transform(probability_BV, uniform_B), logprob_BV
        if len(self.truncating_N) == len(logits_BV):
            return self._truncated(probability_BV, uniform_B, self.truncating_N), logprob_BV
        token_B = inverse_transform(probability_BV, uniform_B)
        token_B[self.truncating_N] = self._truncated(
            probability_BV[self.truncating_N], uniform_B[self.truncating_N], self.truncating_N
        )
        return token_B, logprob_BV

    def _truncated(self, probability_NV: Tensor, uniform_N: Tensor, place_N: Tensor) -> Tensor:
        """Tokens [N] of the rows at ``place_N``, from what their top-k and top-p leave."""
        top_k_N, top_p_N = self.top_k_B[place_N], self.top_p_B[place_N]
        # Only the k most probable can survive a top-k, so only they are sorted; top-p acts on what top-k left.
        widest = int(top_k_N.max())
        sorted_NK, ids_NK = probability_NV.topk(widest, dim=-1)
        rank_K = torch.arange(widest, device=sorted_NK.device)
        sorted_NK = sorted_NK.masked_fill(rank_K >= top_k_N[:, None], 0.0)
        sorted_NK = sorted_NK / sorted_NK.sum(dim=-1, keepdim=True)
        before_NK = sorted_NK.cumsum(dim=-1) - sorted_NK
        sorted_NK = sorted_NK.masked_fill(before_NK >= top_p_N[:, None], 0.0)
        return ids_NK.gather(1, inverse_transform(sorted_NK, uniform_N)[:, None])[:, 0]

    def remember(self, token_B: Tensor) -> None:
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B[:, None], True)


def inverse_transform(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first column where the cumulated weight passes ``uniform_B`` times the row's sum; never one of weight 0."""
    cumulated_BV = weight_BV.cumsum(dim=-1)
    total_B = cumulated_BV[:, -1]
    # Rounding may lift the product to the sum itself, which no column passes.
    target_B = torch.minimum(uniform_B.to(total_B) * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulated_BV, target_B[:, None], right=True)[:, 0]
