"""What of a transfer that went wrong is noticed, with stand-ins for vLLM that hold a copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.checkpoint import load_model, open_checkpoint
from distill.cross_entropy import linear_cross_entropy
from distill.family import resolve
from distill.model_config import StudentSettings
from distill.stage_config import Optimiser
from distill.types import Example, Prompt, Request, Rollout, Sampling
from distill.vllm.worker import fingerprint
from students.loss import Felt, Rows
from students.rescoring import rescore
from students.student import Student
from students.vllm_sampler import TOLERANCE, Scores, VllmSampler
from students.weight_sync import FileSync, MemorySync, WeightsError

NANO = open_checkpoint(resolve("nano", role="student"))
Dtype = Literal["float32", "bfloat16"]
pytestmark = pytest.mark.parametrize("dtype", get_args(Dtype))
SPOILT = "model.layers.1.mlp.down_proj.weight"
BEHIND: dict[Dtype, str] = {
    "float32": "the gap of .* is above sampler.tolerance 0.0001",
    "bfloat16": r"the trainer's log-probabilities of the probes' tokens have changed by up to 0\.\d+, the sampler's by "
    r"exactly 0; set another sampler\.sync",
}


def student(dtype: Dtype, *, learning_rate: float = 2e-6, warmup_steps: int = 0) -> Student:
    settings = StudentSettings(dtype=dtype, gradient_checkpointing=False)
    found = Student(load_model(NANO, getattr(torch, dtype), torch.device("cpu")), settings, stop_ids=[0])
    found.begin(Optimiser(learning_rate=learning_rate, warmup_steps=warmup_steps))
    return found


def train(learner: Student, step: int) -> None:
    """A step of cross-entropy on what nobody said."""

    def loss(rows: Rows) -> Felt:
        felt = linear_cross_entropy(rows.hidden_ND, rows.head_VD, rows.batch.target_N, weights=rows.batch.weight_N)
        return Felt(felt.total, {})

    examples = [Example(rollout(4 * step + number)) for number in range(4)]
    learner.step(examples, loss, step=step, num_steps=100, where="a test")


def rollout(seed: int) -> Rollout:
    ids = np.random.default_rng(seed).integers(NANO.shape.vocabulary, size=30).tolist()
    request = Request(Prompt(()), "think", "hard", tuple(ids[:10]), Sampling(20), seed)
    return Rollout(request, tuple(ids[10:]), (False,) * 20, (-1.0,) * 20, "length", "nobody")


class Copy:
    """A speaker with weights of its own."""

    model: str | None = None
    weight_version = 0
    vocabulary = NANO.shape.vocabulary

    def __init__(self, learner: Student) -> None:
        self.own = copy.deepcopy(learner)
        self.probes: list[Rollout] = []

    def ready(self) -> None: ...

    def forget_prefixes(self) -> None: ...

    def generate(self, requests: Sequence[Request], on_finished: Any = None) -> list[Rollout]:
        return []

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [one.token_R.tolist() for one in rescore(self.own, self.probes)]


class Transfer:
    """Into a copy, as whole weights go; ``lost`` of them from the second on, or all ``late`` by one."""

    def __init__(self, learner: Student, speaker: Copy, *, lost: bool = False, late: bool = False) -> None:
        self.learner, self.speaker, self.lost, self.late = learner, speaker, lost, late
        self.queue: list[Mapping[str, Tensor]] = []

    def send(self) -> None:
        self.queue.append({name: value.clone() for name, value in self.learner.model.state_dict().items()})
        if not self.lost:
            self.speaker.own.model.load_state_dict(self.queue[-2 if self.late and len(self.queue) > 1 else -1])


def sampler(learner: Student, **fault: bool) -> VllmSampler:
    speaker = Copy(learner)
    made = VllmSampler(
        learner, speaker, Transfer(learner, speaker, **fault), tolerance=TOLERANCE[learner.settings.dtype]
    )
    speaker.probes = made.probes
    return made


@pytest.mark.parametrize("fault", ["lost", "late"])
def test_weights_that_stay_behind_are_caught_at_the_first_step(dtype: Dtype, fault: str) -> None:
    """One step moves the scores by a tenth of what bfloat16's tolerance lets through."""
    learner = student(dtype)
    speaks = sampler(learner, **{fault: True})
    speaks.take_weights()
    train(learner, 0)
    with pytest.raises(WeightsError, match=BEHIND[dtype]):
        speaks.take_weights()


@pytest.mark.parametrize("since", [1, 5])
def test_weights_that_begin_to_stay_behind_are_caught_then(dtype: Dtype, since: int) -> None:
    learner = student(dtype, warmup_steps=10)
    speaks = sampler(learner)
    speaks.take_weights()
    for step in range(since):
        train(learner, step)
        speaks.take_weights()
    assert isinstance(speaks.sync, Transfer)
    speaks.sync.late = True
    train(learner, since)
    with pytest.raises(WeightsError, match=BEHIND[dtype]):
        speaks.take_weights()


def test_steps_that_change_next_to_nothing_add_up(dtype: Dtype) -> None:
    learner = student(dtype, learning_rate=1e-7 if dtype == "bfloat16" else 1e-9)
    speaks = sampler(learner, lost=True)
    num_passed = 0
    with pytest.raises(WeightsError, match="the sampler's by exactly 0"):
        for step in range(12):
            speaks.take_weights()
            num_passed += 1
            train(learner, step)
    # In float32 no step is so small; the first transfer has nothing to be compared with.
    assert (num_passed > 1) == (dtype == "bfloat16")


@pytest.mark.parametrize("learning_rate", [2e-7, 2e-5])
def test_weights_that_arrive_are_no_alarm(dtype: Dtype, learning_rate: float) -> None:
    learner = student(dtype, learning_rate=learning_rate, warmup_steps=10)
    speaks = sampler(learner)
    for step in range(20):
        speaks.take_weights()
        assert speaks.facts()["sampler.gap"] == 0
        train(learner, step)
    # Sent again although nothing has changed, as to a server that sleeps.
    for _ in range(2):
        speaks._synced = None
        speaks.take_weights()


def test_a_few_scores_of_the_trainers_are_no_alarm(dtype: Dtype) -> None:
    """A few weights that changed in their last digit may change nothing in another implementation's rounding."""
    sampled = np.zeros((4, 31))
    few, many = sampled.copy(), sampled.copy()
    few[:, :15], many[:, :16] = 1e-6, 1e-6
    assert not Scores(few, sampled).stood_still(Scores(sampled, sampled))
    assert Scores(many, sampled).stood_still(Scores(sampled, sampled))
    moved = sampled.copy()
    moved[3, 30] = 1e-9
    assert not Scores(many, moved).stood_still(Scores(sampled, sampled))


def spoilt(value: Tensor) -> Tensor:
    """One number of it, in its last digit."""
    bits = value.detach().clone()
    bits.view(-1)[7:8].view(torch.int32 if value.dtype == torch.float32 else torch.int16).bitwise_xor_(1)
    return bits


@pytest.mark.parametrize(
    ("name", "wrong"), [(SPOILT, "1"), ("model.norm.weight", "1"), (None, "1"), ("one too many", "1"), ("", "0")]
)
def test_one_bit_that_is_another_is_caught_by_fingerprints(
    dtype: Dtype, name: str | None, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = student(dtype)

    def held(weights: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
        found = {one: fingerprint(spoilt(value) if one == name else value) for one, value in weights}
        if name is None:
            found.popitem()
        elif name == "one too many":
            found[name] = fingerprint(torch.zeros(1))
        return found

    class Receiver:
        def take_weights(self, weights: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
            return held(weights)

    def ask(*_: object) -> dict[str, Any]:
        return {"results": [held(learner.merged_weights())]}

    monkeypatch.setattr("students.weight_sync.ask", ask)
    engine: Any = Receiver()
    client: Any = None
    for sync in (MemorySync(engine, learner.merged_weights), FileSync(client, learner.merged_weights)):
        if wrong == "0":
            sync.send()
            continue
        with pytest.raises(WeightsError, match=rf"of \d+ tensors {wrong} are not what the trainer has, {name or ''}"):
            sync.send()


def test_a_fingerprint_is_of_numbers_not_of_their_width(dtype: Dtype) -> None:
    value = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    assert fingerprint(value) == fingerprint(value.float()) == fingerprint(value.mT.contiguous().mT)
    assert fingerprint(value) != fingerprint(spoilt(value))


def test_a_fingerprint_leaves_memory_as_it_is(dtype: Dtype) -> None:
    """FSDP2 frees what it has gathered by resizing it."""
    value = torch.ones(5, 7, dtype=getattr(torch, dtype))
    fingerprint(value)
    value.untyped_storage().resize_(0)
