"""Keys and values of the tokens so far, for decoding: a slot for each row, filled from its front.

transformers' own caches hold all rows at one common width: shorter rows carry padding, a row cannot leave or come by
itself, and the dynamic one copies everything for each new token. Here a row is a slot of one long tensor, in which its
tokens stand from place 0 on. New tokens are written where they belong, a slot is given to another row by overwriting
it, and attention reads each group of slots only as far as the group's longest row goes.

Legend: S slots, B rows that decode (the first slots), T new tokens of one pass, W places that
they are written to, H key-value heads, C places of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOM = 64
"""Places that are made beyond those that are needed now, at least."""
NARROWER = 0.7
"""Rows are read in a group of their own where they are no longer than this share of the group before."""
WORTH_BYTES = {"cpu": 200_000}
"""Reading of a layer that a further group has to save: about what its calls cost. Bytes, by type of device."""
_WORTH_BYTES_ELSEWHERE = 20_000_000
MANY_ROWS = 32
"""From so many rows on two products are faster than the fused kernel, in float32 on a CPU."""


@dataclass(frozen=True, slots=True)
class Group:
    """Slots ``first`` to ``last``, exclusive, none of which holds more than ``width`` tokens."""

    first: int
    last: int
    width: int


def groups_of(lengths: Sequence[int], worth: float) -> list[Group]:
    """Neighbouring slots that are read together; each further group saves the reading of ``worth`` tokens or more."""
    # What the slots from here to the end have to be read for.
    widths = list(accumulate(reversed(lengths), max))[::-1]
    found, first = [], 0
    for place, width in enumerate(widths):
        saved = (len(lengths) - place) * (widths[first] - width)
        if width <= NARROWER * widths[first] and saved >= worth:
            found.append(Group(first, place, widths[first]))
            first = place
    return [*found, Group(first, len(lengths), widths[first])] if lengths else []


def arranged(lengths: Sequence[int], worth: float) -> list[int]:
    """The slots in an order that makes narrow groups: entry n is whose row slot n should hold.

    Rows are sorted by length, the longest first, but a row that stands within its group already stays where it is.
    """
    ranked = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])
    order: list[int] = []
    for group in groups_of([lengths[slot] for slot in ranked], worth):
        members = ranked[group.first : group.last]
        staying = {slot for slot in members if group.first <= slot < group.last}
        coming = iter([slot for slot in members if slot not in staying])
        order += [slot if slot in staying else next(coming) for slot in range(group.first, group.last)]
    return order


class SlotCache:
    """What a transformers model takes as ``past_key_values``, for a pass that was announced by ``expect``."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.num_places = 0
        """Of each slot."""
        self.version = 0
        """How often the rooms have moved."""
        self._num_slots = 0
        self._slot_W = self._place_W = self._source_W = torch.empty(0, dtype=torch.long)
        self._flat: Tensor | None = None
        """The same places for rooms that are seen as one long list, once the first layer has said how many heads."""

    def reserve(self, num_slots: int, num_places: int, *, most_places: int) -> None:
        """Room for so many slots of so many tokens, of which those that are in them will never have more than
        ``most_places``. What slots behind these hold may be lost."""
        if num_slots <= self._num_slots and num_places <= self.num_places:
            return
        if num_places > self.num_places:
            self.num_places = max(num_places + ROOM, 2 * self.num_places)
        # Where the long rows have gone there is room for more of the short ones, in as many bytes, and where a long one
        # comes the slots of those who have gone are given up for it.
        self.num_places = max(num_places, min(most_places, self.num_places))
        self._num_slots = num_slots
        self.version += 1
        for rooms in (self.keys, self.values):
            for layer, room in enumerate(rooms):
                rooms[layer] = self._room(room)
                filled = room[:num_slots, :, : self.num_places]
                rooms[layer][: len(filled), :, : filled.shape[2]] = filled

    def _room(self, like: Tensor) -> Tensor:
        # Zeros: what is masked out still takes part in the arithmetic, and memory as it comes may hold NaN.
        return like.new_zeros(self._num_slots, like.shape[1], self.num_places, like.shape[3])

    def expect(self, slot_W: Tensor, place_W: Tensor, source_W: Tensor) -> None:
        """What the next pass writes: token ``source_W[n]`` into place ``place_W[n]`` of slot ``slot_W[n]``.

        A prompt that several rows share passes once, and is written to each of them.
        """
        self._slot_W, self._place_W, self._source_W, self._flat = slot_W, place_W, source_W, None

    def update(self, key_states: Tensor, value_states: Tensor, layer: int, *others: Any) -> tuple[Tensor, Tensor]:
        """Writes the pass's keys and values [T, H, 1, d] of a layer; gives them back as they are."""
        num_tokens, num_heads, _, width = key_states.shape
        if self._flat is None:
            head_H = torch.arange(num_heads, device=key_states.device)
            self._flat = ((self._slot_W[:, None] * num_heads + head_H) * self.num_places + self._place_W[:, None]).view(
                -1
            )
        for rooms, states in ((self.keys, key_states), (self.values, value_states)):
            if layer == len(rooms):
                rooms.append(self._room(states))
            written_WHd = states[:, :, 0]
            if len(self._source_W) > num_tokens:
                written_WHd = written_WHd[self._source_W]
            rooms[layer].view(-1, width).index_copy_(0, self._flat, written_WHd.reshape(-1, width))
        return key_states, value_states

    def move(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Slot n takes over the ``lengths[n]`` tokens of slot ``sources[n]``."""
        changed = [slot for slot, source in enumerate(sources) if slot != source]
        if not changed:
            return
        device, width = self.keys[0].device, max(lengths[slot] for slot in changed)
        to, of = torch.tensor([changed, [sources[slot] for slot in changed]], device=device)
        for room in (*self.keys, *self.values):
            filled = room[:, :, :width]
            filled.index_copy_(0, to, filled.index_select(0, of))

    def worth(self) -> float:
        """Tokens of a layer whose reading takes as long as one call more."""
        if not self.keys:
            return 1.0
        room = self.keys[0]
        token_bytes = 2 * room.shape[1] * room.shape[3] * room.element_size()
        return WORTH_BYTES.get(room.device.type, _WORTH_BYTES_ELSEWHERE) / token_bytes


def kernels(device: torch.device) -> AbstractContextManager[None]:
    """A block in which attention takes kernels that fit any width: cuDNN's would be made anew for each."""
    if device.type != "cuda":
        return nullcontext()
    fitting: AbstractContextManager[None] = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return fitting


@dataclass(frozen=True, slots=True)
class Decoding:
    """The first B tokens of a pass: one new token of each of the slots 0 to B, in this order.

    Every token of the pass is a row of its own to the model. ``bias_BC`` is 0 at the places that a slot's token attends
    to and minus infinity behind them.
    """

    cache: SlotCache
    num_rows: int
    groups: Sequence[Group]
    bias_BC: Tensor

    @classmethod
    def of(cls, cache: SlotCache, groups: Sequence[Group], place_B: Tensor, dtype: torch.dtype) -> Decoding:
        """Each slot's new token is at its place of ``place_B``, and none looks further; no group is narrower."""
        place_C = torch.arange(max((group.width for group in groups), default=0), device=place_B.device)
        bias_BC = torch.zeros(len(place_B), len(place_C), dtype=dtype, device=place_B.device)
        bias_BC.masked_fill_(place_C > place_B[:, None], -torch.inf)
        return cls(cache, len(place_B), groups, bias_BC)

    def attend(self, query: Tensor, layer: int, scaling: float | None) -> Tensor:
        """Queries [B, heads, 1, d] of a layer to [B, 1, heads, d].

        The query heads that share a key head stand beside each other as its rows: keys are not repeated for them.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        query_BHGd = query.reshape(self.num_rows, keys.shape[1], -1, keys.shape[3])
        said = [
            _attend(
                query_BHGd[group.first : group.last],
                keys[group.first : group.last, :, : group.width],
                values[group.first : group.last, :, : group.width],
                self.bias_BC[group.first : group.last, None, None, : group.width],
                scaling,
            )
            for group in self.groups
        ]
        together = said[0] if len(said) == 1 else torch.cat(said)
        return together.reshape(self.num_rows, 1, -1, keys.shape[3])


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float | None) -> Tensor:
    """What queries [R, H, G, d], of which G share a key head, take from values [R, H, C, d], in the fastest way.

    In float32 on a CPU torch's fused kernel takes two to five times as long for G queries of a head as for one, and
    shares its work badly among the cores: with many rows two plain products are faster still. In 16 bits neither is.
    """
    if not (query.device.type == "cpu" and query.dtype == torch.float32):
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling)
    if len(query) >= MANY_ROWS:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return ((query * scale) @ keys.transpose(-1, -2)).add_(bias).softmax(dim=-1) @ values
    alone = query.reshape(len(query), -1, 1, query.shape[-1])
    said = scaled_dot_product_attention(alone, keys, values, attn_mask=bias, scale=scaling, enable_gqa=True)
    return said.view(query.shape)
