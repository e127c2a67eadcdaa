"""Decoding passes that a GPU replays.

A pass over one new token of each row is a thousand small kernels and more, which a GPU works through several times
faster than Python asks for them. So a pass whose shape comes again is captured as a CUDA graph, and from then on
replayed as a whole, from inputs that stand in fixed places. For shapes to come again, rows are filled up to round
numbers by idle ones, and slots are read to round widths. A shape is captured when it comes for the second time: one
that comes once costs nothing, and the first time is the warm-up that capturing asks for.

Graphs hold the addresses of the weights and of the cache: they live as long as one call of the sampler does, and no
longer than the cache stays where it is. A mixture of experts looks at its routing in the middle of a pass, which cannot
be captured, and a sharded student is gathered to new places: those are decoded as on a CPU.

Legend: B rows of a pass, idle ones included; d the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from distill.kv_cache import Group, SlotCache, groups_of

Forward = Callable[[Tensor, Tensor, Sequence[Group]], Tensor]
"""Ids [B], their places [B] and how slots are read, to last hidden states [B, d]; all on the model's device."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a piece of work one that does the same again, into the same tensor. What it made shares memory, which is
given up when all of it is gone: then it takes another ``Capture``."""

WIDTH_STEP = 64
"""Widths are multiples of it, or all the places that there are."""
MOST_CAPTURED = 32
"""Passes that are kept at once; rows only grow longer, so that the oldest ones' shapes hardly come back."""


def replays(model: PreTrainedModel, cache: SlotCache, forward: Forward) -> Replays | None:
    """For a model on a GPU whose passes can be captured."""
    parts = set(map(type, model.modules()))
    if (
        model.device.type != "cuda"
        or hasattr(model.config, "num_experts_per_tok")
        or any(issubclass(part, FSDPModule) for part in parts)
    ):
        return None
    return Replays(cache, forward, _cuda_capture, model.device)


def rounded_rows(num: int) -> int:
    """``num`` or more: a power of two up to 8, a multiple of 8 up to 128, and beyond that at most an eighth more."""
    if num <= 8:
        return 1 << (num - 1).bit_length()
    step = max(8, (1 << (num.bit_length() - 1)) // 8)
    return -(-num // step) * step


class Replays:
    """One sampler call's passes over one new token a row."""

    def __init__(
        self, cache: SlotCache, forward: Forward, new_capture: Callable[[], Capture], device: torch.device
    ) -> None:
        self._cache, self._forward, self._device = cache, forward, device
        self._new_capture, self._capture = new_capture, new_capture()
        self._version = cache.version
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}
        """Ids and places, by rows."""
        self._again: dict[tuple[int, tuple[Group, ...]], Callable[[], Tensor] | None] = {}
        """The captured pass by shape; None where the shape has come once."""

    def hidden(self, token_B: Tensor, place_B: Tensor, lengths: Sequence[int]) -> Tensor:
        """Last hidden states [rows, d] of one new token of each slot; good until the next call.

        ``lengths`` are the places that each slot's token looks at, itself at ``place_B`` being the last. The cache has
        room for ``rounded_rows`` slots of so many.
        """
        num, rows = len(lengths), rounded_rows(len(lengths))
        if self._version != self._cache.version:
            self._version = self._cache.version
            self.close()
            self._capture = self._new_capture()
        if rows not in self._inputs:
            ids_B, places_B = torch.zeros(2, rows, dtype=torch.long, device=self._device)
            self._inputs[rows] = ids_B, places_B
        ids_B, places_B = self._inputs[rows]
        ids_B[:num] = token_B
        places_B[:num] = place_B
        places_B[num:] = 0
        groups = self._groups([*lengths, *[1] * (rows - num)])
        shape = rows, groups

        def work() -> Tensor:
            return self._forward(ids_B, places_B, groups)

        if shape not in self._again:
            self._again[shape] = None
            return work()[:num]
        again = self._again[shape]
        if again is None:
            again = self._again[shape] = self._capture(work)
            kept = [known for known, held in self._again.items() if held is not None]
            for oldest in kept[:-MOST_CAPTURED]:
                del self._again[oldest]
        return again()[:num]

    def close(self) -> None:
        """Give the captured passes up, now: a graph that the garbage collector ends while another is captured spoils
        that one."""
        self._again.clear()

    def _groups(self, lengths: Sequence[int]) -> tuple[Group, ...]:
        widths = [min(-(-length // WIDTH_STEP) * WIDTH_STEP, self._cache.num_places) for length in lengths]
        return tuple(groups_of(widths, self._cache.worth()))


def _cuda_capture() -> Capture:
    """Captures into one pool of memory: what a pass makes on its way is not wanted after it."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may be at work on the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            found = work()

        def again() -> Tensor:
            graph.replay()
            return found

        return again

    return capture
