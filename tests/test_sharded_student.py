"""A student in slices on two real processes: the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_student import PLAIN, cross_entropy, dense, rollout
from torch.distributed.tensor import DTensor

from distill.stage_config import Optimiser
from distill.types import Example
from students.ranks import ALONE, Ranks
from students.student import Student

NUM_PROCESSES, NUM_STEPS = 2, 4
EXAMPLES = [Example(rollout(seed, 3 + seed, 9 - seed, forced=seed % 3)) for seed in range(7)]
SHARES = EXAMPLES[:4], EXAMPLES[4:]
BUDGETS = {1: None, 4: 12}
"""Tokens of a micro-batch, by how many a step then has; the second process, whose share is smaller, has one fewer."""


def learner(ranks: Ranks, *, tied: bool, budget: int | None) -> Student:
    settings = PLAIN.model_copy(update={"micro_batch_tokens": budget})
    model = dense(tie_word_embeddings=tied)
    engine: Any = "alone" if ranks.count == 1 else "sharded"
    made = Student(model, settings, stop_ids=(48, 49), ranks=ranks, engine=engine)
    made.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    return made


def take(made: Student, ranks: Ranks, at: int) -> dict[str, float]:
    share = EXAMPLES if ranks.count == 1 else SHARES[ranks.number]
    metrics = made.step(share, cross_entropy, step=at, num_steps=NUM_STEPS, where="a test")
    return {name: metrics[name] for name in ("loss", "grad_norm", "sampled_logprob")}


def curve(made: Student, ranks: Ranks) -> list[dict[str, float]]:
    taken = []
    for at in range(NUM_STEPS):
        taken.append(take(made, ranks, at))
        if at == 1:
            # Passes that are no part of a step, between two.
            with made.whole():
                values = [felt["sampled_logprob"] for felt in made.felt(EXAMPLES, cross_entropy)]
            taken.append({"felt": float(torch.cat(values).mean())})
    return taken


def is_in_slices(made: Student) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in made.model.parameters())


def train_in_slices(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", NUM_PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES)
    ranks = Ranks(rank, NUM_PROCESSES)
    found: dict[str, Any] = {}
    for tied in (True, False):
        for num_passes, budget in BUDGETS.items():
            made = learner(ranks, tied=tied, budget=budget)
            curved = curve(made, ranks)
            weights = made.weights()
            found[f"{tied}/{num_passes}"] = {
                "curve": curved,
                "in_slices": is_in_slices(made),
                "weights": weights,
            }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("slices")
    torch.multiprocessing.spawn(train_in_slices, (str(folder),), nprocs=NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_passes", BUDGETS)
def test_several_steps_are_those_of_one_process(results: list[dict[str, Any]], *, tied: bool, num_passes: int) -> None:
    """From the first one on, with nothing between the student's making and its training."""
    alone = learner(ALONE, tied=tied, budget=None)
    expected = curve(alone, ALONE)
    assert expected[-1]["loss"] < 0.8 * expected[0]["loss"]
    for result in results:
        assert_same(result[f"{tied}/{num_passes}"]["curve"], expected)
        assert result[f"{tied}/{num_passes}"]["in_slices"]
    weights = results[0][f"{tied}/{num_passes}"]["weights"]
    assert weights.keys() == alone.weights().keys()
    for name, value in alone.weights().items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=1e-3)
