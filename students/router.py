"""Keeping a mixture of experts balanced: the model's own auxiliary loss, and a number that shows the balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """``loss`` is differentiable; ``max_load`` is the busiest expert's share of tokens times the number of experts,
    the mean over layers: 1 is perfect balance."""

    loss: Tensor
    max_load: float


def load_balancing(router_logits: Sequence[Tensor], config: PretrainedConfig) -> RouterLoad:
    """The load-balancing loss of transformers' Qwen3-MoE (Switch Transformer, 2101.03961, equations 4 to 6).

    ``router_logits`` are one [T, experts] tensor a layer; every row is a token, there is no padding. It is no sum over
    tokens: that of two halves is not the mean of theirs.
    """
    num_experts, chosen = config.num_experts, config.num_experts_per_tok
    loss = load_balancing_loss_func(cast(Any, tuple(router_logits)), num_experts, chosen)
    assert isinstance(loss, Tensor)
    loads: list[float] = []
    for logits_TE in router_logits:
        experts = logits_TE.detach().topk(chosen, dim=-1).indices.flatten()
        counts_E = torch.bincount(experts, minlength=num_experts).float()
        loads.append(float(counts_E.max() / counts_E.sum() * num_experts))
    return RouterLoad(loss, sum(loads) / len(loads))
