"""How a model may be cut over GPUs: rules of vLLM's layers, for whoever starts a server and whoever plans one.

``config`` is the model's own (transformers' words). This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.errors import UserError
from distill.family import Shape

VOCABULARY_BLOCK = 64
"""vLLM fills a vocabulary up to a multiple of this before it is cut."""

_QUANTISED_BLOCKS = {"fp8_per_block": 128}  # vLLM's names for quantising in blocks while loading, and their width


def check_cut(
    name: str,
    shape: Shape,
    config: Mapping[str, Any],
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    quantization: str | None = None,
) -> None:
    """Raise UserError, with a size that works, where the model cannot be cut over that many GPUs."""
    size = tensor_parallel
    if shape.num_heads % size:
        raise UserError(
            f"{name} has {shape.num_heads} attention heads, which {size} GPUs cannot share evenly; take "
            f"{_below(size, shape.num_heads)} (--tp, or teacher.tensor_parallel of a run)"
        )
    few, many = sorted((shape.num_kv_heads, size))
    if many % few:
        raise UserError(
            f"{name} has {shape.num_kv_heads} heads of keys and values, which {size} GPUs cannot share evenly; take "
            f"{_below(size, shape.num_kv_heads)} (--tp, or teacher.tensor_parallel of a run)"
        )
    rows = padded_vocabulary(shape.vocabulary)
    if rows % size:
        raise UserError(
            f"{name} has {rows} vocabulary rows, which {size} GPUs cannot share evenly; take {_below(size, rows)} "
            f"(--tp, or teacher.tensor_parallel of a run)"
        )
    if pipeline_parallel > shape.num_layers:
        raise UserError(
            f"{name} has {shape.num_layers} layers, which make no {pipeline_parallel} groups "
            f"(--pp, or teacher.pipeline_parallel of a run)"
        )
    block, width = quantised_block(config, quantization), config.get("intermediate_size", 0)
    if block and not shape.num_experts and width % (size * block):
        raise UserError(
            f"{size} GPUs would cut the {width} rows of {name}'s feed-forward layers inside a block of {block} "
            f"that shares one scale; take {_below(size, width // block)} (--tp, or teacher.tensor_parallel of a "
            f"run)"
        )


def padded_vocabulary(rows: int) -> int:
    """Vocabulary rows as vLLM holds them."""
    return -(-rows // VOCABULARY_BLOCK) * VOCABULARY_BLOCK


def quantised_block(config: Mapping[str, Any], quantization: str | None = None) -> int | None:
    """Rows of a weight that share one scale, where the checkpoint or vLLM's ``quantization`` works in blocks."""
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    return int(block[0]) if block else _QUANTISED_BLOCKS.get(quantization or "")


def needs_expert_parallel(config: Mapping[str, Any], tensor_parallel: int, quantization: str | None = None) -> bool:
    """Whether block-quantised experts cannot be cut into ``tensor_parallel`` slices of whole blocks.

    Qwen3-235B-A22B-FP8 on eight GPUs: 1536 / 8 = 192 is no multiple of 128; whole experts on each GPU fit.
    """
    block, width = quantised_block(config, quantization), config.get("moe_intermediate_size")
    return bool(block and width and tensor_parallel > 1 and width % (tensor_parallel * block))


def _below(size: int, whole: int) -> int:
    """The largest number below ``size`` that divides ``whole``."""
    return next(number for number in range(size - 1, 0, -1) if whole % number == 0)
