"""A student in slices on two real processes: its head is gathered once a step, and never an old one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_processes
from test_student import PLAIN, cross_entropy, dense, rollout
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.errors import DistillError, StoppedError
from distill.interrupt import deferred_signals
from distill.stage_config import Optimiser
from distill.types import Example
from students.batch import micro_batches
from students.loss import Felt, Rows
from students.parallel import full
from students.ranks import ALONE, Ranks
from students.rescoring import measured, most_probable
from students.student import Student

NUM_PROCESSES, NUM_STEPS = 2, 4
EXAMPLES = [Example(rollout(seed, 3 + seed, 9 - seed, forced=seed % 3)) for seed in range(7)]
SHARES = EXAMPLES[:4], EXAMPLES[4:]
BUDGETS = {1: None, 4: 12}
"""Tokens of a micro-batch, by how many a step then has; the second process, whose share is smaller, has one fewer."""

Gathers = dict[int, int]
"""How many all-gathers there were, by how many values came of them."""


class FailedLossError(DistillError):
    pass


def learner(ranks: Ranks, *, tied: bool, budget: int | None) -> Student:
    # Layers run a second time in backward, or do not.
    settings = PLAIN.model_copy(update={"micro_batch_tokens": budget, "gradient_checkpointing": not tied})
    model = dense(tie_word_embeddings=tied)
    engine: Any = "alone" if ranks.count == 1 else "sharded"
    made = Student(model, settings, stop_ids=(48, 49), ranks=ranks, engine=engine)
    made.begin(Optimiser(learning_rate=1e-2, warmup_steps=0))
    return made


def take(made: Student, ranks: Ranks, at: int, loss: Callable[[Rows], Felt] = cross_entropy) -> dict[str, float]:
    share = EXAMPLES if ranks.count == 1 else SHARES[ranks.number]
    metrics = made.step(share, loss, step=at, num_steps=NUM_STEPS, where="a test")
    return {name: metrics[name] for name in ("loss", "grad_norm", "sampled_logprob")}


def curve(made: Student, ranks: Ranks) -> list[dict[str, float]]:
    taken = []
    for at in range(NUM_STEPS):
        taken.append(take(made, ranks, at))
        if at == 1:
            # Passes that are no part of a step, between two.
            with made.whole():
                values = [said["sampled_logprob"] for said in measured(made, EXAMPLES, cross_entropy)]
            taken.append({"felt": float(torch.cat(values).mean())})
    return taken


def is_in_slices(made: Student) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in made.model.parameters())


def count(gathers: Gathers) -> None:
    """Have every all-gather of a tensor noted."""
    real = dist.all_gather_single

    def noted(output: Tensor, *arguments: Any, **options: Any) -> Any:
        gathers[output.numel()] = gathers.get(output.numel(), 0) + 1
        return real(output, *arguments, **options)

    dist.all_gather_single = noted


def fails_at(pass_number: int, failure: Callable[[], None]) -> Callable[[Rows], Felt]:
    """The loss, which does something else besides at one of its passes."""
    passes = []

    def loss(rows: Rows) -> Felt:
        passes.append(rows)
        if len(passes) == pass_number:
            failure()
        return cross_entropy(rows)

    return loss


def fail() -> None:
    raise FailedLossError("the loss could not be had")


def interrupted(ranks: Ranks, failure: Callable[[], None], error: type[DistillError]) -> dict[str, Any]:
    """A step that ends in its second micro-batch or behind it, and how a whole run goes after it."""
    made = learner(ranks, tied=True, budget=BUDGETS[4])
    before = {name: full(value.detach()).clone() for name, value in made.model.named_parameters()}
    with deferred_signals(), pytest.raises(error):
        take(made, ranks, 0, fails_at(2, failure))
    in_slices = is_in_slices(made)
    same = all(torch.equal(full(value), before[name]) for name, value in made.model.named_parameters())
    return {"in_slices": in_slices, "same": same, "curve": curve(made, ranks)}


def asked_at_its_own_pace(ranks: Ranks) -> dict[str, Any]:
    """What a student that is whole says to one process, which asks it twice where the other asks nothing."""
    made = learner(ranks, tied=True, budget=None)
    with made.whole():
        with made.whole():
            pass
        stays_whole = not any(isinstance(parameter, DTensor) for parameter in made.model.parameters())
        times = 2 - 2 * ranks.number if stays_whole else 0
        said = [most_probable(made, [example.rollout for example in EXAMPLES], 4) for _ in range(times)]
    return {"stays_whole": stays_whole, "in_slices": is_in_slices(made), "said": said, "curve": curve(made, ranks)}


def train_in_slices(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", NUM_PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES)
    ranks = Ranks(rank, NUM_PROCESSES)
    gathers: Gathers = {}
    count(gathers)
    found: dict[str, Any] = {}
    for tied in (True, False):
        for num_passes, budget in BUDGETS.items():
            made = learner(ranks, tied=tied, budget=budget)
            gathers.clear()
            step = take(made, ranks, 0)
            counted, in_slices = dict(gathers), is_in_slices(made)
            made = learner(ranks, tied=tied, budget=budget)
            curved = curve(made, ranks)
            weights = made.weights()
            found[f"{tied}/{num_passes}"] = {
                "curve": curved,
                "step": step,
                "gathers": counted,
                "in_slices": in_slices and is_in_slices(made),
                "weights": weights,
            }
    # Of one process: the other hears of it between the micro-batches.
    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 1 else lambda: None
    found["stopped"] = interrupted(ranks, stop, StoppedError)
    found["failed"] = interrupted(ranks, fail, FailedLossError)
    found["asked"] = asked_at_its_own_pace(ranks)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("slices")
    run_processes(train_in_slices, (str(folder),), NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


def group_sizes(*, tied: bool) -> tuple[int, int]:
    """Values of the group of the whole, and of a layer's."""
    sizes = {name: value.numel() for name, value in dense(tie_word_embeddings=tied).named_parameters()}
    layer = sum(size for name, size in sizes.items() if "layers.0." in name)
    return sum(size for name, size in sizes.items() if "layers." not in name), layer


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_passes", BUDGETS)
def test_several_steps_are_those_of_one_process(results: list[dict[str, Any]], *, tied: bool, num_passes: int) -> None:
    """A head that stayed gathered over an optimiser step would be an old one."""
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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_passes", BUDGETS)
def test_the_head_is_gathered_once_a_step(results: list[dict[str, Any]], *, tied: bool, num_passes: int) -> None:
    assert max(len(micro_batches(share, BUDGETS[num_passes])) for share in SHARES) == num_passes
    whole, layer = group_sizes(tied=tied)
    for result in results:
        # Each of the two layers in every pass, forward and backward.
        assert result[f"{tied}/{num_passes}"]["gathers"] == {whole: 1, layer: 2 * 2 * num_passes}


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_a_step_that_is_cut_short_leaves_slices(results: list[dict[str, Any]], end: str) -> None:
    """And nothing else: a run that goes on from there is one that never met it."""
    expected = curve(learner(ALONE, tied=True, budget=None), ALONE)
    for result in results:
        assert result[end]["in_slices"] and result[end]["same"]
        assert_same(result[end]["curve"], expected)


def test_a_process_may_ask_a_student_that_is_whole_as_often_as_it_likes(results: list[dict[str, Any]]) -> None:
    """As two teachers do who judge ids that the student chose: how many there are differs between the processes."""
    alone = learner(ALONE, tied=True, budget=None)
    expected = most_probable(alone, [example.rollout for example in EXAMPLES], 4)
    assert all(result["asked"]["stays_whole"] and result["asked"]["in_slices"] for result in results)
    main, other = (result["asked"]["said"] for result in results)
    assert len(main) == 2 and not other
    for said in main:
        for ours, theirs in zip(said, expected, strict=True):
            assert torch.equal(ours, theirs)
    went_on = curve(alone, ALONE)
    for result in results:
        assert_same(result["asked"]["curve"], went_on)
