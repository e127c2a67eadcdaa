"""Several training runs of one recipe: what the recipe scores, and how two recipes differ.

Two things vary: which questions were asked, and which seed a student was trained with. All runs answer the same
questions, so scores form a table of S seeds by Q questions, and its mean varies with each (a two-way layout with random
seeds and random questions). Three seeds show their variance with two degrees of freedom only, so their part of the
interval takes Student's t.

Left out on purpose: a bootstrap over seeds and questions. Where seeds differ much, its 95 % intervals over three seeds
hold the truth in 78 % of simulated cases (`benchmarks/seed_intervals.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import stdev

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError
from eval.statistics import Z95, Scores, question_means, same_questions, unseen, wilson, within_range


@dataclass(frozen=True, slots=True)
class Pooled:
    """A mean over seeds and questions with a 95 % interval for other seeds and other questions.

    A score's interval lies within [0, 1], a difference's within [-1, 1]. ``by_seed`` are the runs' own means.
    """

    mean: float
    ci95: tuple[float, float]
    by_seed: tuple[float, ...]
    num_questions: int


def pooled_score(runs: Sequence[Scores]) -> Pooled:
    """What a recipe scores, from its runs over several seeds (each: samples by question).

    Raises UserError for fewer than two runs, other questions in one of them, or a single question.
    """
    value_SQ, ids = _table(runs)
    mean = min(1.0, max(0.0, float(value_SQ.mean())))
    half = half_width(value_SQ)
    # Wilson knows how lopsided a share near 0 or 1 is. Where nothing varies there is no telling how alike the runs are:
    # each question counts once.
    trials = mean * (1 - mean) * (Z95 / half) ** 2 if half > 0 else len(ids)
    low, high = wilson(mean, min(trials, sum(len(row) for scores in runs for row in scores.values())))
    ci95 = (max(0.0, min(low, mean - half)), min(1.0, max(high, mean + half)))
    return Pooled(mean, ci95, _by_seed(value_SQ), len(ids))


def pooled_difference(a: Sequence[Scores], b: Sequence[Scores]) -> Pooled:
    """How much higher recipe ``a`` scores than ``b``; run n of each has the same seed (the same start, the same data).

    Raises UserError as ``pooled_score`` does, and for different numbers of runs.
    """
    if len(a) != len(b):
        raise UserError(f"runs are paired by seed, and there are {len(a)} and {len(b)}; give as many of each")
    same_questions([*a, *b])
    (a_SQ, ids), (b_SQ, _) = _table(a), _table(b)
    difference_SQ = a_SQ - b_SQ
    mean = float(difference_SQ.mean())
    half = half_width(difference_SQ) or unseen(len(ids))
    return Pooled(mean, within_range(mean, half), _by_seed(difference_SQ), len(ids))


def seeds_half_width(by_seed: Sequence[float]) -> float | None:
    """Half of Student's 95 % interval of a mean over seeds, for other seeds alone; None with a single one, which says
    nothing about others."""
    if len(by_seed) == 1:
        return None
    return student_quantile(len(by_seed) - 1) * stdev(by_seed) / math.sqrt(len(by_seed))


def half_width(value_SQ: NDArray[np.float64]) -> float:
    """Half of the 95 % interval of the table's mean, for other seeds and other questions.

    With mean squares M between seeds, between questions and of the rest, the variance of the mean is estimated by
    (M_seeds + M_questions - M_rest) / (S Q). The seeds' part is taken with Student's t of S - 1 degrees of freedom,
    what the questions add with the normal distribution's quantile. M_seeds holds the chance of single samples too, so
    the interval is too wide, never too narrow, where seeds hardly differ.
    """
    num_seeds, num_questions = value_SQ.shape
    mean = value_SQ.mean()
    seed_S1 = value_SQ.mean(axis=1, keepdims=True)
    question_1Q = value_SQ.mean(axis=0, keepdims=True)
    seeds = num_questions * float(((seed_S1 - mean) ** 2).sum()) / (num_seeds - 1)
    questions = num_seeds * float(((question_1Q - mean) ** 2).sum()) / (num_questions - 1)
    rest = float(((value_SQ - seed_S1 - question_1Q + mean) ** 2).sum()) / ((num_seeds - 1) * (num_questions - 1))
    if max(seeds, questions) <= 1e-12:  # what rounding leaves of equal values
        return 0.0
    square = student_quantile(num_seeds - 1) ** 2 * seeds + Z95**2 * max(questions - rest, 0.0)
    return math.sqrt(square / value_SQ.size)


@lru_cache(maxsize=1024)
def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution.

    With x = sqrt(freedom) tan(angle), the probability of |t| < x is a multiple of the integral of cos^(freedom - 1).
    """
    if freedom < 1:
        raise UserError(f"Student's t needs at least one degree of freedom, got {freedom}")
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)

    def excess(x: float) -> float:
        angles, step = np.linspace(0.0, math.atan(x / math.sqrt(freedom)), 2049, retstep=True)
        values = np.exp(log_scale + (freedom - 1) * np.log(np.cos(angles)))
        simpson = float(step) / 3 * (values[0] + values[-1] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum())
        return 2 * float(simpson) - 0.95

    low, high = 1.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def _table(runs: Sequence[Scores]) -> tuple[NDArray[np.float64], list[str]]:
    """The runs' means by question [S, Q], and the questions."""
    if len(runs) < 2:
        raise UserError(f"pooling over seeds needs at least two runs, and there are {len(runs)}; train another seed")
    ids = same_questions(runs)
    if len(ids) < 2:
        raise UserError("pooling over seeds needs at least two questions, or nothing tells how questions vary")
    return np.stack([question_means(scores, ids) for scores in runs]), ids


def _by_seed(value_SQ: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(mean) for mean in value_SQ.mean(axis=1))
