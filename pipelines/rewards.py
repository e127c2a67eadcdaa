"""From verdicts to advantages: pure functions of numbers.

A group is the responses to one prompt. Its mean is the baseline, so what counts is how much better a response was than
the student's others; a group whose rewards are all equal says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_FLOOR = 1e-4
"""Added to a group's standard deviation before dividing by it."""


def overlong_penalty(length: int, limit: int, share: float) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13) for the last ``share`` of the token limit.

    0 up to where that part begins, from there evenly down to -1 at the limit.

    >>> [overlong_penalty(length, 100, 0.2) for length in (80, 90, 100)]
    [0.0, -0.5, -1.0]
    """
    if share == 0:
        return 0.0
    width = share * limit
    return min(0.0, (limit - width - length) / width)


def group_advantages(rewards: Sequence[float], *, divide: bool) -> list[float] | None:
    """Each reward less the group's mean, over the group's standard deviation where ``divide``.

    The deviation is the sample's (n - 1), as in TRL. None for a group whose rewards are all equal.
    """
    if min(rewards) == max(rewards):
        return None
    mean = math.fsum(rewards) / len(rewards)
    if not divide:
        return [reward - mean for reward in rewards]
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    return [(reward - mean) / (std + STD_FLOOR) for reward in rewards]
