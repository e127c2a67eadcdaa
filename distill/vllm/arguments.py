"""Which of the arguments that a user gives vLLM may change what the model says, by their names.

The list is of those that cannot: memory, scheduling, devices, logs. An argument that is not on it counts as one that
does, so that one nobody has thought of here costs a second generation and never gives another model's responses.
"""

from __future__ import annotations

from collections.abc import Sequence

HARMLESS = frozenset(
    (
        *("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--cpu-offload-gb", "--block-size"),
        *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--max-num-partial-prefills"),
        *("--enable-chunked-prefill", "--no-enable-chunked-prefill", "--async-scheduling", "--no-async-scheduling"),
        *("--enable-prefix-caching", "--no-enable-prefix-caching", "--enforce-eager", "--no-enforce-eager"),
        *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"),
        *("--enable-expert-parallel", "--distributed-executor-backend", "--disable-custom-all-reduce"),
        *("--max-parallel-loading-workers", "--download-dir", "--max-logprobs", "--enable-scale-out"),
        *("--api-server-count", "--uvicorn-log-level", "--enable-log-requests", "--disable-log-stats", "--root-path"),
    )
)


def changing(words: Sequence[str]) -> list[str]:
    """Those of ``words``, each with its value, that may change what a model says; in the order of their names."""
    arguments: list[str] = []
    for word in words:
        if word.startswith("-") or not arguments:
            name, equals, value = word.partition("=")
            # vLLM's parser takes underscores for dashes.
            arguments.append(f"{name.replace('_', '-')}{' ' * bool(equals)}{value}")
        else:
            arguments[-1] += f" {word}"
    changes = [argument for argument in arguments if _name(argument) not in HARMLESS]
    return sorted(changes, key=_name)  # of the same name the last one holds


def _name(argument: str) -> str:
    return argument.partition(" ")[0]
