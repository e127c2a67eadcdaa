"""Which weights of a student LoRA adapters can be laid over, and how many parameters they have: as peft does it.

A name stands for every layer whose path ends in it. transformers 5 holds the experts of a mixture's layer as two
stacked tensors, which peft adapts by the names that the experts' own layers had: gate and up are one of the two, at
twice the rank, and neither they nor the router can be told apart by layer (peft 0.21,
``peft.utils.transformers_weight_conversion``). Left out on purpose: the head. A loss makes logits of the head's own
weight, tile by tile, and adapters beside it would not be felt.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache

from distill.errors import UserError
from distill.family import Shape
from distill.model_config import LoraSettings, StudentSettings

_EMBEDDING = "model.embed_tokens"
_HEAD = "lm_head"
_KEY = "student.lora.target_modules"


@cache
def adaptable(shape: Shape) -> Mapping[str, int]:
    """The parameters that an adapter of rank 1 has, by the path of what it is laid over."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    width, wide, experts = shape.width, shape.mlp_width, shape.num_experts
    layer = {
        "self_attn.q_proj": width + queries,
        "self_attn.k_proj": width + keys,
        "self_attn.v_proj": width + keys,
        "self_attn.o_proj": queries + width,
    }
    if experts:
        layer |= {
            # Together 2 * experts * (width + 2 * wide): one adapter of twice the rank over the two.
            "mlp.experts.gate_proj": experts * (width + 2 * wide),
            "mlp.experts.up_proj": experts * (width + 2 * wide),
            "mlp.experts.down_proj": experts * (wide + width),
            "mlp.gate": width + experts,
        }
    else:
        layer |= {f"mlp.{name}": width + wide for name in ("gate_proj", "up_proj", "down_proj")}
    found = {f"model.layers.{place}.{name}": size for place in range(shape.num_layers) for name, size in layer.items()}
    return found if shape.tied else {_EMBEDDING: shape.vocabulary + width, **found}


def adapted(lora: LoraSettings, shape: Shape) -> set[str]:
    """The paths of what ``lora`` lays adapters over.

    Raises UserError for names that match nothing, for the head and what is tied to it, and for what peft cannot do to
    a mixture of experts.
    """
    known = adaptable(shape)
    if lora.target_modules == "all-linear":
        found = set(known) - {_EMBEDDING}
    else:
        if not lora.target_modules:
            raise UserError(f"{_KEY} is empty; name {_names(shape)}, or set it to all-linear")
        found = set().union(*(_matches(name, shape) for name in lora.target_modules))
    of_experts = [path for path in known if path in found and ".mlp." in path] if shape.num_experts else []
    if of_experts and lora.dropout:
        raise UserError(
            f"student.lora.dropout is {lora.dropout}, and peft has none for adapters of a mixture's experts and "
            f"router; set it to 0, or {_KEY} to [q_proj, k_proj, v_proj, o_proj]"
        )
    halves = {path.rpartition(".")[2] for path in of_experts} & {"gate_proj", "up_proj"}
    if len(halves) == 1:
        missing = "up_proj" if "gate_proj" in halves else "gate_proj"
        raise UserError(
            f"{_KEY} has {halves.pop()} without {missing}, and a mixture's experts hold the two as one; name both"
        )
    return found


def check_adapters(student: StudentSettings, shape: Shape | None) -> None:
    """Raises UserError where ``adapted`` does; a student of a ``shape`` that is not known yet is left for later."""
    if student.lora is not None and shape is not None:
        adapted(student.lora, shape)


def adapter_parameters(shape: Shape, lora: LoraSettings) -> int:
    """How many are trained. Raises UserError as ``adapted``."""
    known = adaptable(shape)
    return lora.rank * sum(known[path] for path in adapted(lora, shape))


def _matches(name: str, shape: Shape) -> set[str]:
    """The paths that one of the names stands for."""
    if name == _HEAD:
        raise UserError(
            f"{_KEY} has {name}, the student's head, and a loss makes logits of the head's own weight; leave it out, "
            "or train every weight (student.lora=null)"
        )
    if shape.tied and _is_end(name, _EMBEDDING):
        raise UserError(
            f"{_KEY} has {name}, and this student's embedding is its head too, which adapters cannot be laid over; "
            "leave it out, or train every weight (student.lora=null)"
        )
    found = {path for path in adaptable(shape) if _is_end(name, path)}
    if not found:
        near = difflib.get_close_matches(name.rpartition(".")[2], sorted(_leaves(shape)), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{_KEY} has {name!r}, and nothing that adapters can be laid over is called so in this student; {meant}"
            f"name {_names(shape)}, or set it to all-linear"
        )
    if shape.num_experts and len(found) < shape.num_layers and any(".mlp." in path for path in found):
        raise UserError(
            f"{_KEY} has {name}, of one layer, and peft adapts the experts and routers of all layers or none; write "
            f"{name.rpartition('.')[2]}"
        )
    return found


def _is_end(name: str, path: str) -> bool:
    return name == path or path.endswith(f".{name}")


def _leaves(shape: Shape) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in adaptable(shape)))


def _names(shape: Shape) -> str:
    return "some of " + ", ".join(_leaves(shape))
