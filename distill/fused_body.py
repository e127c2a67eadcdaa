"""A small dense Qwen3 in fewer operations, for decoding on a CPU.

A pass over one new token of each row does so little arithmetic in a small model that its time is that of asking for
operations: a hundred a layer in transformers' modules, views included, and fifty here. Products that read the same
states are one product with their matrices beside each other, a norm's weight is part of the product behind it, and
queries and keys are normalised and rotated together. It is the same arithmetic up to rounding in float32, and for
nothing else: in 16 bits transformers rounds at places of its own, which are the trainer's.

The matrices are copies, made for one call of the sampler. They cost as many bytes as the layers, so that larger models,
whose time is in their products anyway, are left to their modules; so is every model with a module that is not plain
Qwen3 (adapters, experts, shards) or that somebody watches by a hook.

Legend: T tokens of a pass, each a row of its own; D the model's width, d a head's; H heads, queries before keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from distill.attention import Packing, packed_attention
from distill.kv_cache import Decoding

MOST_PARAMETERS = 20_000_000
"""Of the layers. Calls of 8 and 32 rows take 1.3 to 1.6 times as long through the modules with up to 5 million, 1.0 to
1.2 times with 25 million, and less than here with 85 million and more."""

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


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's matrices, [inputs, outputs], and its heads.

    What multiplies normalised states holds the norm's weight, times the root of the width: ``_unit`` leaves it out.
    """

    attention: Any
    num_queries: int
    num_keys: int
    query_key_value: Tensor
    head_norm_Hd: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        num_queries, num_keys = (
            projection.out_features // attention.head_dim for projection in (attention.q_proj, attention.k_proj)
        )
        head_norm_Hd = torch.cat(
            (attention.q_norm.weight.expand(num_queries, -1), attention.k_norm.weight.expand(num_keys, -1))
        )
        return cls(
            attention,
            num_queries,
            num_keys,
            _behind(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
            head_norm_Hd * math.sqrt(attention.head_dim),
            attention.o_proj.weight.t(),
            _behind(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
            mlp.down_proj.weight.t(),
        )


def _behind(norm: qwen3.Qwen3RMSNorm, *projections: nn.Linear) -> Tensor:
    """The matrix [D, outputs] of ``projections`` that read what ``norm`` gives."""
    weight_D = norm.weight * math.sqrt(len(norm.weight))
    return (torch.cat([projection.weight for projection in projections]) * weight_D).t()


class FusedBody:
    """The layers of a model, with the weights that it has now."""

    def __init__(self, body: Any) -> None:
        self._embed, self._rotary = body.embed_tokens, body.rotary_emb
        self._layers = [_Layer.of(layer) for layer in body.layers]
        self._norm_D = body.norm.weight * math.sqrt(len(body.norm.weight))
        # A root of a mean of squares plus epsilon, times the width's root, is the hypotenuse of the length and this.
        epsilon = body.config.rms_norm_eps
        self._floor_D, self._floor_d = (
            torch.tensor(math.sqrt(width * epsilon)) for width in (len(self._norm_D), body.layers[0].self_attn.head_dim)
        )

    def __call__(self, id_T: Tensor, position_T: Tensor, decoding: Decoding, packing: Packing | None) -> Tensor:
        """Last hidden states [T, D]; keys and values go where the cache expects them."""
        state_TD = self._embed(id_T)
        cos_T1d, sin_T1d = self._rotary(state_TD, position_T[:, None])
        half = cos_T1d.shape[-1] // 2
        # The halves are exchanged as they are: the sign that one of them changes is the sine's.
        sin_T1d = torch.cat((-sin_T1d[..., :half], sin_T1d[..., half:]), dim=-1)
        for place, layer in enumerate(self._layers):
            num_normed, width = layer.head_norm_Hd.shape
            heads_THd = torch.mm(_unit(state_TD, self._floor_D), layer.query_key_value).view(len(id_T), -1, width)
            normed_THd = _unit(heads_THd[:, :num_normed], self._floor_d).mul_(layer.head_norm_Hd)
            turned_THd = torch.addcmul(normed_THd * cos_T1d, normed_THd.roll(half, -1), sin_T1d)
            # In the modules' shapes: each token is a sequence of its own.
            query, key = turned_THd[:, :, None].split((layer.num_queries, layer.num_keys), dim=1)
            value = heads_THd[:, num_normed:, None]
            decoding.cache.update(key, value, place)
            scaling = layer.attention.scaling
            said, _ = packed_attention(
                layer.attention, query, key, value, None, scaling=scaling, packing=packing, decoding=decoding
            )
            state_TD = torch.addmm(state_TD, said.reshape(len(id_T), -1), layer.output)
            gate, up = torch.mm(_unit(state_TD, self._floor_D), layer.gate_up).chunk(2, dim=1)
            state_TD = torch.addmm(state_TD, F.silu(gate).mul_(up), layer.down)
        return _unit(state_TD, self._floor_D).mul_(self._norm_D)


def _unit(x: Tensor, floor: Tensor) -> Tensor:
    """``x`` divided by its length in the last dimension, or by a little more where it is near ``floor``."""
    return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor))


def fused_body(model: PreTrainedModel) -> FusedBody | None:
    """For a small dense Qwen3 in float32 on a CPU that is nothing but its own modules."""
    body: Any = model.get_decoder()
    modules = list(body.modules())
    if (
        model.device.type != "cpu"
        or model.dtype != torch.float32
        or any(type(module) not in KNOWN for module in modules)
        or any(
            module._forward_hooks or module._forward_pre_hooks for module in modules if module is not body.embed_tokens
        )
        or any(isinstance(module, nn.Linear) and module.bias is not None for module in modules)
        or sum(parameter.numel() for parameter in body.layers.parameters()) > MOST_PARAMETERS
    ):
        return None
    return FusedBody(body)
