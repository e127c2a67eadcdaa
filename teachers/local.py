"""A teacher in this process, through transformers: the reference for every other way to reach one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import interrupt
from distill.attention import PACKED, Packing
from distill.device import finish
from distill.memory import pass_tokens
from distill.types import HiddenStates, Rollout
from teachers.teacher import DeafTeacher


class LocalTeacher(DeafTeacher):
    """Scores rollouts with a model held in this process.

    ``batch_tokens`` bounds the tokens of one forward pass, as ``pass_tokens``; sequences are packed without padding.
    It hears nothing: student and teacher share a processor, and larger batches are faster.
    """

    def __init__(self, model: PreTrainedModel, *, name: str, batch_tokens: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(PACKED)
        self.name = name
        self.pass_tokens = pass_tokens(batch_tokens, on_cpu=model.device.type == "cpu")

    @property
    def head_VD(self) -> Tensor:
        """The LM head's weight, [vocabulary, d]."""
        return cast(nn.Linear, self.model.get_output_embeddings()).weight

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[HiddenStates]:
        """The last hidden states (after the final norm) that predict each response token, rows P-1 .. P+R-2.

        In the order of ``rollouts``; each [R, d] in the model's dtype.
        """
        states: dict[int, HiddenStates] = {}
        device = self.model.device
        body = cast(nn.Module, self.model.get_decoder())
        for places in self._batches(rollouts):
            interrupt.check()
            sequences = [rollouts[place].read_ids for place in places]
            packing = Packing.of([len(ids) for ids in sequences], device)
            hidden_TD = body(
                input_ids=torch.tensor([[token for ids in sequences for token in ids]], device=device),
                position_ids=torch.tensor([[row for ids in sequences for row in range(len(ids))]], device=device),
                use_cache=False,
                **packing.keywords(),
            ).last_hidden_state[0]
            for row_TD, place in zip(hidden_TD.split(list(packing.lengths)), places, strict=True):
                first = len(rollouts[place].prompt_ids) - 1
                states[place] = HiddenStates(
                    row_TD[first : first + len(rollouts[place].response_ids)].clone(), self.name
                )
        finish(device)
        return [states[place] for place in range(len(rollouts))]

    def _batches(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Places of ``rollouts`` in order, grouped under the token bound."""
        batches: list[list[int]] = []
        room = 0
        for place, rollout in enumerate(rollouts):
            length = len(rollout.read_ids)
            if batches and length <= room:
                batches[-1].append(place)
            else:
                batches.append([place])
                room = self.pass_tokens
            room -= length
        return batches
