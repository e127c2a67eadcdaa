"""How much a response repeats itself."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(ids: Sequence[int]) -> float:
    """Share of a response's 4-grams that stood in it before: 0 where nothing repeats, close to 1 in a loop.

    >>> repetition((1, 2, 3, 4, 1, 2, 3, 4))
    0.2
    """
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
