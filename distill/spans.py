"""Stretches of time on one clock, and what they come to together."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[float, float]
"""Begin and end in seconds, as ``time.perf_counter`` gives them."""


def united(spans: Iterable[Span], *, gap: float = 0.0) -> list[Span]:
    """The same time in stretches that do not touch, in order; what is no more than ``gap`` apart becomes one.

    >>> united([(4, 5), (0, 2), (1, 3)])
    [(0, 3), (4, 5)]
    """
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def after(spans: Iterable[Span], moment: float) -> list[Span]:
    """What of them lies behind ``moment``.

    >>> after([(0, 2), (3, 5), (6, 7)], 4)
    [(4, 5), (6, 7)]
    """
    return [(max(begin, moment), end) for begin, end in spans if end > moment]


def length(spans: Iterable[Span]) -> float:
    """Seconds of stretches that do not overlap."""
    return sum(end - begin for begin, end in spans)
