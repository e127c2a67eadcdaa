"""What two processes make of shares that are not alike: their sums are those of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.costs import Cost
from distill.vllm.service import free_port
from pipelines.meter import Meter
from students.ranks import Ranks, joined_ranks

NUM_PROCESSES = 2
SPENT: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "alike": ({"teacher_score": 1, "verify": 10}, {"teacher_score": 100, "verify": 1000}),
    # A teacher has a line from the first response on that it judges.
    "in another order": (
        {"teacher_score.sums": 1, "teacher_score": 10},
        {"teacher_score": 100, "teacher_score.sums": 1000},
    ),
    "each with a domain of its own": ({"teacher_score.sums": 1}, {"teacher_score.words": 100}),
    "one has nothing": ({}, {"teacher_score": 100}),
}
"""Tokens of each role, by process."""


def spend(ranks: Ranks, spent: dict[str, int]) -> dict[str, list[int]]:
    """Each role's tokens after each of two steps, and what another stage had spent."""
    meter, found = Meter(), dict[str, list[int]]()
    meter.account.charge("student_sample", "other", Cost(tokens=7))
    for _ in range(2):
        before = meter.account.of_stage("stage")
        for role, tokens in spent.items():
            meter.account.charge(role, "stage", Cost(tokens, flops=2.0 * tokens, seconds=0.5, reused_tokens=tokens))
        meter.pool("stage", before, ranks)
        for role, cost in meter.account.of_stage("stage").items():
            assert (cost.flops, cost.reused_tokens) == (2.0 * cost.tokens, cost.tokens)
            found.setdefault(role, []).append(cost.tokens)
    found["other"] = [cost.tokens for cost in meter.account.of_stage("other").values()]
    return found


def work(number: int, folder: str, port: int) -> None:
    place = {"RANK": str(number), "WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_RANK": str(number)}
    os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with joined_ranks() as ranks:
        torch.save({name: spend(ranks, spent[number]) for name, spent in SPENT.items()}, f"{folder}/{number}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("pooling")
    torch.multiprocessing.spawn(work, (str(folder), free_port("127.0.0.1")), nprocs=NUM_PROCESSES)
    return [torch.load(folder / f"{number}.pt") for number in range(NUM_PROCESSES)]


@pytest.mark.parametrize("case", SPENT)
def test_costs_are_summed_by_role_whoever_had_work_for_it(results: list[dict[str, Any]], case: str) -> None:
    roles = dict.fromkeys(role for spent in SPENT[case] for role in spent)
    a_step = {role: sum(spent.get(role, 0) for spent in SPENT[case]) for role in roles}
    for found in results:
        assert found[case] == {"other": [7], **{role: [tokens, 2 * tokens] for role, tokens in a_step.items()}}
    # The run's document is the main process's.
    assert list(results[0][case]) == [*roles, "other"]
