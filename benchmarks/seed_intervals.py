"""How often a 95 % interval over seeds and questions holds the truth: `python -m benchmarks.seed_intervals`.

Simulated students differ by seed (a normal shift of all log odds), questions by difficulty (a beta distribution). The
interval of `eval.seeds` against a bootstrap that resamples seeds and questions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval.seeds import pooled_score

NUM_TRIALS = 400
NUM_RESAMPLES = 400

Table = NDArray[np.float64]


def chance(difficulty: NDArray[np.float64], shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance of a right answer where a seed shifts the log odds."""
    odds = difficulty / (1 - difficulty + 1e-12) * np.exp(shift)
    return odds / (1 + odds)


def drawn(random: np.random.Generator, num_seeds: int, num_questions: int, spread: float) -> Table:
    """One 0/1 sample a seed and question."""
    difficulty_Q = random.beta(1.0, 0.6, num_questions)
    chance_SQ = chance(difficulty_Q, random.normal(0.0, spread, (num_seeds, 1)))
    return (random.random(chance_SQ.shape) < chance_SQ).astype(float)


def truth(spread: float) -> float:
    random = np.random.default_rng(1)
    return float(chance(random.beta(1.0, 0.6, 400_000), random.normal(0.0, spread, 400_000)).mean())


def two_way(table_SQ: Table) -> tuple[float, float]:
    return pooled_score([{str(at): [float(value)] for at, value in enumerate(row)} for row in table_SQ]).ci95


def bootstrap(table_SQ: Table, random: np.random.Generator) -> tuple[float, float]:
    num_seeds, num_questions = table_SQ.shape
    means = [
        table_SQ[random.integers(num_seeds, size=num_seeds)][
            :, random.integers(num_questions, size=num_questions)
        ].mean()
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    print(f"{'seeds':>5} {'questions':>9} {'spread':>6}   {'eval.seeds: holds, width':>22}   {'bootstrap':>14}")
    random = np.random.default_rng(0)
    for num_seeds in (3, 5):
        for num_questions in (64, 512):
            for spread in (0.0, 0.2, 0.6):
                value = truth(spread)
                found: list[list[tuple[float, float]]] = [[], []]
                for _ in range(NUM_TRIALS):
                    table_SQ = drawn(random, num_seeds, num_questions, spread)
                    found[0].append(two_way(table_SQ))
                    found[1].append(bootstrap(table_SQ, random))
                holds = [sum(low <= value <= high for low, high in one) / NUM_TRIALS for one in found]
                width = [sum(high - low for low, high in one) / NUM_TRIALS for one in found]
                print(
                    f"{num_seeds:5} {num_questions:9} {spread:6.1f}   {holds[0]:14.1%} {width[0]:7.3f}   "
                    f"{holds[1]:6.1%} {width[1]:7.3f}"
                )


if __name__ == "__main__":
    main()
