"""New weights for a vLLM server on a CPU: what vLLM's own worker is extended with.

vLLM 0.32's ``reload_weights`` leaves wrong weights there without a word: a linear layer keeps a packed copy, and its
own ``weight`` is emptied. Here each layer's weight is set anew and packed again, the way vLLM does it after loading;
whoever sent it gets fingerprints of what the layers were given.

This module is imported by the server's process (``--worker-extension-cls``), not by ours, and imports nothing of ours.
Left out: layers cut over several workers, experts, and quantised layers; each raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class WeightsFromFile:
    """Mixed into vLLM's worker; its method is called through /collective_rpc."""

    def take_weights(self, path: str) -> dict[str, str]:
        """Replace every weight of the model by those of a safetensors file with the names of a plain checkpoint.

        What is returned are the fingerprints of ``set_weights``.
        """
        worker: Any = self
        return set_weights(worker.get_model(), load_file(path))


def fingerprint(value: Tensor) -> str:
    """Equal for equal numbers, in float32 and in whatever float32 holds exactly."""
    # A copy: memory that numpy has seen cannot be resized any more, which FSDP2 does to what it has gathered.
    copy = value.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    data: Any = copy.view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


@torch.no_grad()
def set_weights(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprint of each of ``tensors`` as the model's layers hold it, by name.

    It is taken behind all that is done to a weight (cast, put together with others, copied into a table), and before a
    linear layer packs it: what is packed cannot be read. Raises RuntimeError where ``tensors`` are not the model's
    weights, each of them exactly, or where two layers that share one hold different numbers.
    """
    held: dict[str, str] = {}
    for path, module in model.named_modules():
        for own in [name for name, _ in module.named_parameters(recurse=False)]:
            sources = _sources(model, path, own)
            missing = [name for name in sources if name not in tensors]
            if missing:
                raise RuntimeError(f"no weight for {missing[0]}")
            parts = [tensors[name] for name in sources]
            whole = _set(module, f"{path}.{own}", torch.cat(parts))
            for name, part in zip(sources, whole.split([len(part) for part in parts]), strict=True):
                found = fingerprint(part)
                if held.setdefault(name, found) != found:
                    raise RuntimeError(f"two layers hold different numbers as {name}")
    left = set(tensors) - set(held)
    if left:
        raise RuntimeError(f"{len(left)} weights have no place in the model, {min(left)} among them")
    return held


def _sources(model: Any, path: str, own: str) -> list[str]:
    """Names in a plain checkpoint of what parameter ``own`` of the module at ``path`` is put together from."""
    parent, _, last = path.rpartition(".")
    if path == "lm_head" and model.config.tie_word_embeddings:
        return [f"model.embed_tokens.{own}"]
    return [f"{parent}.{part}.{own}" for part in model.packed_modules_mapping.get(last, [])] or [f"{path}.{own}"]


def _set(module: Any, path: str, value: Tensor) -> Tensor:
    """Gives ``module`` the weight at ``path``, its only parameter; what it holds of it then, before it is packed."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    held: nn.Parameter = module.get_parameter(path.rpartition(".")[2])
    is_linear, is_table = isinstance(module, LinearBase), isinstance(module, VocabParallelEmbedding)
    # A linear layer's weight is emptied; a table's rows are padded to a multiple, and the padding stays as it is.
    rows = module.output_size if is_linear else module.org_vocab_size if is_table else held.shape[0]
    shape = (rows, module.input_size) if is_linear else (rows, *held.shape[1:])
    if tuple(value.shape) != shape:
        raise RuntimeError(f"{path} is {tuple(value.shape)} and should be {shape}")
    if is_linear:
        if module.tp_size != 1:
            raise RuntimeError(f"{path} is cut over {module.tp_size} workers")
        weight = nn.Parameter(value.to(held.dtype).contiguous(), requires_grad=False)
        module.weight = weight
        dispatch_cpu_unquantized_gemm(module, remove_weight=True)
        return weight
    held[:rows].copy_(value)
    if is_table:
        dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    return held[:rows]
