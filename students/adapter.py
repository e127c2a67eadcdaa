"""The student's LoRA adapters: laid over its model, and as vLLM 0.32 serves them apart from the weights.

DoRA, biases and whole modules beside the adapters cannot be served either; a student has none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.model_config import LoraSettings
from students.handover import filling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``."""
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""A dense layer's linear modules: what all-linear means."""


def with_lora(model: PreTrainedModel, settings: LoraSettings) -> Any:
    """peft's model around ``model``, whose linear modules now carry adapters."""
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        ),
    )


def why_not_served(lora: LoraSettings | None, num_experts: int, *, dtype: str, on_gpu: bool) -> str | None:
    """Why vLLM cannot be given such a student's adapters by themselves; None where it can."""
    if lora is None:
        return "the student has none (student.lora is null)"
    if on_gpu and dtype == "float32":
        return "vLLM's kernels for adapters on a GPU take 16 bits and student.dtype is float32"
    if num_experts:
        return "the student is a mixture of experts"
    if lora.rank > RANKS[-1]:
        return f"vLLM's largest rank is {RANKS[-1]} and student.lora.rank is {lora.rank}"
    named = () if lora.target_modules == "all-linear" else lora.target_modules
    others = [name for name in named if name.rpartition(".")[2] not in MODULES]
    if others:
        return f"student.lora.target_modules has {others[0]}, and those of {', '.join(MODULES)} alone can be"
    return None


def adapter_flags(lora: LoraSettings) -> tuple[str, ...]:
    """What a server is started with to take such adapters."""
    rank = min(rank for rank in RANKS if rank >= lora.rank)
    # Left to itself vLLM wraps the head as well, and a CPU engine then ends at the first prompt log-probability: it
    # takes the rows of a prompt for those of as many requests.
    return ("--enable-lora", "--lora-target-modules", *MODULES, "--max-lora-rank", str(rank))


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the parameter that each one is laid over."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            # Those over several parameters of one module are laid over each other.
            base, name = layer.base_layer, f"{path}.base_layer"
            while isinstance(base, ParamWrapper):
                base, name = base.base_layer, f"{name}.base_layer"
            found[f"{name}.{layer.parameter_name if isinstance(layer, ParamWrapper) else 'weight'}"] = layer
    return found


def merged(weight: Tensor, layer: Any) -> Tensor:
    """``weight`` with what peft's ``layer`` adds to it, to the bit as peft merges it; the weight stays as it is."""
    from peft.tuners.lora.layer import Embedding

    delta = layer.get_delta_weight(layer.active_adapter[0])
    # An embedding's is rounded before it is added, a linear layer's is not.
    total: Tensor = weight + (delta.to(weight.dtype) if isinstance(layer, Embedding) else delta)
    return total.to(weight.dtype)


def write_adapter(adapted: Any, dtype: torch.dtype, folder: Path) -> None:
    """What the ``save_pretrained`` of peft's model ``adapted`` writes, with the tensors in ``dtype``.

    Raises DistillError where the folder has no room for them.
    """
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    with filling(folder, tensors.values()):
        save_file(tensors, folder / "adapter_model.safetensors")
        adapted.peft_config[adapted.active_adapter].save_pretrained(str(folder))
