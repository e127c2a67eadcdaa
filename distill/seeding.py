"""Seeds derived from names, so that what is drawn at one place does not depend on how much was drawn elsewhere."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the place that ``names`` describe; the same on every machine and in every process.

    >>> derive(0, "on_policy", 3) == derive(0, "on_policy", 3) != derive(0, "on_policy", 4)
    True
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in (seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform(seed: int, *names: str | int) -> float:
    """A number in [0, 1) for the place that ``names`` describe."""
    return derive(seed, *names) / 2**63
