"""A larger model's products, with weights that are put in order for them once a call of the sampler, on a CPU.

A matrix product takes its matrices as they lie and puts them in order for its kernels every time, which costs more
than the arithmetic where there are few rows: decoding has one row for each response. oneDNN can be given a weight that
is in order already (docs/sampling.md has the times). The products are the same: to the bit in bfloat16 as far as was
seen, to rounding in float32, where torch takes another library.

The weights in order are copies, so that the largest models are decoded as they are.

Legend: T rows; I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from distill.memory import COPIED_BYTES

Product = Callable[[Tensor], Tensor]
"""[..., I] -> [..., O]"""

PACKED_FROM = 20_000_000
"""Parameters. A call of oneDNN costs some 10 microseconds more than one of a BLAS, which smaller models would feel."""

# Not in torch's documentation: its compiler calls these where it freezes a model's weights on a CPU
# (torch/_inductor/mkldnn_lowerings.py). The tests hold them against plain products.
_onednn: Any = torch.ops.mkldnn


class PackedLinears:
    """The linear layers ``linears``, with the weights that they have now."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self._products = {linear: _product(linear) for linear in linears}

    def product(self, linear: nn.Linear) -> Product:
        """A layer's by itself."""
        return self._products[linear]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the layers make their products with the ordered weights. There is no gradient through them."""
        try:
            for linear, product in self._products.items():
                # What an instance has goes before what its class has. nn.Module's own way of setting it is slower.
                linear.__dict__["forward"] = product
            yield
        finally:
            for linear in self._products:
                linear.__dict__.pop("forward", None)


def _product(linear: nn.Linear) -> Product:
    return partial(_apply, _onednn._reorder_linear_weight(linear.weight.detach()), linear.bias)


def _apply(weight: Tensor, bias_O: Tensor | None, x: Tensor) -> Tensor:
    product: Tensor = _onednn._linear_pointwise(x, weight, bias_O, "none", [], "")
    return product


def packed_linears(model: PreTrainedModel) -> PackedLinears | None:
    """For a dense model on a CPU that is neither too small nor too large, and whole. Adapters are linear layers too."""
    if model.device.type != "cpu" or not _can_pack(model.dtype) or hasattr(model.config, "num_experts_per_tok"):
        return None
    modules = list(model.modules())
    linears = [
        module
        for module in modules
        if type(module) is nn.Linear and module.weight.dtype == model.dtype and "forward" not in module.__dict__
    ]
    num_parameters = sum(linear.weight.numel() for linear in linears)
    if (
        num_parameters < PACKED_FROM
        or num_parameters * model.dtype.itemsize > COPIED_BYTES
        or any(isinstance(module, FSDPModule) for module in modules)
    ):
        return None
    return PackedLinears(linears)


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether torch and the processor have oneDNN's products of this type."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(_onednn._is_mkldnn_bf16_supported()))
