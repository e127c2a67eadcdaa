"""What every loss over hidden states and heads refuses of its arguments, and the weights it computes with.

All of these raise UserError.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.errors import UserError


def check_linear(whose: str, hidden: Tensor, head: Tensor) -> None:
    """Hidden states [N, d] and a head [V, d] of one dtype, whole in this process."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise UserError(
            f"{whose}: hidden states of shape {list(hidden.shape)} do not fit a head of shape {list(head.shape)};"
            " they must be [N, d] and [V, d]."
        )
    if _is_sharded(hidden) or _is_sharded(head):
        raise UserError(
            f"{whose}: a tensor that is sharded over processes would be gathered anew for every tile. Gather it once a"
            " step: call this inside the forward of the module that FSDP2 shards, where the head is whole, or pass"
            " head.full_tensor(grad_placements=[Partial()])."
        )
    if hidden.dtype != head.dtype:
        raise UserError(f"{whose}: hidden states are {hidden.dtype} and the head is {head.dtype}; cast one of them.")


def _is_sharded(x: Tensor) -> bool:
    # Where nobody imported the class, which takes seconds, there is no tensor of it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def check_ids(name: str, ids: Tensor, num_rows: int, num_vocab: int) -> None:
    """One id of the vocabulary a row."""
    if ids.shape != (num_rows,) or ids.dtype != torch.int64:
        raise UserError(f"{name} is {ids.dtype} of shape {list(ids.shape)}; it must be int64 of shape [{num_rows}].")
    if num_rows and not 0 <= int(ids.min()) <= int(ids.max()) < num_vocab:
        raise UserError(f"{name} holds ids {int(ids.min())} to {int(ids.max())}; the head has {num_vocab} rows.")


def check_rows_of_ids(ids: Tensor, num_rows: int, num_vocab: int) -> None:
    """Distinct ids of the vocabulary, equally many a row."""
    if ids.ndim != 2 or len(ids) != num_rows or ids.shape[1] == 0 or ids.dtype != torch.int64:
        raise UserError(f"ids are {ids.dtype} of shape {list(ids.shape)}; they must be int64 of shape [{num_rows}, K].")
    if ids.numel() == 0:
        return
    if not 0 <= int(ids.min()) <= int(ids.max()) < num_vocab:
        raise UserError(f"ids are {int(ids.min())} to {int(ids.max())}; the head has {num_vocab} rows.")
    ordered_NK = ids.sort(-1).values
    if bool((ordered_NK[:, 1:] == ordered_NK[:, :-1]).any()):
        raise UserError("an id stands twice in a row of ids; the ids of a row must be distinct.")


def check_groups(groups: Sequence[Sequence[int]], num_vocab: int) -> list[list[int]]:
    """Groups of ids that count as one action."""
    ids = [token for group in groups for token in group]
    if not all(groups) or len(set(ids)) != len(ids) or not all(0 <= token < num_vocab for token in ids):
        raise UserError(
            f"merged_ids is {groups}; it must be groups of distinct ids below {num_vocab},"
            " none empty, none overlapping."
        )
    return [list(group) for group in groups]


def weights_of(weights: Tensor | None, hidden: Tensor) -> Tensor:
    """The weights in the dtype that all arithmetic is done in."""
    calc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if weights is None:
        return torch.ones(len(hidden), dtype=calc, device=hidden.device)
    if weights.shape != (len(hidden),):
        raise UserError(f"weights has shape {list(weights.shape)}; there are {len(hidden)} rows, one weight each.")
    return weights.detach().to(calc)
