"""A Qwen3 layer in fewer operations, in two ways: for ``distill.fused_body``, which says when and why.

Legend: T tokens of a pass, each a row of its own; D the model's width, d a head's; H heads, queries before keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from distill.packed_linears import Product


class Layer(Protocol):
    """What a layer does before its attention and after it."""

    @property
    def attention(self) -> Any:
        """transformers' module, which knows its place and its scaling."""
        ...

    def heads(self, state_TD: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [T, heads, d], the first two rotated.

        A head's halves are exchanged as they are: the sign that one of them changes is the sine's.
        """
        ...

    def attended(self, state_TD: Tensor, said_TO: Tensor) -> Tensor:
        """The states [T, D] behind the attention, whose heads said ``said_TO``."""
        ...

    def fed(self, state_TD: Tensor) -> Tensor:
        """The states [T, D] behind the layer."""
        ...


def num_heads(attention: Any) -> tuple[int, int]:
    """Of queries and of keys."""
    num_queries, num_keys = (
        projection.out_features // attention.head_dim for projection in (attention.q_proj, attention.k_proj)
    )
    return num_queries, num_keys


def head_norm(attention: Any) -> Tensor:
    """The weights [H, d] that multiply normalised queries and keys."""
    num_queries, num_keys = num_heads(attention)
    return torch.cat((attention.q_norm.weight.expand(num_queries, -1), attention.k_norm.weight.expand(num_keys, -1)))


@dataclass(frozen=True, slots=True)
class FoldedLayer:
    """A layer whose norms' weights are part of the products behind them, and whose products that read the same are one.

    Its matrices, [inputs, outputs], are copies. What multiplies normalised states holds the norm's weight, times the
    root of the width: ``unit`` leaves it out.
    """

    attention: Any
    num_queries: int
    num_keys: int
    query_key_value: Tensor
    head_norm_Hd: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    floor_D: Tensor
    floor_d: Tensor

    @classmethod
    def of(cls, layer: Any) -> FoldedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention,
            *num_heads(attention),
            _behind(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
            head_norm(attention) * math.sqrt(attention.head_dim),
            attention.o_proj.weight.t(),
            _behind(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
            mlp.down_proj.weight.t(),
            floor(layer.input_layernorm),
            floor(attention.q_norm),
        )

    def heads(self, state_TD: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_normed, width = self.head_norm_Hd.shape
        heads_THd = torch.mm(unit(state_TD, self.floor_D), self.query_key_value).view(len(state_TD), -1, width)
        normed_THd = unit(heads_THd[:, :num_normed], self.floor_d).mul_(self.head_norm_Hd)
        turned_THd = torch.addcmul(normed_THd * cos_T1d, normed_THd.roll(width // 2, -1), sin_T1d)
        query_THd, key_THd = turned_THd.split((self.num_queries, self.num_keys), dim=1)
        return query_THd, key_THd, heads_THd[:, num_normed:]

    def attended(self, state_TD: Tensor, said_TO: Tensor) -> Tensor:
        return torch.addmm(state_TD, said_TO, self.output)

    def fed(self, state_TD: Tensor) -> Tensor:
        gate, up = torch.mm(unit(state_TD, self.floor_D), self.gate_up).chunk(2, dim=1)
        return torch.addmm(state_TD, F.silu(gate).mul_(up), self.down)


def _behind(norm: Qwen3RMSNorm, *projections: nn.Linear) -> Tensor:
    """The matrix [D, outputs] of ``projections`` that read what ``norm`` gives."""
    return (torch.cat([projection.weight for projection in projections]) * lengthened(norm)).t()


def lengthened(norm: Qwen3RMSNorm) -> Tensor:
    """A norm's weight, by which what ``unit`` gives is multiplied."""
    weight: Tensor = norm.weight
    return weight * math.sqrt(len(weight))


def floor(norm: Qwen3RMSNorm) -> Tensor:
    """A root of a mean of squares plus epsilon, times the width's root, is the hypotenuse of the length and this."""
    return torch.tensor(math.sqrt(len(norm.weight) * norm.variance_epsilon))


def unit(x: Tensor, floor: Tensor) -> Tensor:
    """``x`` divided by its length in the last dimension, or by a little more where it is near ``floor``."""
    return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor))


@dataclass(frozen=True, slots=True)
class FaithfulLayer:
    """A layer whose operations round where transformers' round: to the bit that of the modules with these products."""

    attention: Any
    num_queries: int
    num_keys: int
    query: Product
    key: Product
    value: Product
    output: Product
    gate: Product
    up: Product
    down: Product
    norm: Qwen3RMSNorm
    head_norm_Hd: Tensor
    mlp_norm: Qwen3RMSNorm

    @classmethod
    def of(cls, layer: Any, product: Callable[[nn.Linear], Product]) -> FaithfulLayer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention,
            *num_heads(attention),
            query=product(attention.q_proj),
            key=product(attention.k_proj),
            value=product(attention.v_proj),
            output=product(attention.o_proj),
            gate=product(mlp.gate_proj),
            up=product(mlp.up_proj),
            down=product(mlp.down_proj),
            norm=layer.input_layernorm,
            head_norm_Hd=head_norm(attention),
            mlp_norm=layer.post_attention_layernorm,
        )

    def heads(self, state_TD: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normal_TD = normalised(state_TD, self.norm.weight, self.norm.variance_epsilon)
        width = self.head_norm_Hd.shape[1]
        heads_THd = torch.cat((self.query(normal_TD), self.key(normal_TD)), dim=1).view(len(state_TD), -1, width)
        normed_THd = normalised(heads_THd, self.head_norm_Hd, self.attention.q_norm.variance_epsilon)
        turned_THd = (normed_THd * cos_T1d).add_(normed_THd.roll(width // 2, -1).mul_(sin_T1d))
        query_THd, key_THd = turned_THd.split((self.num_queries, self.num_keys), dim=1)
        return query_THd, key_THd, self.value(normal_TD).view(len(state_TD), -1, width)

    def attended(self, state_TD: Tensor, said_TO: Tensor) -> Tensor:
        return self.output(said_TO).add_(state_TD)

    def fed(self, state_TD: Tensor) -> Tensor:
        normal_TD = normalised(state_TD, self.mlp_norm.weight, self.mlp_norm.variance_epsilon)
        return self.down(F.silu(self.gate(normal_TD)).mul_(self.up(normal_TD))).add_(state_TD)


def normalised(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """What ``Qwen3RMSNorm`` gives: rounded before it is multiplied by the weight, and behind."""
    exact = x.float()
    scale = exact.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (exact * scale).to(x.dtype).mul_(weight)
