"""Statistics against numbers worked out by hand, and the properties an interval must have."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from eval.statistics import estimate, paired_difference, pass_at_k, pass_at_k_estimate, wilson


def test_the_mean_is_over_questions_of_the_mean_over_samples() -> None:
    # 1/2 and 1 average to 3/4; pooling the samples would give 2/3 + ... = 4/5.
    result = estimate({"a": [1, 0], "b": [1, 1, 1]})
    assert result.mean == 0.75
    assert (result.num_questions, result.num_samples) == (2, 5)


def test_the_standard_error_is_clustered_by_question() -> None:
    # Question means 1, 0, 1, 1/2: mean 0.625, variance (0.140625 + 0.390625 + 0.140625 + 0.015625) / 3 = 0.6875 / 3.
    result = estimate([[1, 1], [0, 0], [1, 1], [1, 0]])
    assert result.standard_error == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    # Taking all eight samples as independent would claim less: sqrt(0.625 * 0.375 / 8) = 0.171.
    assert result.standard_error is not None and result.standard_error > 0.23


def test_one_binary_sample_a_question_is_the_textbook_wilson_interval() -> None:
    # 7 of 10: centre (0.7 + 0.192073) / 1.384146, half-width 1.959964 * sqrt(0.021 + 0.0096036) / 1.384146.
    result = estimate([[1]] * 7 + [[0]] * 3)
    assert result.ci95 == pytest.approx((0.396778, 0.892210), abs=1e-5)
    # 0 of 10: upper bound z^2 / (n + z^2).
    assert estimate([[0]] * 10).ci95 == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert estimate([[1]] * 10).ci95 == pytest.approx((1 - 3.841459 / 13.841459, 1.0), abs=1e-6)


def test_repeated_samples_that_say_nothing_new_do_not_narrow_the_interval() -> None:
    once = [[1]] * 7 + [[0]] * 3
    assert estimate([row * 16 for row in once]).ci95 == pytest.approx(estimate(once).ci95)


def test_repeated_samples_that_are_independent_narrow_it_to_all_samples() -> None:
    # Every question is right half of the time: 40 samples count as 40, not as 10.
    assert estimate([[1, 0, 1, 0]] * 10).ci95 == pytest.approx(wilson(0.5, 40))


def test_no_width_is_claimed_from_scores_that_do_not_vary() -> None:
    for score in (0, 1):
        low, high = estimate([[score] * 8] * 20).ci95
        assert high - low == pytest.approx(3.841459 / 23.841459, abs=1e-6)


def test_a_single_question_is_wide_and_has_no_standard_error() -> None:
    result = estimate([[1, 0, 1, 0, 1, 0]])
    assert result.standard_error is None
    assert result.ci95[1] - result.ci95[0] > 0.75
    json.dumps(result.ci95, allow_nan=False)


@given(st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=6), min_size=1, max_size=12))
def test_an_interval_stays_within_0_and_1_and_holds_the_mean(scores: list[list[int]]) -> None:
    result = estimate(scores)
    assert 0.0 <= result.ci95[0] <= result.mean <= result.ci95[1] <= 1.0
    assert result.ci95[0] < result.ci95[1]


def test_the_interval_covers_the_truth_where_questions_differ_in_difficulty() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        right_N = random.binomial(4, random.beta(2.0, 0.5, 60))
        low, high = estimate([[1] * right + [0] * (4 - right) for right in right_N.tolist()]).ci95
        covered += low <= 0.8 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(5, 1, 1) == pytest.approx(0.2)
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10, 6, 5) == 1.0


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n, c, k in [(6, 1, 3), (6, 2, 4), (7, 3, 2)]:
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_stable_where_binomials_overflow() -> None:
    # One right in 10,000: the chance that 5,000 drawn hold it is exactly one half.
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, abs=1e-9)
    assert pass_at_k(10_000, 3, 1) == pytest.approx(3e-4, rel=1e-9)


@pytest.mark.parametrize("arguments", [(4, 2, 5), (4, 5, 2), (4, -1, 2), (4, 2, 0)])
def test_pass_at_k_refuses_what_it_cannot_estimate(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(UserError):
        pass_at_k(*arguments)


def test_pass_at_k_estimate_averages_over_questions() -> None:
    result = pass_at_k_estimate({"a": [1, 1, 0, 0], "b": [0, 0, 0, 0]}, 2)
    assert result.mean == pytest.approx((5 / 6 + 0) / 2)
    assert (result.num_questions, result.num_samples) == (2, 8)


def test_a_paired_difference_is_narrower_than_the_two_intervals() -> None:
    # Question difficulty differs wildly; b loses exactly every tenth question that a gets right.
    a = {f"q{i:03}": [1.0 if i % 2 else 0.0] for i in range(200)}
    b = {key: [0.0 if place % 20 == 1 else row[0]] for place, (key, row) in enumerate(a.items())}
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(0.05)
    assert 0.015 < difference.ci95[0] < 0.05 < difference.ci95[1] < 0.085
    unpaired = estimate(a).ci95
    assert difference.ci95[1] - difference.ci95[0] < 0.5 * (unpaired[1] - unpaired[0])


def test_a_paired_difference_pairs_by_id_and_changes_sign() -> None:
    a = {"x": [1.0, 1.0], "y": [0.0], "z": [1.0]}
    b = {"z": [1.0], "x": [0.0], "y": [0.0]}
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert forward.mean == pytest.approx(1 / 3)
    assert backward.mean == pytest.approx(-1 / 3)


def test_no_difference_in_a_few_questions_is_not_known_to_be_none() -> None:
    run = {str(number): [float(number % 2)] for number in range(30)}
    half = 3.841459 / 33.841459
    assert paired_difference(run, run).ci95 == pytest.approx((-half, half), abs=1e-6)
    won, lost = ({key: [value] for key in run} for value in (1.0, 0.0))
    assert paired_difference(won, lost).ci95 == pytest.approx((1 - half, 1.0), abs=1e-6)


def test_a_paired_difference_is_a_function_of_the_seed_alone() -> None:
    a = {str(i): [(i * 37 % 101) / 101] for i in range(50)}
    b = {str(i): [(i * 53 % 97) / 97] for i in range(50)}
    assert paired_difference(a, b, seed=3) == paired_difference(dict(reversed(a.items())), b, seed=3)
    assert paired_difference(a, b, seed=3) != paired_difference(a, b, seed=4)


def test_one_question_proves_no_difference() -> None:
    assert paired_difference({"a": [1.0]}, {"a": [0.0]}).ci95 == (-1.0, 1.0)


def test_a_paired_difference_refuses_other_questions() -> None:
    with pytest.raises(UserError, match=r"same questions.*for example b"):
        paired_difference({"a": [1.0]}, {"a": [1.0], "b": [0.0]})


def test_scores_that_are_no_scores_are_refused() -> None:
    for scores in ([], [[]], [[0.5], [1.5]]):
        with pytest.raises(UserError):
            estimate(scores)
