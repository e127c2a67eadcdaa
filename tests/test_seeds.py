"""Pooling over training seeds, worked out by hand, and compute at equal score on curves drawn by hand."""

import math
from typing import Any

import numpy as np
import pytest

from distill.errors import UserError
from eval.curves import (
    Crossing,
    Point,
    compute_at_equal_score,
    compute_at_equal_score_over_seeds,
    score_at_compute,
)
from eval.seeds import half_width, pooled_difference, pooled_score, student_quantile
from eval.statistics import estimate, pass_at_k_scores, wilson


def scores(*values: float) -> dict[str, list[float]]:
    return {f"q{number}": [value] for number, value in enumerate(values)}


def test_students_quantiles_are_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 10: 2.2281, 30: 2.0423, 120: 1.9799, 10**6: 1.95996}
    for freedom, quantile in table.items():
        assert student_quantile(freedom) == pytest.approx(quantile, abs=6e-5)
    with pytest.raises(UserError):
        student_quantile(0)


def test_an_interval_over_seeds_and_questions_by_hand() -> None:
    # Means: 0.75 in all, 0.5 and 1 by seed, 1 and 0.5 by question; every residual is 0.25 or -0.25.
    # M_seeds = 2 (2 * 0.0625) / 1, M_questions and M_rest likewise 0.25: the questions add nothing to the rest.
    assert half_width(np.array([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(12.7062 * math.sqrt(0.25 / 4), abs=1e-4)
    # Two seeds 0.2 apart on every question: the textbook's t interval of two numbers, 12.71 * 0.1414 / sqrt(2).
    assert half_width(np.array([[0.4] * 50, [0.6] * 50])) == pytest.approx(12.7062 * 0.1, abs=1e-4)
    assert half_width(np.full((3, 7), 0.3)) == 0.0


def test_an_interval_is_the_naive_double_sum() -> None:
    table_SQ = np.random.default_rng(3).random((3, 7))
    table_SQ[:, 0] += 3  # or the questions add nothing to the rest
    mean = sum(map(sum, table_SQ)) / 21
    seeds = [sum(row) / 7 for row in table_SQ]
    columns = [sum(column) / 3 for column in table_SQ.T]
    between_seeds = 7 * sum((seed - mean) ** 2 for seed in seeds) / 2
    between_questions = 3 * sum((column - mean) ** 2 for column in columns) / 6
    rest = sum((table_SQ[s][q] - seeds[s] - columns[q] + mean) ** 2 for s in range(3) for q in range(7)) / 12
    square = 4.302653**2 * between_seeds / 21 + 1.959964**2 * (between_questions - rest) / 21
    assert between_questions > rest and half_width(table_SQ) == pytest.approx(math.sqrt(square), rel=1e-5)


def test_seeds_that_score_alike_leave_the_questions_variance() -> None:
    run = scores(*[1.0] * 60, *[0.0] * 40)
    pooled, single = pooled_score([run, run, run]), estimate(run)
    assert pooled.by_seed == (0.6, 0.6, 0.6)
    assert pooled.ci95 == pytest.approx(single.ci95, abs=0.01), "two more copies of a run are no evidence"
    # Students that all are right everywhere may still be wrong somewhere: the interval has a width.
    assert pooled_score([scores(*[1.0] * 20)] * 3).ci95 == pytest.approx(wilson(1.0, 20), abs=1e-4)


def test_seeds_that_differ_widen_the_interval() -> None:
    runs = [scores(*[1.0] * (50 + shift), *[0.0] * (50 - shift)) for shift in (-10, 0, 10)]
    low, high = pooled_score(runs).ci95
    alone = estimate(runs[1]).ci95
    assert high - low > 1.7 * (alone[1] - alone[0])


@pytest.mark.parametrize("spread", [0.0, 0.6])
def test_the_interval_holds_the_truth_for_other_seeds_and_questions(spread: float) -> None:
    random = np.random.default_rng(7)
    truth = np.clip(0.6 + random.normal(0, spread / 6, 400_000), 0, 1).mean()
    held = 0
    for _ in range(300):
        chance_SQ = np.clip(random.beta(6, 4, 80)[None] + random.normal(0, spread / 6, (3, 1)), 0, 1)
        table_SQ = (random.random(chance_SQ.shape) < chance_SQ).astype(float)
        low, high = pooled_score([scores(*row) for row in table_SQ]).ci95
        held += low <= truth <= high
    assert held / 300 >= 0.93


def test_a_difference_is_paired_by_seed_and_question() -> None:
    random = np.random.default_rng(0)
    a, b = [], []
    for seed in range(3):
        # Runs and questions differ wildly; a is right on 10 % of the questions that b gets wrong, in every seed.
        right = random.random(400) < 0.3 + 0.2 * seed
        gained = random.random(400) < 0.1
        a.append(scores(*np.where(right | gained, 1.0, 0.0)))
        b.append(scores(*np.where(right, 1.0, 0.0)))
    found = pooled_difference(a, b)
    assert found.mean == pytest.approx(np.mean(found.by_seed))
    assert 0 < found.ci95[0] < found.mean < found.ci95[1] < 0.15
    assert pooled_difference(b, a).mean == pytest.approx(-found.mean)
    # No difference at all in 30 questions is not known to be none.
    same = [scores(*[1.0] * 30)] * 2
    half = 3.841459 / 33.841459
    assert pooled_difference(same, same).ci95 == pytest.approx((-half, half), abs=1e-6)


def test_pass_at_k_is_pooled_and_compared_like_a_score() -> None:
    run = {"a": [1.0, 1.0, 0.0, 0.0], "b": [0.0] * 4, "c": [1.0] * 4}
    assert pass_at_k_scores(run, 2) == {"a": [pytest.approx(5 / 6)], "b": [0.0], "c": [1.0]}
    assert pooled_score([pass_at_k_scores(run, 2)] * 2).mean == pytest.approx((5 / 6 + 1) / 3)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([scores(1, 0)], "at least two runs"),
        ([scores(1), scores(0)], "at least two questions"),
        ([scores(1, 0), scores(1, 0, 1)], "same questions"),
        ([scores(1, 0), scores(1, 2)], r"outside \[0, 1\]"),
    ],
)
def test_what_cannot_be_pooled_is_a_sentence(runs: list[Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        pooled_score(runs)
    if len(runs) > 1:
        with pytest.raises(UserError, match=r"same|two|outside"):
            pooled_difference(runs, runs)
    with pytest.raises(UserError, match="paired by seed"):
        pooled_difference(runs, [*runs, *runs])


def curve(*points: tuple[float, float]) -> list[Point]:
    return [Point(flops, score, score - 0.01) for flops, score in points]


RL = curve((0, 0.40), (10, 0.55), (20, 0.62), (30, 0.60), (40, 0.62))


def test_compute_at_equal_score_by_hand() -> None:
    found = compute_at_equal_score(curve((0, 0.40), (1, 0.50), (2, 0.62), (3, 0.95)), RL)
    # RL's best, 0.62, is first reached at 20; the other curve is there at 2.
    assert found == Crossing(Point(20, 0.62, 0.61), Point(2, 0.62, 0.61), 0.1)
    found = compute_at_equal_score(curve((1, 0.50), (30, 0.70)), RL)
    assert found.ratio == 1.5, "a result against the recipe is one like any other"


def test_a_score_that_is_never_reached_has_no_ratio() -> None:
    found = compute_at_equal_score(curve((1, 0.50), (2, 0.61)), RL)
    assert (found.reached, found.ratio, found.best.flops) == (None, None, 20)
    # RL that never improves on its start has cost nothing for its best.
    assert compute_at_equal_score(curve((0, 0.4), (1, 0.5)), curve((0, 0.4), (9, 0.3))).ratio is None
    assert compute_at_equal_score(curve((0, 0.7), (1, 0.8)), RL).ratio == 0.0


def test_the_ratio_over_seeds_is_a_geometric_mean_with_students_interval() -> None:
    ratios = (0.05, 0.10, 0.20)
    found = compute_at_equal_score_over_seeds([curve((20 * ratio, 0.9)) for ratio in ratios], [RL] * 3)
    assert found.ratio == pytest.approx(0.10)
    # Logs: log 0.1 and log 2 above and below; standard deviation log 2.
    factor = math.exp(4.302653 * math.log(2) / math.sqrt(3))
    assert found.ci95 == pytest.approx((0.1 / factor, 0.1 * factor), rel=1e-5)
    assert found.num_reached == 3
    one = compute_at_equal_score_over_seeds([curve((2, 0.9))], [RL])
    assert (one.ratio, one.ci95) == (0.1, None)
    missed = compute_at_equal_score_over_seeds([curve((2, 0.9)), curve((2, 0.5))], [RL] * 2)
    assert (missed.ratio, missed.ci95, missed.num_reached) == (None, None, 1)


def test_score_at_equal_compute_is_the_best_checkpoint_that_could_be_paid() -> None:
    assert score_at_compute(RL, 35) == RL[2], "what came after it scored less"
    assert score_at_compute(RL, 40) == RL[2], "the earliest of equals"
    assert score_at_compute(RL, 19) == RL[1]
    assert score_at_compute(RL[1:], 5) is None


@pytest.mark.parametrize("bad", [[], curve((1, 0.1), (1, 0.2)), curve((2, 0.1), (1, 0.2)), curve((-1, 0.1))])
def test_a_curve_that_is_none_is_a_sentence(bad: list[Point]) -> None:
    with pytest.raises(UserError, match="learning curve"):
        compute_at_equal_score(bad, RL)
    with pytest.raises(UserError, match="learning curve"):
        compute_at_equal_score(RL, bad)
    with pytest.raises(UserError, match="paired by seed"):
        compute_at_equal_score_over_seeds([RL], [])
