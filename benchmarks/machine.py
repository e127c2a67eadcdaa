"""What the benchmarks share: models of a shape with random weights, clocks, and what a machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill.device import finish
from distill.family import Shape


def random_model(
    shape: Shape,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Qwen3ForCausalLM:
    """A dense Qwen3 of ``shape``; ``options`` go to its configuration."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        **options,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model: Qwen3ForCausalLM = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    return model


def median_seconds(work: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Of ``repeats`` calls after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        finish(torch.device(device))
        started = time.perf_counter()
        work()
        finish(torch.device(device))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def ceilings(device: str, dtype: torch.dtype, *, width: int = 8192, copied: int = 2**30) -> dict[str, float]:
    """What a large product and a large copy reach: 10^12 FLOP/s, and 10^9 bytes a second, read and written together."""
    x, y = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = (median_seconds(work, 10, device) for work in (lambda: x @ y, lambda: target.copy_(source)))
    return {"tflops": 2 * width**3 / product / 1e12, "gigabytes_per_second": 2 * copied / copy / 1e9}
