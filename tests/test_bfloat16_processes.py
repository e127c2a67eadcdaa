"""A bfloat16 student on two processes: what is 16 bits wide is its weights and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from forked import run_processes
from test_student import EXAMPLES, PLAIN, cross_entropy, dense

from distill.model_config import LoraSettings
from distill.stage_config import Optimiser
from distill.types import Example
from distill.vllm.service import free_port
from students.loss import Felt, Rows
from students.parallel import Engine
from students.ranks import ALONE, Ranks, joined_ranks
from students.student import Student

NUM_PROCESSES, NUM_STEPS = 2, 4
WAYS: tuple[tuple[Engine, int | None], ...] = (("replicated", None), ("replicated", 4), ("sharded", None))
"""An engine, and the rank of adapters."""
SHARES = {"even": [EXAMPLES[:4], EXAMPLES[4:]], "one has none": [EXAMPLES, []]}

Curve = list[dict[str, float]]


def curve(ranks: Ranks, engine: Engine, rank: int | None, examples: Sequence[Example]) -> tuple[Curve, set[str]]:
    """A few steps' numbers, and the number types of what the loss is given beside the states."""
    lora = None if rank is None else LoraSettings(rank=rank, alpha=64.0)
    settings = PLAIN.model_copy(update={"dtype": "bfloat16", "micro_batch_tokens": 24, "lora": lora})
    model = dense(tie_word_embeddings=rank is None).bfloat16()
    torch.manual_seed(1)  # the adapters'
    made = Student(model, settings, stop_ids=(48, 49), ranks=ranks, engine=engine)
    made.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    seen: set[str] = set()

    def loss(rows: Rows) -> Felt:
        seen.update(str(x.dtype) for x in (rows.batch.weight_N, rows.batch.sampled_logprob_N))
        return cross_entropy(rows)

    steps = [made.step(examples, loss, step=at, num_steps=NUM_STEPS, where="a test") for at in range(NUM_STEPS)]
    return [{name: step[name] for name in ("loss", "grad_norm")} for step in steps], seen


def train(number: int, folder: str, port: int) -> None:
    place = {"RANK": str(number), "WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_RANK": str(number)}
    os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with joined_ranks() as ranks:
        found = {
            (engine, rank, name): curve(ranks, engine, rank, shares[number])
            for engine, rank in WAYS
            for name, shares in SHARES.items()
        }
    torch.save(found, f"{folder}/{number}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, tuple[Curve, set[str]]]]:
    folder = tmp_path_factory.mktemp("bfloat16")
    run_processes(train, (str(folder), free_port("127.0.0.1")), NUM_PROCESSES)
    return [torch.load(folder / f"{number}.pt") for number in range(NUM_PROCESSES)]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(("engine", "rank"), WAYS)
def test_two_processes_are_one(results: list[Any], engine: Engine, rank: int | None, shares: str) -> None:
    expected, _ = curve(ALONE, "alone", rank, EXAMPLES)
    for result in results:
        ours, seen = result[engine, rank, shares]
        assert seen <= {"torch.float32"}
        # The first step is the same but for the order of sums; later ones see weights that were rounded otherwise.
        assert ours[0] == pytest.approx(expected[0], rel=2e-4)
        for a, b in zip(ours, expected, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]
