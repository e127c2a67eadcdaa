"""A mixture of experts on two processes: its load-balancing loss is each micro-batch's own; nothing else differs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from forked import run_processes
from test_student import EXAMPLES, PLAIN, cross_entropy

from distill.checkpoint import load_model, open_checkpoint
from distill.family import resolve
from distill.stage_config import Optimiser
from distill.types import Example
from distill.vllm.service import free_port
from students import student
from students.parallel import Engine
from students.ranks import ALONE, Ranks, joined_ranks
from students.student import Student

NUM_PROCESSES = 2
SHARES = [EXAMPLES[:4], EXAMPLES[4:]]
ENGINES: tuple[Engine, ...] = ("replicated", "sharded")
OFF_BY = {"loss": 1e-4, "grad_norm": 2e-3, "router.aux_loss": 3e-2}
"""How far, relatively, a step's numbers may be from those of a step in one micro-batch: a few times what they are."""

Curve = list[dict[str, float]]


def curve(ranks: Ranks, engine: Engine, examples: Sequence[Example], *, coefficient: float) -> Curve:
    model = load_model(open_checkpoint(resolve("nano-moe", role="student")), torch.float32, "cpu")
    model.config.router_aux_loss_coef = coefficient
    made = Student(model, PLAIN, stop_ids=(48, 49), ranks=ranks, engine=engine)
    made.begin(Optimiser(learning_rate=1e-3, warmup_steps=0))
    steps = [made.step(examples, cross_entropy, step=at, num_steps=4, where="a test") for at in range(4)]
    return [{name: step[name] for name in ("loss", "grad_norm", "router.aux_loss")} for step in steps]


def train(rank: int, folder: str, port: int) -> None:
    place = {"RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_RANK": str(rank)}
    os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with joined_ranks() as ranks:
        found: dict[str, Any] = {
            f"{engine}/{coefficient}": curve(ranks, engine, SHARES[rank], coefficient=coefficient)
            for engine in ENGINES
            for coefficient in (0.0, 0.01)
        }
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Curve]]:
    folder = tmp_path_factory.mktemp("balance")
    run_processes(train, (str(folder), free_port("127.0.0.1")), NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


def assert_same(ours: Curve, theirs: Curve, tolerance: float, *names: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_itself_does_not_depend_on_the_number_of_processes(
    results: list[dict[str, Curve]], engine: Engine
) -> None:
    expected = curve(ALONE, "alone", EXAMPLES, coefficient=0.0)
    for result in results:
        assert_same(result[f"{engine}/0.0"], expected, 1e-4, "loss", "grad_norm")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one_with_their_micro_batches(
    results: list[dict[str, Curve]], monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setattr(student, "micro_batches", lambda *_: SHARES)
    expected = curve(ALONE, "alone", EXAMPLES, coefficient=0.01)
    for result in results:
        assert_same(result[f"{engine}/0.01"], expected, 1e-4, "loss", "grad_norm", "router.aux_loss")


def test_the_balance_of_micro_batches_is_close_to_that_of_the_step(results: list[dict[str, Curve]]) -> None:
    expected = curve(ALONE, "alone", EXAMPLES, coefficient=0.01)
    for engine in ENGINES:
        ours = results[0][f"{engine}/0.01"]
        for name, tolerance in OFF_BY.items():
            assert_same(ours, expected, tolerance, name)
        assert ours[0]["router.aux_loss"] != pytest.approx(expected[0]["router.aux_loss"], rel=1e-4)
