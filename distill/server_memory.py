"""How much memory a GPU of a teacher's vLLM server needs, and how many responses that leaves room for.

Bytes of one of the tp x pp GPUs of a server, for a teacher of N parameters, L layers, width d, a vocabulary of V rows:

    weights        b N / (tp pp); fp8 is 1 byte a parameter but for embedding and head, which stay in 16 bits
    KV cache       2 b L/pp max(1, kv_heads/tp) head_dim a token; vLLM gives it all that is left, and one of the longest
                   sequences has to fit
    activations    a layer's working set for the tokens of one pass (``PASS_TOKENS``), cut over tp
    logits         who speaks: 2 x 4 V for each of ``NUM_LOGITS`` responses (fp32, and a sorted copy)
    hidden states  who judges: b d for each token under way

vLLM takes ``USABLE`` of a GPU. The rest is the CUDA context and what other processes hold. Sources: vLLM 0.32 for the
share, the cut of vocabulary and heads (``distill.vllm.cuts``) and the cache's layout; arXiv 2309.06180, section 3, for
what a token's keys and values take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from distill.config import RunConfig
from distill.family import Shape
from distill.memory import cache_bytes, layer_bytes, longest_sequence

USABLE = 0.92
"""vLLM's gpu_memory_utilization where nobody sets it."""

PASS_TOKENS = 8192
"""Most tokens in a pass of a server (max_num_batched_tokens of large GPUs)."""

NUM_LOGITS = 256
"""Responses whose logits are made at once (max_num_seqs)."""

GRAPH_BYTES = 2 * 10**9
"""CUDA graphs and NCCL's buffers of a server."""

Bytes = Literal[1, 2, 4]
"""Of a weight: fp8, bf16, fp32."""


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """Bytes of one GPU, by part; the cache is what is left, in ``cache_tokens`` tokens of one server."""

    parts: dict[str, int]
    room: int
    """What is left for the cache; negative where the rest alone does not fit."""
    token_bytes: int
    """Of keys and values on one GPU."""

    @property
    def has(self) -> int:
        """Bytes that it may take."""
        return sum(self.parts.values()) + self.room

    @property
    def cache_tokens(self) -> int:
        return max(0, self.room) // self.token_bytes

    def fits(self, longest: int) -> bool:
        """Whether a sequence of ``longest`` tokens can be worked on."""
        return self.room >= longest * self.token_bytes

    def least(self, longest: int) -> int:
        """Bytes without which nothing works."""
        return sum(self.parts.values()) + longest * self.token_bytes

    def slots(self, tokens: float, most: int) -> int:
        """Sequences of ``tokens`` that are worked on at once."""
        return max(1, min(most, int(self.cache_tokens // max(1.0, tokens))))


def weight_bytes(shape: Shape, item: Bytes) -> int:
    """Of all weights."""
    if item > 1:
        return item * shape.total_parameters
    embeddings = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    return shape.total_parameters + embeddings


def cpu_cache_gib(token_bytes: int, longest: int) -> int:
    """What a server on a CPU is given for keys and values: of eight of the longest sequences, between 1 and 32 GiB."""
    return min(32, max(1, math.ceil(8 * longest * token_bytes / 2**30)))


def server_memory(
    shape: Shape,
    role: Literal["generate", "score"],
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    item: Bytes,
    gpu_bytes: int,
    tokens_under_way: int,
    on_gpu: bool = True,
) -> ServerMemory:
    """One GPU of one server. ``tokens_under_way`` are those that a client asks about at once."""
    computed = 4 if item == 4 else 2
    layers = -(-shape.num_layers // pipeline_parallel)
    held = replace(shape, num_layers=layers, num_kv_heads=max(1, shape.num_kv_heads // tensor_parallel))
    parts = {
        "weights": weight_bytes(shape, item) // (tensor_parallel * pipeline_parallel),
        "activations": PASS_TOKENS * layer_bytes(shape, computed) // tensor_parallel,
        "logits": 8 * NUM_LOGITS * shape.vocabulary if role == "generate" else 0,
        "hidden states": computed * shape.width * tokens_under_way if role == "score" else 0,
        "graphs": GRAPH_BYTES if on_gpu else 0,
    }
    usable = int(USABLE * gpu_bytes) if on_gpu else gpu_bytes
    return ServerMemory(parts, usable - sum(parts.values()), cache_bytes(held, computed))


def student_server(config: RunConfig, shape: Shape, *, room: int, on_gpu: bool) -> ServerMemory:
    """The vLLM that speaks for the student, whole on one device, of which it has ``room`` bytes."""
    held = server_memory(
        shape,
        "generate",
        tensor_parallel=1,
        pipeline_parallel=1,
        item=2 if config.student.dtype == "bfloat16" else 4,
        gpu_bytes=0,
        tokens_under_way=0,
        on_gpu=on_gpu,
    )
    left = room - sum(held.parts.values())
    if not on_gpu:
        left = min(left, cpu_cache_gib(held.token_bytes, longest_sequence(config) + 1) * 2**30)
    return replace(held, room=left)


def least_of_student_server(config: RunConfig, shape: Shape, *, on_gpu: bool) -> int:
    """Bytes without which it does not start: on a CPU with its whole cache, on a GPU with the longest sequence's."""
    held, longest = student_server(config, shape, room=2**62, on_gpu=on_gpu), longest_sequence(config) + 1
    return held.least(longest) if on_gpu else sum(held.parts.values()) + held.room
