"""The Qwen3 family: sizes, shapes, and what a short name means.

Shapes are those of the Technical Report (2505.09388), tables 1 and 2, completed by the published configurations.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from distill.errors import UserError

EMBEDDED_TEACHER = "tiny"
EMBEDDED_STUDENTS = ("nano", "nano-moe")
EMBEDDED_NAMES = (EMBEDDED_TEACHER, *EMBEDDED_STUDENTS)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the cost of a forward pass depends on.

    ``mlp_width`` is a dense layer's d_ff, or one expert's; dense models have ``num_experts`` 0.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    mlp_width: int
    vocabulary: int
    tied: bool
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def _attention_matmuls(self) -> int:
        return 2 * self.width * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def active_parameters(self) -> int:
        """Weights that take part in a matrix product for one token, the LM head included, embeddings not."""
        experts = max(1, self.experts_per_token)
        mlp = 3 * self.width * self.mlp_width * experts + self.width * self.num_experts
        return self.num_layers * (self._attention_matmuls + mlp) + self.vocabulary * self.width

    @property
    def total_parameters(self) -> int:
        """All weights: the exact count of the published checkpoints."""
        mlp = 3 * self.width * self.mlp_width * max(1, self.num_experts) + self.width * self.num_experts
        norms = 2 * self.width + 2 * self.head_dim
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.num_layers * (self._attention_matmuls + mlp + norms) + self.width + embeddings

    def forward_flops(self, context: float) -> float:
        """FLOPs of one token's forward pass at a mean context of ``context`` tokens (2 N + 4 L heads head_dim c)."""
        return 2.0 * self.active_parameters + 4.0 * self.num_layers * self.num_heads * self.head_dim * context

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """The shape that a transformers ``config.json`` of a Qwen3 or Qwen3-MoE model describes.

        Raises UserError for any other architecture, and for attention that is not ``distill.attention``'s.
        """
        kind = config.get("model_type")
        if kind not in ("qwen3", "qwen3_moe"):
            raise UserError(
                f"the model is of type {kind!r}; this toolkit distils qwen3 and qwen3_moe models; name another model"
            )
        _check_attention(config)
        moe = kind == "qwen3_moe"
        return cls(
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            width=config["hidden_size"],
            mlp_width=config["moe_intermediate_size" if moe else "intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            # transformers 5 writes num_local_experts where the published Qwen3 files say num_experts.
            num_experts=(config.get("num_experts") or config["num_local_experts"]) if moe else 0,
            experts_per_token=config["num_experts_per_tok"] if moe else 0,
        )


def _check_attention(config: Mapping[str, Any]) -> None:
    """``distill.attention`` lets every token see all that came before it, in training too. Published Qwen3 files name a
    ``sliding_window`` that ``use_sliding_window`` leaves unused."""
    unlike = [kind for kind in config.get("layer_types") or () if kind != "full_attention"]
    if unlike:
        raise UserError(
            f"layer_types has {unlike[0]!r}, and a layer of this toolkit sees the whole sequence; name another model"
        )
    window = config.get("sliding_window", "the default size")
    if config.get("use_sliding_window") and window is not None:
        raise UserError(
            f"use_sliding_window is {config['use_sliding_window']!r} with a sliding_window of {window}, and a layer of "
            f"this toolkit sees the whole sequence; name a copy with false if the model was trained without a window, "
            f"else another model"
        )
    dropout = config.get("attention_dropout")
    if dropout:
        raise UserError(
            f"attention_dropout is {dropout!r}, and this toolkit trains without; name a copy of the model with 0"
        )
    _check_positions(config)


def _check_positions(config: Mapping[str, Any]) -> None:
    """Sequences are read beside others, and these rotations go by the longest sequence of a pass: a response, its
    log-probabilities and what a teacher says of it would depend on the company."""
    # transformers 5 writes rope_parameters; older files and the published ones say rope_scaling, and older ones "type".
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            raise UserError(
                f"{key} is of type {kind!r}, which turns every sequence of a batch by the length of the longest; name "
                f"a copy of the model with yarn, as the Qwen3 model cards have it for long texts, or with none"
            )


def shape_in(config: Any, where: object) -> Shape:
    """The shape that ``config``, read from the file ``where``, describes. Raises UserError for one that has none."""
    if not isinstance(config, Mapping):
        raise UserError(f"{where} holds no object with a model's settings")
    try:
        shape = Shape.from_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where} does not describe a whole model: {error} is missing") from None
    for field in fields(Shape):
        value = getattr(shape, field.name)
        is_zero_fine = field.name in ("num_experts", "experts_per_token")
        if not isinstance(value, int) or value < (0 if is_zero_fine or field.name == "tied" else 1):
            raise UserError(f"{where} gives {value!r} for the model's {field.name}, not a whole number")
    return shape


def _dense(layers: int, heads: int, width: int, mlp_width: int, *, tied: bool) -> Shape:
    return Shape(layers, heads, 8, 128, width, mlp_width, 151936, tied)


def _moe(layers: int, heads: int, width: int, mlp_width: int) -> Shape:
    return Shape(layers, heads, 4, 128, width, mlp_width, 151936, False, num_experts=128, experts_per_token=8)


SIZES: dict[str, Shape] = {
    "0.6B": _dense(28, 16, 1024, 3072, tied=True),
    "1.7B": _dense(28, 16, 2048, 6144, tied=True),
    "4B": _dense(36, 32, 2560, 9728, tied=True),
    "8B": _dense(36, 32, 4096, 12288, tied=False),
    "14B": _dense(40, 40, 5120, 17408, tied=False),
    "32B": _dense(64, 64, 5120, 25600, tied=False),
    "30B-A3B": _moe(48, 32, 2048, 768),
    "235B-A22B": _moe(94, 64, 4096, 1536),
}
SHORT_NAMES = {"30B": "30B-A3B", "235B": "235B-A22B"}
WITHOUT_BASE = ("32B", "235B-A22B")
"""Sizes whose base checkpoint was never published."""

STUDENTS = {
    "0.6B": (32768, 131072),
    "1.7B": (32768, 131072),
    "4B": (32768, 131072),
    "8B": (16384, 65536),
    "14B": (16384, 65536),
    "30B-A3B": (16384, 32768),
}
"""Students of the shipped recipes: sizes that have a base checkpoint, with the tokens of a micro-batch and those of the
sampler's cache that leave room for the rest on 80 GB GPUs (``distill.memory``)."""
TEACHERS = {"32B": 2, "30B-A3B": 1, "235B-A22B": 8}
"""Teachers of the shipped recipes, and the 80 GB GPUs that each one's bf16 weights and cache are cut over by vLLM."""


def short_name(size: str) -> str:
    """``235B`` for 235B-A22B: the name that people type."""
    return next((short for short, long in SHORT_NAMES.items() if long == size), size)


def shape_of(name: str) -> Shape | None:
    """The shape of a size or an embedded model; None for what has to be looked at first (a folder, a hub id)."""
    if name in EMBEDDED_NAMES:
        import json

        from distill.embedded import checkpoint_dir

        return Shape.from_config(json.loads((checkpoint_dir(name) / "config.json").read_text()))
    size = SHORT_NAMES.get(name, name)
    if name.startswith("Qwen/"):
        size = name.rpartition("Qwen3-")[2].removesuffix("-Base").removesuffix("-FP8")
    return SIZES.get(size)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from. ``location`` is a folder or a hub id; ``name`` is what the user wrote."""

    name: str
    kind: Literal["embedded", "directory", "hub"]
    location: str
    revision: str | None = None


def resolve(
    name: str, *, role: Literal["teacher", "student"], revision: str | None = None, option: str | None = None
) -> ModelSource:
    """What ``name`` means for a teacher (post-trained model) or a student (base model).

    A size (``4B``), an embedded name (``nano``), an existing folder, or a hub id (``owner/name``), in this order.
    Raises UserError for anything else, with the nearest names; ``option`` is what the user gave the name to, where
    that is not ``--teacher`` or ``--student``.
    """
    if name in EMBEDDED_NAMES:
        from distill.embedded import checkpoint_dir

        return ModelSource(name, "embedded", str(checkpoint_dir(name)))
    size = SHORT_NAMES.get(name, name)
    if size in SIZES:
        if role == "student" and size in WITHOUT_BASE:
            raise UserError(
                f"--student {name}: Qwen published no base checkpoint of this size; take one of "
                f"{', '.join(known for known in SIZES if known not in WITHOUT_BASE)}, or name a hub id or a folder"
            )
        return ModelSource(name, "hub", f"Qwen/Qwen3-{size}" + ("-Base" if role == "student" else ""), revision)
    # os.path: what is too long for a folder's name is none, and no error.
    if os.path.isdir(name):
        return ModelSource(name, "directory", str(Path(name).resolve()))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSource(name, "hub", name, revision)
    raise UserError(f"{option or f'--{role}'} {name!r} is no size, embedded model, folder or hub id; {_nearest(name)}")


def _nearest(name: str) -> str:
    known = [*SIZES, *SHORT_NAMES, *EMBEDDED_NAMES]
    lowered = {key.lower(): key for key in known}
    near = [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.3)]
    return f"nearest: {', '.join(near)}" if near else f"known sizes: {', '.join(known)}"
