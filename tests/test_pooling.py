"""What processes make of shares that are not alike: together they spend, and learn, what one process does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from forked import run_processes
from test_overlap import NANO, Rewarded, real_crew

from benchmarks.loop import crew_of, encoder, metrics_of
from benchmarks.simulated import simulated_crew
from distill.checkpoint import load_model
from distill.costs import Cost
from distill.model_config import StudentSettings
from distill.sampler import TransformersSampler
from distill.stage_config import Optimiser
from distill.types import Example, Rollout
from distill.vllm.service import free_port
from pipelines.batches import AtOnce
from pipelines.crew import student_requests
from pipelines.loop import _own_updates
from pipelines.meter import Meter
from students.ranks import ALONE, Item, Ranks, joined_ranks
from students.student import Student

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


def reward(ranks: Ranks) -> dict[str, Any]:
    """Two steps of three updates each: the responses of every update, by their seeds, and the first step's metrics."""
    torch.manual_seed(0)
    student = Student(
        load_model(NANO, torch.float32, "cpu"),
        StudentSettings(dtype="float32", gradient_checkpointing=False, micro_batch_tokens=None),
        stop_ids=encoder().stop_ids,
        ranks=ranks,
        engine="alone" if ranks.count == 1 else "replicated",
    )
    student.begin(Optimiser(learning_rate=2e-4, warmup_steps=0))
    sampler = TransformersSampler(student.model, encoder(), speaker="student")
    teachers = simulated_crew(sample=0, score=0, train=0).teachers
    stage = Rewarded(replace(crew_of(teachers, student, sampler, NANO.shape), ranks=ranks), 2, updates_per_step=3)
    stage.verifier.verdicts = lambda said: [place % 2 == 0 for place, _ in enumerate(said)]  # type: ignore[method-assign]
    step, seen = student.step, list[list[int]]()

    def watched(examples: Sequence[Example], *arguments: Any, **options: Any) -> dict[str, Any]:
        seen.append([example.rollout.request.seed for example in examples])
        return step(examples, *arguments, **options)

    student.step = watched  # type: ignore[method-assign]
    first = metrics_of(stage, stage.crew, AtOnce(stage, stage.crew))[0]
    return {"updates": seen, "metrics": first}


def work(number: int, folder: str, port: int) -> None:
    place = {"RANK": str(number), "WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_RANK": str(number)}
    os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with joined_ranks() as ranks:
        found = {name: spend(ranks, spent[number]) for name, spent in SPENT.items()}
        torch.save({**found, "rewarded": reward(ranks)}, f"{folder}/{number}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("pooling")
    run_processes(work, (str(folder), free_port("127.0.0.1")), NUM_PROCESSES)
    return [torch.load(folder / f"{number}.pt") for number in range(NUM_PROCESSES)]


@pytest.mark.parametrize("case", SPENT)
def test_costs_are_summed_by_role_whoever_had_work_for_it(results: list[dict[str, Any]], case: str) -> None:
    roles = dict.fromkeys(role for spent in SPENT[case] for role in spent)
    a_step = {role: sum(spent.get(role, 0) for spent in SPENT[case]) for role in roles}
    for found in results:
        assert found[case] == {"other": [7], **{role: [tokens, 2 * tokens] for role, tokens in a_step.items()}}
    # The run's document is the main process's.
    assert list(results[0][case]) == [*roles, "other"]


@dataclass(frozen=True, slots=True)
class Told(Ranks):
    """A process that has been told what the others say: eight real ones would take long to start."""

    said: tuple[int, ...] = ()

    def gather(self, item: Item) -> list[Item]:
        assert item == self.said[self.number]
        return cast(list[Item], list(self.said))


@pytest.mark.parametrize(
    ("equal", "expected"),
    [
        ((), [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ((0, 3), [[1, 6], [2, 7], [4], [5]]),
        # Less than an update each: the last is left out, whoever has the groups.
        ((0, 1, 2, 5, 7), [[3], [4], [6], []]),
    ],
)
def test_groups_are_dealt_to_updates_as_one_process_deals_them(equal: Sequence[int], expected: list[list[int]]) -> None:
    crew = real_crew()
    stage = Rewarded(crew, 1, updates_per_step=4)
    asked = student_requests(crew.prompts.batch(0, 8), stage.settings, encoder(), seed=0, stage="rl", first=0)
    rollouts = [Rollout(one, (5, encoder().stop_ids[0]), (False,) * 2, (-1.0,) * 2, "stop", "student") for one in asked]
    groups = {one.seed: place // 4 for place, one in enumerate(asked)}
    right = {one.seed: place % 4 == 0 and place // 4 not in equal for place, one in enumerate(asked)}
    stage.verifier.verdicts = lambda said: [right[one.request.seed] for one in said]  # type: ignore[method-assign]
    for count in (1, 2, 4, 8):
        judged = [stage.signal(Ranks(number, count).share(rollouts, block=4)) for number in range(count)]
        said = tuple(one.num_dealt for one in judged)
        own = [_own_updates(one, Told(number, count, said)) for number, one in enumerate(judged)]
        dealt = [[groups[x.rollout.request.seed] for part in parts for x in part] for parts in zip(*own, strict=True)]
        assert dealt == [[group for group in update for _ in range(4)] for update in expected], count


def test_two_processes_make_the_updates_of_one(results: list[dict[str, Any]]) -> None:
    alone = reward(ALONE)
    first, second = (found["rewarded"] for found in results)
    together = [ours + theirs for ours, theirs in zip(first["updates"], second["updates"], strict=True)]
    assert len(together) == 6 and together == alone["updates"]
    ours, theirs = first["metrics"], alone["metrics"]
    assert ours["num_tokens"] == theirs["num_tokens"] > 0
    for key in ("loss", "grad_norm", "student_entropy", "think.student_entropy", "no_think.student_entropy"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
