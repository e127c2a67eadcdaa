"""Attention over a packed row: many sequences side by side, none of which sees another.

Everything else in a Qwen3 layer works token by token and needs no padding. Attention gets the sequences' lengths from
the batch (``Packing``, which travels through the model's own forward pass as a keyword) and runs plainly causal within
each: on a GPU in 16 bits with PyTorch's FlashAttention for variable lengths, elsewhere one sequence after the other
through ``scaled_dot_product_attention``. Both are exact and neither makes a mask. A block-diagonal mask over the whole
row, transformers' own way without FlashAttention, costs the square of the row's length: on a CPU 3 to 5 times the
time of a step, and at 32k tokens a mask of a gigabyte.

In decoding (``Decoding``) a pass begins with one new token of each response under way; these look into the cache, and
prompts that join are packed behind them. With neither it is transformers' ``sdpa``, masks included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill.kv_cache import Decoding

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
        """What a transformers model is called with, beside the ids and their positions."""
        return attention_keywords(self.ends_S.device, packing=self)


def attention_keywords(device: torch.device, **own: Packing | Decoding | None) -> dict[str, Any]:
    """Keywords that travel through a model's forward pass to ``packed_attention``.

    A four-dimensional mask is one that transformers leaves as it is instead of making its own; nobody reads it.
    """
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), **own}


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
    decoding: Decoding | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Queries [1, heads, T, d], keys and values [1, KV heads, T, d] to [1, T, heads, d].

    With ``decoding`` each token is a row: [T, heads, 1, d] to [T, 1, heads, d].
    """
    own = decoding is not None or packing is not None
    assert not own or others.get("sliding_window") is None, "a window is refused where a checkpoint's shape is read"
    if decoding is not None:
        num_rows, layer = decoding.num_rows, module.layer_idx
        assert isinstance(layer, int)
        said = [decoding.attend(query[:num_rows], layer, scaling)] if num_rows else []
        if packing is not None:
            query, key, value = (states[num_rows:].transpose(0, 2) for states in (query, key, value))
            read, _ = packed_attention(module, query, key, value, None, scaling=scaling, packing=packing)
            said.append(read.transpose(0, 1))
        return said[0] if len(said) == 1 else torch.cat(said), None
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    assert dropout == 0.0, "Qwen3 trains without attention dropout"
    shared = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        ends_S, longest = packing.ends_S, max(packing.lengths)
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        flash = _varlen(shared)(query, key, value, ends_S, ends_S, longest, longest, scale=scaling, window_size=(-1, 0))
        assert isinstance(flash, Tensor)
        return flash[None], None
    sequences = zip(*(x.split(list(packing.lengths), dim=2) for x in (query, key, value)), strict=True)
    said = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shared) for q, k, v in sequences
    ]
    return torch.cat(said, dim=2).transpose(1, 2), None


@cache
def _varlen(shared: bool) -> Callable[..., Any]:
    """PyTorch's FlashAttention over a packed row. Where key heads are ``shared``, torch before 2.12 takes that as it
    comes, and later ones ask for it by a word."""
    from torch.nn.attention.varlen import varlen_attn

    has_word = "enable_gqa" in signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=shared) if has_word else varlen_attn


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
