"""Memory for the logits of a tile and for the mathematics on them, kept from call to call on a CPU.

The system hands out fresh memory page by page, zeroed, when it is first written. For the logits of 512 rows of a real
vocabulary that takes as long as the mathematics on them, and for the temporaries of that several times as long, since
glibc gives blocks of this size back as soon as they are free. A GPU's allocator keeps them by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

CPU_TILE_BYTES = 512 * 2**20
"""Memory for the logits that live at once on a CPU."""

CPU_KEPT_BYTES = CPU_TILE_BYTES + 256 * 2**20
"""The most that is kept: these logits, and what a block of them needs."""
_ALIGNMENT = 64

Matrix = tuple[int, int, torch.dtype]
"""Rows, columns and number type."""

_kept: deque[Tensor] = deque(maxlen=1)
"""Free memory, at most one block of the process's; taken and put back in single steps, as threads share it."""


@contextmanager
def matrices(kinds: Sequence[Matrix], device: torch.device) -> Iterator[list[Tensor]]:
    """Matrices to write to, one of each kind; gone behind the block."""
    if device.type != "cpu":
        yield [torch.empty(num_rows, width, dtype=dtype, device=device) for num_rows, width, dtype in kinds]
        return
    sizes = [num_rows * width * dtype.itemsize for num_rows, width, dtype in kinds]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    memory = _take(starts.pop())
    try:
        yield [
            memory[start : start + size].view(dtype).view(num_rows, width)
            for start, size, (num_rows, width, dtype) in zip(starts, sizes, kinds, strict=True)
        ]
    finally:
        if len(memory) <= CPU_KEPT_BYTES:
            _kept.append(memory)


def _take(num_bytes: int) -> Tensor:
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    if memory is None or len(memory) < num_bytes:
        del memory  # too small: gone before the larger one comes
        with torch.inference_mode(False):  # what inference mode makes, nobody else may write to
            memory = torch.empty(num_bytes, dtype=torch.uint8)
    return memory
