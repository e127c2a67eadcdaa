"""What a score is worth: means, intervals, pass@k and paired differences over questions.

The unit is the question: samples of one question are alike, so errors are clustered by question (Miller, "Adding
Error Bars to Evals", 2411.00640). Everything here is a pure function of numbers. Left out on purpose: normal
approximations, which leave [0, 1] exactly where scores matter most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""

RESAMPLES = 10_000
"""Resamples of a bootstrap; its percentiles then move by about 1 % of an interval's width from seed to seed."""

_CELLS = 2_000_000
"""Most indices that a bootstrap holds at once."""

Scores = Mapping[str, Sequence[float]]
"""Per question (by id) the score of each sample, all within [0, 1]."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions of the mean over samples, with its 95 % interval (always within [0, 1]).

    ``standard_error`` is clustered by question; None with a single question, which says nothing about the others.

    >>> estimate([[1.0, 0.0], [1.0, 1.0]]).mean
    0.75
    """

    mean: float
    ci95: tuple[float, float]
    num_questions: int
    num_samples: int
    standard_error: float | None

    @property
    def entry(self) -> dict[str, Any]:
        """What an entry of ``summary.json``'s scores says of a metric."""
        return {
            "mean": self.mean,
            "ci95": list(self.ci95),
            "num_questions": self.num_questions,
            "num_samples": self.num_samples,
        }

    def to_json(self) -> dict[str, Any]:
        """``entry`` and the standard error; ``from_json`` gives an equal estimate back."""
        return {**self.entry, "standard_error": self.standard_error}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Estimate:
        return cls(
            document["mean"],
            (document["ci95"][0], document["ci95"][1]),
            document["num_questions"],
            document["num_samples"],
            document["standard_error"],
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher ``a`` scores than ``b`` on the same questions, with the paired 95 % interval."""

    mean: float
    ci95: tuple[float, float]
    num_questions: int


def wilson(mean: float, num_trials: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; ``num_trials`` may be an effective (fractional) count."""
    square = Z95 * Z95
    centre = (mean + square / (2 * num_trials)) / (1 + square / num_trials)
    half = Z95 * math.sqrt(mean * (1 - mean) / num_trials + square / (4 * num_trials**2)) / (1 + square / num_trials)
    # At 0 and 1 the bound is the mean itself; rounding must not leave [0, 1] or exclude the mean.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))


def estimate(scores: Sequence[Sequence[float]] | Scores) -> Estimate:
    """The estimate of a score from each question's samples.

    The interval is Wilson's. With one 0/1 sample a question it is the textbook's. Otherwise the number of trials is
    the effective one: the number of independent 0/1 trials whose mean would vary as the questions' means do (Korn and
    Graubard's use of the design effect), between the number of questions and the number of samples. Simulated with
    questions of very different difficulty, it covers better than a bootstrap over questions, whose interval has no
    width where every question scores alike (all right, all wrong).

    Raises UserError if there is no question, a question without samples, or a score outside [0, 1].
    """
    return _estimate(_rows(scores))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased probability that at least one of ``k`` samples is right (Chen et al., 2107.03374, equation 1).

    1 - C(n-c, k) / C(n, k), as a product, so that no binomial overflows.

    >>> pass_at_k(4, 2, 2)
    0.8333333333333334
    """
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@{k} needs at least {max(k, 1)} samples a question and k >= 1; there are {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise UserError(f"{num_correct} of {num_samples} samples cannot be right")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def pass_at_k_estimate(scores: Sequence[Sequence[float]] | Scores, k: int) -> Estimate:
    """The mean over questions of the unbiased pass@k; a sample is right if its score is 1.

    Raises UserError as ``estimate`` does, and where a question has fewer than ``k`` samples.
    """
    rows = _rows(scores)
    return _estimate([[_pass_at_k(row, k)] for row in rows], num_samples=sum(map(len, rows)))


def pass_at_k_scores(scores: Scores, k: int) -> dict[str, list[float]]:
    """Each question's unbiased pass@k as its score, for paired differences and for pooling over seeds."""
    _rows(scores)
    return {key: [_pass_at_k(row, k)] for key, row in scores.items()}


def _pass_at_k(row: Sequence[float], k: int) -> float:
    return pass_at_k(len(row), sum(score == 1.0 for score in row), k)


def paired_difference(a: Scores, b: Scores, *, seed: int = 0) -> Difference:
    """Mean and percentile-bootstrap interval of the difference a - b, question by question.

    Pairing takes the questions' difficulty out of the comparison; the bootstrap resamples questions, so differing
    numbers of samples in a and b do no harm. Where every question differs by the same amount there is nothing to
    resample, and the interval is as wide as Wilson's of a share of which no case was seen. One question has the whole
    range as its interval.

    Raises UserError where a and b do not answer the same questions.
    """
    ids = same_questions([a, b])
    difference_Q = question_means(a, ids) - question_means(b, ids)
    mean = float(difference_Q.mean())
    if len(ids) == 1:
        ci95 = (-1.0, 1.0)
    elif np.ptp(difference_Q) == 0.0:
        ci95 = within_range(mean, unseen(len(ids)))
    else:
        ci95 = _bootstrap(difference_Q, seed)
    return Difference(mean, ci95, len(ids))


def same_questions(runs: Sequence[Scores]) -> list[str]:
    """The ids that all ``runs`` answer, sorted. Raises UserError where one answers others."""
    for scores in runs[1:]:
        if alone := sorted(set(runs[0]) ^ set(scores)):
            raise UserError(
                f"a comparison needs the same questions on both sides; {len(alone)} are on one side only, for "
                f"example {alone[0]}: evaluate both with the same task, number of questions and seed"
            )
    return sorted(runs[0])


def question_means(scores: Scores, ids: Sequence[str]) -> NDArray[np.float64]:
    """The mean over samples of each question of ``ids``. Raises UserError for scores that are none."""
    return _means(_rows([scores[key] for key in ids]))


def unseen(num_trials: int) -> float:
    """Wilson's upper bound of a share of which ``num_trials`` trials have shown no case."""
    return wilson(0.0, num_trials)[1]


def within_range(mean: float, half_width: float) -> tuple[float, float]:
    """An interval around a difference of two scores, which lies between -1 and 1."""
    return max(-1.0, mean - half_width), min(1.0, mean + half_width)


def _rows(scores: Sequence[Sequence[float]] | Scores) -> list[Sequence[float]]:
    rows = list(scores.values()) if isinstance(scores, Mapping) else list(scores)
    if not rows:
        raise UserError("there is no question to estimate a score from; evaluate at least one")
    for place, row in enumerate(rows):
        if not row:
            raise UserError(f"question {place} has no samples; every question needs at least one")
        if not all(0.0 <= score <= 1.0 for score in row):
            raise UserError(f"question {place} has a score outside [0, 1]: {list(row)}")
    return rows


def _means(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array([math.fsum(row) / len(row) for row in rows])


def _estimate(rows: Sequence[Sequence[float]], num_samples: int | None = None) -> Estimate:
    mean_Q = _means(rows)
    num_questions = len(rows)
    drawn = sum(map(len, rows))
    mean = min(1.0, max(0.0, math.fsum(mean_Q) / num_questions))
    return Estimate(
        mean=mean,
        ci95=wilson(mean, _effective_trials(mean_Q, mean, drawn)),
        num_questions=num_questions,
        num_samples=drawn if num_samples is None else num_samples,
        standard_error=float(mean_Q.std(ddof=1) / math.sqrt(num_questions)) if num_questions > 1 else None,
    )


def _effective_trials(mean_Q: NDArray[np.float64], mean: float, num_samples: int) -> float:
    num_questions = len(mean_Q)
    # Without any variation there is no telling how alike a question's samples are: count each question once.
    if num_questions == 1 or mean in (0.0, 1.0):
        return num_questions
    variance = float(mean_Q.var())
    trials = num_questions * mean * (1 - mean) / variance if variance > 0 else math.inf
    return min(max(trials, num_questions), num_samples)


def _bootstrap(value_Q: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """2.5 % and 97.5 % percentile of the mean of ``value_Q`` over resampled questions."""
    random = np.random.default_rng(seed)
    block = max(1, _CELLS // len(value_Q))
    means = [
        value_Q[random.integers(len(value_Q), size=(min(block, RESAMPLES - start), len(value_Q)))].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
