"""A dense Qwen3 in fewer operations, for decoding on a CPU.

A pass over one new token of each row asks for a hundred operations a layer in transformers' modules, views included.
In a small model that asking is most of the pass, and with 0.6 billion parameters it is still a tenth. Here there are
fewer, in one of two ways (``distill.fused_layers``):

- *Folded*, a small model in float32, half as many: products that read the same states are one product with their
  matrices beside each other, and a norm's weight is part of the product behind it. It is the same arithmetic up to
  rounding in float32, and for nothing else: in 16 bits transformers rounds at places of its own, which are the
  trainer's. The matrices are copies, made for one call of the sampler, so that larger models have the other way.
- *Faithful*, a larger one whose weights are put in order for the call (``distill.packed_linears``), in float32 and
  bfloat16, three quarters as many: the products stay apart and each operation rounds where transformers' does.

In both queries and keys are normalised and rotated together. A model with a module that is not plain Qwen3 (adapters,
experts, shards) or that somebody watches by a hook is left to its modules.

Legend: T tokens of a pass, each a row of its own; D the model's width, d a head's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from distill.attention import Packing, packed_attention
from distill.fused_layers import FaithfulLayer, FoldedLayer, Layer, floor, lengthened, unit
from distill.kv_cache import Decoding
from distill.packed_linears import PackedLinears

FOLDED_PARAMETERS = 20_000_000
"""Most of the layers that are folded. Calls of 8 and 32 rows take 1.3 to 1.6 times as long through the modules with up
to 5 million, 1.0 to 1.2 times with 25 million, and less than folded with 85 million and more."""

KNOWN = {
    qwen3.Qwen3Model,
    qwen3.Qwen3DecoderLayer,
    qwen3.Qwen3Attention,
    qwen3.Qwen3MLP,
    qwen3.Qwen3RMSNorm,
    qwen3.Qwen3RotaryEmbedding,
    SiLUActivation,
    nn.Embedding,
    nn.Linear,
    nn.ModuleList,
}


class FusedBody:
    """The layers of a model, with the weights that it has now, and its last norm."""

    def __init__(self, body: Any, layers: Sequence[Layer], last: Callable[[Tensor], Tensor]) -> None:
        self._embed, self._rotary = body.embed_tokens, body.rotary_emb
        self._layers, self._last = layers, last

    @classmethod
    def folded(cls, body: Any) -> FusedBody:
        floor_D, norm_D = floor(body.norm), lengthened(body.norm)
        return cls(
            body,
            [FoldedLayer.of(layer) for layer in body.layers],
            lambda state_TD: unit(state_TD, floor_D).mul_(norm_D),
        )

    @classmethod
    def faithful(cls, body: Any, packed: PackedLinears) -> FusedBody:
        return cls(body, [FaithfulLayer.of(layer, packed.product) for layer in body.layers], body.norm)

    def __call__(self, id_T: Tensor, position_T: Tensor, decoding: Decoding, packing: Packing | None) -> Tensor:
        """Last hidden states [T, D]; keys and values go where the cache expects them."""
        state_TD = self._embed(id_T)
        cos_T1d, sin_T1d = self._rotary(state_TD, position_T[:, None])
        half = cos_T1d.shape[-1] // 2
        sin_T1d = torch.cat((-sin_T1d[..., :half], sin_T1d[..., half:]), dim=-1)
        for place, layer in enumerate(self._layers):
            # In the modules' shapes: each token is a sequence of its own.
            query, key, value = (states[:, :, None] for states in layer.heads(state_TD, cos_T1d, sin_T1d))
            decoding.cache.update(key, value, place)
            scaling = layer.attention.scaling
            said, _ = packed_attention(
                layer.attention, query, key, value, None, scaling=scaling, packing=packing, decoding=decoding
            )
            state_TD = layer.fed(layer.attended(state_TD, said.reshape(len(id_T), -1)))
        return self._last(state_TD)


def fused_body(model: PreTrainedModel, packed: PackedLinears | None) -> FusedBody | None:
    """For a dense Qwen3 on a CPU that is nothing but its own modules, and is small or has ``packed`` products."""
    body: Any = model.get_decoder()
    if model.device.type != "cpu" or not _is_plain(body, model.dtype):
        return None
    if model.dtype == torch.float32 and sum(part.numel() for part in body.layers.parameters()) <= FOLDED_PARAMETERS:
        return FusedBody.folded(body)
    return None if packed is None else FusedBody.faithful(body, packed)


def _is_plain(body: Any, dtype: torch.dtype) -> bool:
    """Whether the modules are Qwen3's own, nobody watches or replaces what they do, and all of it is in ``dtype``."""
    modules = list(body.modules())
    return (
        all(type(module) in KNOWN and "forward" not in module.__dict__ for module in modules)
        and not any(
            module._forward_hooks or module._forward_pre_hooks for module in modules if module is not body.embed_tokens
        )
        and not any(isinstance(module, nn.Linear) and module.bias is not None for module in modules)
        and all(parameter.dtype == dtype for parameter in body.parameters())
    )
