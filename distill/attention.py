"""Attention over a packed row: many sequences side by side, none of which sees another.

Everything else in a Qwen3 layer works token by token and needs no padding. Attention gets the sequences' lengths from
the batch (``Packing``, which travels through the model's own forward pass as a keyword) and runs plainly causal within
each: on a GPU in 16 bits with PyTorch's FlashAttention for variable lengths, elsewhere one sequence after the other
through ``scaled_dot_product_attention``. Both are exact and neither makes a mask. A block-diagonal mask over the whole
row, transformers' own way without FlashAttention, costs the square of the row's length: on a CPU 3 to 5 times the
time of a step, and at 32k tokens a mask of a gigabyte.

Without a ``Packing`` (sampling) it is transformers' ``sdpa``, masks included, but for the decoding of single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "distill_packed"
"""The name under which transformers finds this attention: ``model.set_attn_implementation(PACKED)``."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a packed row end: ``ends_S`` are their lengths added up, from 0, [sequences + 1]."""

    lengths: tuple[int, ...]
    ends_S: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        ends = list(accumulate(lengths, initial=0))
        return cls(tuple(lengths), torch.tensor(ends, dtype=torch.int32, device=device))

    def keywords(self) -> dict[str, Any]:
        """What a transformers model is called with, beside the ids and their positions.

        A four-dimensional mask is one that transformers leaves as it is instead of making its own; nobody reads it.
        """
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.ends_S.device)
        return {"attention_mask": unread, "packing": self}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Queries [1, heads, T, d], keys and values [1, KV heads, T, d] to [1, T, heads, d]."""
    if packing is None and query.shape[2] == 1:
        # One new token a row: the query heads that share a key head stand beside each other as its rows, so that keys
        # and values are not repeated for them.
        num_rows, _, _, width = query.shape
        grouped = query.reshape(num_rows, key.shape[1], -1, width)
        attended = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return attended.reshape(num_rows, 1, -1, width), None
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    assert dropout == 0.0, "Qwen3 trains without attention dropout"
    shared = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        ends_S, longest = packing.ends_S, max(packing.lengths)
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        flash = varlen_attn(
            query, key, value, ends_S, ends_S, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=shared
        )
        assert isinstance(flash, Tensor)
        return flash[None], None
    sequences = zip(*(x.split(list(packing.lengths), dim=2) for x in (query, key, value)), strict=True)
    said = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shared) for q, k, v in sequences
    ]
    return torch.cat(said, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
