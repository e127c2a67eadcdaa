"""Learning curves against compute: how much one recipe needs for the score that another one reaches at best.

Everything is decided on the curves' scores (a validation split); the test scores of the checkpoints that were decided
on are carried along, to be reported: a best that is chosen and reported on the same questions is too good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distill.errors import UserError
from eval.seeds import student_quantile


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint of a training run: FLOPs since the common start (all roles), its score, its test score if there is
    one."""

    flops: float
    score: float
    test_score: float | None = None


Curve = Sequence[Point]
"""The checkpoints of one training run by rising FLOPs; the start itself may be the first, with 0."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where curve a first reaches curve b's best. ``ratio`` is a's FLOPs over b's.

    ``reached`` is None, and with it the ratio, where a never scores that much; ``ratio`` is None too where b's best is
    its start, which cost nothing.
    """

    best: Point
    reached: Point | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Compute at equal score over several seeds: the geometric mean of the seeds' ratios and its 95 % interval.

    ``ratio`` is None unless every seed has one; ``ci95`` is None too with a single seed, which says nothing about
    others. ``by_seed`` holds each seed's crossing.
    """

    ratio: float | None
    ci95: tuple[float, float] | None
    by_seed: tuple[Crossing, ...]

    @property
    def num_reached(self) -> int:
        return sum(crossing.reached is not None for crossing in self.by_seed)


def compute_at_equal_score(curve_a: Curve, curve_b: Curve) -> Crossing:
    """FLOPs of a's first checkpoint at or above b's best, over FLOPs of b's checkpoint that first reached it.

    No score is interpolated between checkpoints: both curves pay for the whole way to a checkpoint that exists.

    >>> a = [Point(1.0, 0.5), Point(2.0, 0.9)]
    >>> b = [Point(4.0, 0.6), Point(8.0, 0.7), Point(16.0, 0.7)]
    >>> compute_at_equal_score(a, b).ratio
    0.25

    Raises UserError for a curve without checkpoints or whose FLOPs do not rise.
    """
    for curve in (curve_a, curve_b):
        _check(curve)
    highest = max(point.score for point in curve_b)
    best = next(point for point in curve_b if point.score == highest)
    reached = next((point for point in curve_a if point.score >= highest), None)
    return Crossing(best, reached, None if reached is None or best.flops == 0 else reached.flops / best.flops)


def compute_at_equal_score_over_seeds(curves_a: Sequence[Curve], curves_b: Sequence[Curve]) -> Ratio:
    """The ratio over seeds; curve n of each side has the same seed and the same start.

    The interval is Student's for the mean of the seeds' log ratios. Where a's checkpoint is its start (ratio 0) there
    is no logarithm, and no ratio over seeds. Raises UserError for different numbers of curves, or none.
    """
    if len(curves_a) != len(curves_b) or not curves_a:
        raise UserError(f"curves are paired by seed, and there are {len(curves_a)} and {len(curves_b)}")
    crossings = tuple(compute_at_equal_score(a, b) for a, b in zip(curves_a, curves_b, strict=True))
    ratios = [crossing.ratio for crossing in crossings if crossing.ratio]
    if len(ratios) < len(crossings):
        return Ratio(None, None, crossings)
    logs = np.log(ratios)
    mean = float(logs.mean())
    if len(ratios) == 1:
        return Ratio(ratios[0], None, crossings)
    half = student_quantile(len(ratios) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(ratios))
    return Ratio(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)), crossings)


def score_at_compute(curve: Curve, flops: float) -> Point | None:
    """The checkpoint that scored best among those that cost no more than ``flops``, the earliest of equals; None where
    the first one already cost more."""
    _check(curve)
    within = [point for point in curve if point.flops <= flops]
    return max(within, key=lambda point: point.score, default=None)


def _check(curve: Curve) -> None:
    costs = [point.flops for point in curve]
    if not costs:
        raise UserError("a learning curve needs at least one checkpoint with a score")
    if costs[0] < 0 or any(later <= earlier for earlier, later in pairwise(costs)):
        raise UserError(f"the FLOPs of a learning curve's checkpoints rise from 0 on, got {costs}")
