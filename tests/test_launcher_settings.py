"""What ``accelerate launch`` puts into the environment changes no number of a run: its recipe says how to train."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from forked import run_processes
from test_student import EXAMPLES, PLAIN, cross_entropy, dense
from torch import Tensor

from distill.checkpoint import load_model, open_checkpoint
from distill.family import resolve
from distill.stage_config import Optimiser
from distill.vllm.service import free_port
from students.parallel import Engine
from students.ranks import joined_ranks
from students.student import Student

NUM_PROCESSES = 2
SAID = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_IGNORED_MODULES": ".*",  # their gradients would not be summed
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # transformers would load the weights in the first process alone
}


def curve(made: Student, share: slice) -> list[float]:
    made.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    steps = [made.step(EXAMPLES[share], cross_entropy, step=at, num_steps=3, where="a test") for at in range(3)]
    return [step[name] for step in steps for name in ("loss", "grad_norm")]


def weights_of_nano() -> dict[str, Tensor]:
    return load_model(open_checkpoint(resolve("nano", role="student")), torch.float32, "cpu").state_dict()


def train(rank: int, folder: str, port: int) -> None:
    place = {"RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_RANK": str(rank)}
    os.environ.update({**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **SAID})
    share = slice(0, 4) if rank == 0 else slice(4, None)
    engines: tuple[Engine, ...] = ("replicated", "sharded")
    with joined_ranks() as ranks:
        found: dict[str, Any] = {"loaded": weights_of_nano()}
        # Whoever makes a student in processes of his own is safe from a cast and a compiler as well.
        os.environ.update({name: SAID[name] for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")})
        for engine in engines:
            made = Student(dense(), PLAIN, stop_ids=(48, 49), ranks=ranks, engine=engine)
            found[engine] = curve(made, share)
            found[f"{engine} is compiled"] = hasattr(made._pass, "_orig_mod")
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("launched")
    run_processes(train, (str(folder), free_port("127.0.0.1")), NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("engine", ["replicated", "sharded"])
def test_the_curve_is_that_of_one_process(results: list[dict[str, Any]], engine: str) -> None:
    expected = curve(Student(dense(), PLAIN, stop_ids=(48, 49)), slice(None))
    for result in results:
        assert result[engine] == pytest.approx(expected, rel=1e-5)  # bf16 would be off by 1e-3
        assert not result[f"{engine} is compiled"]


def test_every_process_loads_the_weights(results: list[dict[str, Any]]) -> None:
    weights = weights_of_nano()
    for result in results:
        assert result["loaded"].keys() == weights.keys()
        assert all(torch.equal(result["loaded"][name], value) for name, value in weights.items())
