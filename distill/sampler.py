"""Drawing responses: a decoding loop over a transformers model that returns what a trainer needs.

``generate`` of transformers returns no log-probabilities of the untouched distribution, cannot force the early-stop
string into a row, has no presence penalty, draws from one global random stream, and decodes finished rows to the end.
This loop does each of these, with the model's own forward pass and cache. A response depends on its request and the
weights alone (up to rounding): every request draws from a random stream of its own.

Shapes: B rows decoded together, V vocabulary rows, P prompt tokens (left-padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from distill import interrupt
from distill.errors import NonFiniteError
from distill.types import FinishReason, Request, Rollout, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.encode import Encoder

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when less than this share of its rows is still decoding."""

OnFinished = Callable[[Rollout], None]


class Sampler(Protocol):
    """Whoever turns requests into responses."""

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        """One rollout a request, in the order of the requests; ``on_finished`` sees each as soon as it ends."""
        ...


class TransformersSampler:
    """Decodes with a transformers causal language model in this process.

    At most ``batch`` rows are decoded together, and no more than their limits of ``cache_tokens`` allow.
    ``weight_version`` is stamped on the rollouts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        speaker: str,
        batch: int = 256,
        cache_tokens: int = 131072,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.speaker = speaker
        self.batch = batch
        self.cache_tokens = cache_tokens
        self.weight_version = 0

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        training = self.model.training
        rollouts: dict[int, Rollout] = {}
        self.model.eval()
        try:
            for places in self._batches(requests):
                rows = [_Row(index, requests[index], self.encoder) for index in places]
                for row in self._decode(rows):
                    rollouts[row.index] = row.rollout(self.speaker, self.weight_version)
                    if on_finished is not None:
                        on_finished(rollouts[row.index])
        finally:
            self.model.train(training)
        return [rollouts[index] for index in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Places of ``requests`` that are decoded together: prompts of like length, for less padding."""
        batches: list[list[int]] = []
        widest = 0
        for place in sorted(range(len(requests)), key=lambda place: len(requests[place].prompt_ids)):
            limit = len(requests[place].prompt_ids) + requests[place].sampling.max_new_tokens
            widest = max(widest, limit)
            fits = batches and len(batches[-1]) < self.batch and (len(batches[-1]) + 1) * widest <= self.cache_tokens
            if fits:
                batches[-1].append(place)
            else:
                batches.append([place])
                widest = limit
        return batches

    def _decode(self, rows: list[_Row]) -> Iterator[_Row]:
        """Decode ``rows`` together; each is yielded when it ends."""
        from distill.kv_cache import roomy_cache

        device = self.model.device
        width = max(len(row.request.prompt_ids) for row in rows)
        padding = [width - len(row.request.prompt_ids) for row in rows]
        input_BT = torch.tensor(
            [[0] * pad + list(row.request.prompt_ids) for pad, row in zip(padding, rows, strict=True)], device=device
        )
        # Which of all positions that there will be are attended to: all but the padding at the front.
        longest = width + max(row.request.sampling.max_new_tokens for row in rows)
        mask_BT = torch.arange(longest, device=device) >= torch.tensor(padding, device=device)[:, None]
        position_BT = (mask_BT[:, :width].cumsum(dim=1) - 1).clamp(min=0)
        draw = _Draw.for_rows(rows, self.model.config.vocab_size, device)
        cache = roomy_cache()
        is_new = True
        while True:
            interrupt.check()
            output = self.model(
                input_ids=input_BT,
                # A new token sees all before it; with four dimensions the mask is taken as it is.
                attention_mask=mask_BT[:, :width] if is_new else mask_BT[:, None, None, :width],
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            is_new = False
            logits_BV = output.logits[:, -1].float()
            if not logits_BV.amax().isfinite():
                raise NonFiniteError(f"the {self.speaker}'s logits are not finite: its weights are broken or diverged")
            uniform_B = torch.tensor([row.uniform() for row in rows], device=device)
            token_B, logprob_BV = draw(logits_BV, uniform_B)
            token_B = _force(rows, token_B)
            logprob_B = logprob_BV.gather(1, token_B[:, None])[:, 0]
            draw.remember(token_B)
            for row, token, logprob in zip(rows, token_B.tolist(), logprob_B.tolist(), strict=True):
                if not row.finished:
                    row.append(token, logprob)
                    if row.finished:
                        yield row
            num_active = sum(not row.finished for row in rows)
            if num_active == 0:
                return
            next_position_B = position_BT[:, -1] + 1
            if num_active < COMPACT_BELOW * len(rows):
                keep = torch.tensor([place for place, row in enumerate(rows) if not row.finished], device=device)
                rows = [row for row in rows if not row.finished]
                cache.batch_select_indices(keep)
                token_B, mask_BT, next_position_B = token_B[keep], mask_BT[keep], next_position_B[keep]
                draw = draw.select(keep)
            input_BT = token_B[:, None]
            position_BT = next_position_B[:, None]
            width += 1


@dataclass
class _Row:
    """One response while it grows."""

    index: int
    request: Request
    encoder: Encoder
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    thinking: bool = False
    pending: list[int] = field(default_factory=list)
    """Tokens of the early-stop string that are still to be forced."""

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.Philox(key=self.request.seed))
        self._uniforms: list[float] = []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def uniform(self) -> float:
        """The next number of the request's own random stream."""
        if not self._uniforms:
            self._uniforms = self._random.random(64)[::-1].tolist()
        return self._uniforms.pop()

    def append(self, token: int, logprob: float) -> None:
        forced = bool(self.pending)
        if forced:
            self.pending.pop(0)
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.forced.append(forced)
        self._follow_thinking(token)
        if token in self.encoder.stop_ids and not forced:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.request.sampling.max_new_tokens:
            self.finish_reason = "length"

    def _follow_thinking(self, token: int) -> None:
        budget = self.request.sampling.thinking_budget
        if token == self.encoder.think_open_id:
            self.thinking = True
        elif token == self.encoder.think_close_id:
            self.thinking = False
        if self.thinking and budget is not None and len(self.ids) >= budget and not self.pending:
            self.pending = list(self.encoder.early_stop_ids)
            self.thinking = False

    def rollout(self, speaker: str, weight_version: int) -> Rollout:
        assert self.finish_reason is not None
        return Rollout(
            request=self.request,
            response_ids=tuple(self.ids),
            forced=tuple(self.forced),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            speaker=speaker,
            weight_version=weight_version,
        )


def _force(rows: Sequence[_Row], token_B: Tensor) -> Tensor:
    """``token_B`` with the next early-stop token in the rows that are being cut."""
    for place, row in enumerate(rows):
        if row.pending and not row.finished:
            token_B[place] = row.pending[0]
    return token_B


@dataclass
class _Draw:
    """Turns logits into tokens, each row by its own sampling."""

    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    presence_B: Tensor
    seen_BV: Tensor | None
    truncates: bool
    untouched: bool
    """Every row draws from the model's own distribution, or from a part of it."""

    @classmethod
    def for_rows(cls, rows: Sequence[_Row], vocabulary: int, device: torch.device) -> _Draw:
        samplings: list[Sampling] = [row.request.sampling for row in rows]
        penalised = any(sampling.presence_penalty for sampling in samplings)
        return cls(
            temperature_B=torch.tensor([sampling.temperature for sampling in samplings], device=device),
            top_p_B=torch.tensor([sampling.top_p for sampling in samplings], device=device),
            top_k_B=torch.tensor([sampling.top_k or vocabulary for sampling in samplings], device=device),
            presence_B=torch.tensor([sampling.presence_penalty for sampling in samplings], device=device),
            seen_BV=torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device) if penalised else None,
            truncates=any(sampling.top_p < 1 or sampling.top_k for sampling in samplings),
            untouched=not penalised and all(sampling.temperature == 1 for sampling in samplings),
        )

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] by inverse transform of ``uniform_B``, and the untouched log-probabilities [B, V]."""
        logprob_BV = logits_BV.log_softmax(dim=-1)
        if self.seen_BV is not None:
            logits_BV = logits_BV - self.presence_B[:, None] * self.seen_BV
        if self.untouched:
            probability_BV = logprob_BV.exp()
        else:
            probability_BV = (logits_BV / self.temperature_B[:, None]).softmax(dim=-1)
        if not self.truncates:
            return _inverse_transform(probability_BV, uniform_B), logprob_BV
        # Only the k most probable can survive a top-k, so only they are sorted; top-p acts on what top-k left.
        widest = int(self.top_k_B.max())
        sorted_BK, ids_BK = probability_BV.topk(widest, dim=-1)
        rank_K = torch.arange(widest, device=sorted_BK.device)
        sorted_BK = sorted_BK.masked_fill(rank_K >= self.top_k_B[:, None], 0.0)
        sorted_BK = sorted_BK / sorted_BK.sum(dim=-1, keepdim=True)
        before_BK = sorted_BK.cumsum(dim=-1) - sorted_BK
        sorted_BK = sorted_BK.masked_fill(before_BK >= self.top_p_B[:, None], 0.0)
        place_B = _inverse_transform(sorted_BK, uniform_B)
        return ids_BK.gather(1, place_B[:, None])[:, 0], logprob_BV

    def remember(self, token_B: Tensor) -> None:
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B[:, None], True)

    def select(self, keep: Tensor) -> _Draw:
        return _Draw(
            self.temperature_B[keep],
            self.top_p_B[keep],
            self.top_k_B[keep],
            self.presence_B[keep],
            None if self.seen_BV is None else self.seen_BV[keep],
            self.truncates,
            self.untouched,
        )


def _inverse_transform(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first column where the cumulated weight passes ``uniform_B`` times the row's sum; never one of weight 0."""
    cumulated_BV = weight_BV.cumsum(dim=-1)
    total_B = cumulated_BV[:, -1]
    # Rounding may lift the product to the sum itself, which no column passes.
    target_B = torch.minimum(uniform_B.to(total_B) * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulated_BV, target_B[:, None], right=True)[:, 0]
