"""Keys and values of the tokens so far, for decoding.

transformers' dynamic cache copies everything it holds for each new token, and its static one is attended to at full
length from the first token on. This one keeps room behind what it holds: a new token is written into it, and attention
sees the part that is filled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens of room that are made at a time."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [rows, KV heads, tokens, d]: views of the filled front of two longer tensors."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = [states[..., :0, :] for states in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._rooms[0].shape[-2]:
            self._rooms = [_longer(room[..., :start, :], end + ROOM) for room in self._rooms]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        end = self.get_seq_length()
        self._rooms = [room[indices] for room in self._rooms]
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)


def _longer(held: Tensor, length: int) -> Tensor:
    shape = list(held.shape)
    shape[-2] = length
    room = torch.empty(shape, dtype=held.dtype, device=held.device)
    room[..., : held.shape[-2], :] = held
    return room


def roomy_cache() -> Cache:
    """An empty cache for a model all of whose layers attend to everything, as Qwen3's do."""
    return Cache(layer_class_to_replicate=RoomyLayer)
