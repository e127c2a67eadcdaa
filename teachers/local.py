"""A teacher in this process, through transformers: the reference for every other way to reach one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import interrupt
from distill.types import HiddenStates, Rollout


class LocalTeacher:
    """Scores rollouts with a model held in this process.

    ``batch_tokens`` bounds the padded tokens of one forward pass.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, batch_tokens: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.batch_tokens = batch_tokens

    @property
    def head_VD(self) -> Tensor:
        """The LM head's weight, [vocabulary, d]."""
        return cast(nn.Linear, self.model.get_output_embeddings()).weight

    def hear(self, rollout: Rollout) -> None:
        """Nothing: student and teacher share a processor, and larger batches are faster."""

    def forget(self) -> None:
        """Nothing was kept."""

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[HiddenStates]:
        """The last hidden states (after the final norm) that predict each response token, rows P-1 .. P+R-2.

        In the order of ``rollouts``; each [R, d] in the model's dtype.
        """
        states: dict[int, HiddenStates] = {}
        for places in self._batches(rollouts):
            interrupt.check()
            sequences = [rollouts[place].prompt_ids + rollouts[place].response_ids for place in places]
            width = max(map(len, sequences))
            device = self.model.device
            body = cast(nn.Module, self.model.get_decoder())
            hidden_BTD = body(
                input_ids=torch.tensor([ids + (0,) * (width - len(ids)) for ids in sequences], device=device),
                attention_mask=torch.tensor(
                    [[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=device
                ),
                use_cache=False,
            ).last_hidden_state
            for row_TD, place in zip(hidden_BTD, places, strict=True):
                first = len(rollouts[place].prompt_ids) - 1
                states[place] = HiddenStates(
                    row_TD[first : first + len(rollouts[place].response_ids)].clone(), self.name
                )
        return [states[place] for place in range(len(rollouts))]

    def _batches(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Places of ``rollouts`` by length, grouped under the token bound."""
        lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
        batches: list[list[int]] = []
        for place in sorted(range(len(rollouts)), key=lengths.__getitem__):
            if batches and (len(batches[-1]) + 1) * lengths[place] <= self.batch_tokens:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches
