"""The pipeline sample -> score -> train: what overlaps, in which order weights and batches go, and how it ends."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import pytest
import torch
import yaml

from benchmarks.loop import crew_of, encoder, metrics_of
from benchmarks.overlap import main, seconds_a_step, settings
from benchmarks.sampler import main as sampler_main
from benchmarks.simulated import SimulatedSampler, SimulatedTeacher, simulated_crew, work
from distill import interrupt
from distill.checkpoint import load_model, open_checkpoint
from distill.costs import CostAccount
from distill.errors import DistillError, GoneError, NonFiniteError, StoppedError, UserError
from distill.family import resolve
from distill.model_config import StudentSettings
from distill.sampler import OnFinished, TransformersSampler
from distill.spans import after, length, united
from distill.stage_config import GrpoStage, ModeSampling, Optimiser, SamplingSettings
from distill.types import MODES, Request, Rollout
from pipelines.batches import Ahead, AtOnce, batches_of
from pipelines.crew import Crew, Judged
from pipelines.faculty import Faculty, find_teachers, hired_faculty
from pipelines.grpo import Grpo
from pipelines.phases import Clock, devices_of, reproducible
from pipelines.resolution import resolve_run
from pipelines.stages import OnPolicy
from students.ranks import Ranks
from students.rescoring import rescore
from students.student import Student
from students.vllm_sampler import Keeping, VllmSampler

NANO = open_checkpoint(resolve("nano", role="student"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def assert_phases_add_up(metrics: Sequence[dict[str, Any]]) -> None:
    """No time is counted twice, and little goes by between the phases, but on a busy machine now and then."""
    phases = ("sample", "sync", "score", "train")
    left = [row["seconds"] - sum(row[f"seconds.{phase}"] for phase in phases) for row in metrics]
    assert min(left) > -1e-3 and median(left) < 0.05, left


def stage_of(crew: Crew, steps: int) -> OnPolicy:
    return OnPolicy("on_policy", settings(steps), crew, first_prompt=0)


def sampler_of(crew: Crew) -> SimulatedSampler:
    assert isinstance(crew.student_sampler, SimulatedSampler)
    return crew.student_sampler


def teacher_of(crew: Crew) -> SimulatedTeacher:
    return cast(SimulatedTeacher, crew.teachers.default.hired.judge)


# Three devices elsewhere


@pytest.mark.parametrize(
    ("sample", "score", "train"),
    [(0.5, 0.3, 0.3), (0.3, 0.5, 0.3), (0.3, 0.3, 0.5), (0.5, 0.05, 0.5), (0.5, 0.5, 0.05)],
)
def test_a_step_is_as_long_as_its_longest_phase(sample: float, score: float, train: float) -> None:
    crew = simulated_crew(sample=sample, score=score, train=train)
    stage = stage_of(crew, 9)
    metrics = metrics_of(stage, crew, batches_of(stage, crew, staleness=1))
    longest = max(sample, score, train)
    assert 0.95 * longest <= seconds_a_step(metrics, skip=3) <= 1.1 * longest
    for phase, seconds in (("sample", sample), ("score", score), ("train", train)):
        assert median(row[f"busy.{phase}"] for row in metrics[3:]) == pytest.approx(seconds, rel=0.1, abs=0.05)
    assert median(row["overlap_efficiency"] for row in metrics[3:]) == pytest.approx(1, abs=0.1)
    assert [row["staleness"] for row in metrics] == [0.0] + [1.0] * 8


def test_without_staleness_scoring_hides_behind_sampling_alone() -> None:
    crew = simulated_crew(sample=0.3, score=0.25, train=0.2)
    stage = stage_of(crew, 4)
    metrics = metrics_of(stage, crew, batches_of(stage, crew, staleness=0))
    assert [row["staleness"] for row in metrics] == [0.0] * 4
    assert 0.49 <= seconds_a_step(metrics, skip=1) <= 1.15 * 0.5
    assert median(row["seconds.score"] for row in metrics) < 0.1
    assert median(row["busy.score"] for row in metrics) == pytest.approx(0.25, abs=0.06)
    assert median(row["overlap_efficiency"] for row in metrics) == pytest.approx(0.3 / 0.5, abs=0.1)
    assert_phases_add_up(metrics)


def test_one_batch_ahead_and_no_further() -> None:
    """The trainer is slow: the sampler has spoken one batch more than were taken, and waits."""
    crew = simulated_crew(sample=0.02, score=0.02, train=0.3)
    stage, seen = stage_of(crew, 4), list[int]()
    step = crew.student.step

    def watched(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = step(*arguments, **options)
        seen.append(len(sampler_of(crew).asked))
        return found

    crew.student.step = watched  # type: ignore[method-assign]
    metrics_of(stage, crew, batches_of(stage, crew, staleness=1))
    assert seen == [2, 3, 4, 4]


def test_a_sampler_that_begins_late_speaks_with_the_weights_it_was_given() -> None:
    """The batch ahead begins when the trainer has changed its weights already."""
    crew = simulated_crew(sample=0.02, score=0.0, train=0.02)
    stage, trained = stage_of(crew, 4), threading.Semaphore(0)
    step, sample = crew.student.step, stage.sample

    def watched(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = step(*arguments, **options)
        trained.release()
        return found

    def late(number: int) -> list[Rollout]:
        assert number == 0 or trained.acquire(timeout=5)
        return sample(number)

    crew.student.step, stage.sample = watched, late  # type: ignore[method-assign]
    metrics = metrics_of(stage, crew, batches_of(stage, crew, staleness=1))
    assert [row["staleness"] for row in metrics] == [0.0, 1.0, 1.0, 1.0]


def test_the_sampler_rests_where_somebody_else_wants_it() -> None:
    """An examination between two steps speaks with the newest weights, and the batch ahead with its own."""
    crew = simulated_crew(sample=0.1, score=0.02, train=0.02)
    stage, found = stage_of(crew, 4), list[int]()

    def examine(done: int) -> bool:
        if done:
            (said,) = sampler_of(crew).generate(sampler_of(crew).asked[0][:1])
            found.append(said.weight_version)
        return False

    metrics = metrics_of(stage, crew, batches_of(stage, crew, staleness=1), examine=examine)
    assert found == [1, 2, 3, 4]
    assert [row["staleness"] for row in metrics] == [0.0, 1.0, 1.0, 1.0]


def test_a_stage_that_ends_early_calls_off_the_batch_under_way() -> None:
    crew = simulated_crew(sample=0.2, score=0.02, train=0.02)
    stage = stage_of(crew, 50)
    began = time.perf_counter()
    metrics = metrics_of(stage, crew, batches_of(stage, crew, staleness=1), examine=lambda done: done == 2)
    assert len(metrics) == 2 and time.perf_counter() - began < 5
    # What was never trained on is nobody's cost.
    costs = crew.meter.account.of_stage("on_policy")
    assert costs["student_sample"].tokens == sum(row["tokens.student_sample"] for row in metrics) == 2 * 2 * 16


# What goes wrong


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_error_says_its_stage_and_phase(staleness: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = simulated_crew(sample=0.05, score=0.05, train=0.05)
    sampler, teacher = sampler_of(crew), teacher_of(crew)
    speak, score = sampler.generate, teacher.score

    def broken_speech(*arguments: Any) -> list[Rollout]:
        if len(sampler.asked) == 2:
            raise DistillError("the server is gone")
        return speak(*arguments)

    def run(steps: int = 5) -> None:
        stage = stage_of(crew, steps)
        metrics_of(stage, crew, batches_of(stage, crew, staleness=staleness))

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "generate", broken_speech)
        with pytest.raises(DistillError, match=r"^on_policy, sampling step 2: the server is gone$"):
            run()
    judged = list[int]()

    def broken_judgement(rollouts: Sequence[Rollout]) -> Any:
        judged.append(1)
        if len(judged) == 3:
            raise UserError("the key is refused")
        return score(rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "score", broken_judgement)
        with pytest.raises(UserError, match=r"^on_policy, scoring step 2: the key is refused$"):
            run()
    run(2)  # the same crew goes on afterwards


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_is_no_error_of_ours_has_a_note_of_its_stage_and_phase(
    staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def notes_of(target: Any, method: str) -> list[str]:
        crew, calls = simulated_crew(sample=0.02, score=0.02, train=0.02), list[int]()
        owner = {"sampler": sampler_of(crew), "teacher": teacher_of(crew), "student": crew.student}[target]
        proper = getattr(owner, method)

        def broken(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == (17 if method == "hear" else 2):  # each of 16 responses is heard
                raise RuntimeError("CUDA error: out of memory")
            return proper(*arguments, **options)

        stage = stage_of(crew, 5)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"^CUDA error") as raised:
            patch.setattr(owner, method, broken)
            metrics_of(stage, crew, batches_of(stage, crew, staleness=staleness))
        return raised.value.__notes__

    assert notes_of("sampler", "generate") == ["in on_policy, sampling step 1"]
    assert notes_of("teacher", "hear") == ["in on_policy, scoring step 1"]
    assert notes_of("teacher", "score") == ["in on_policy, scoring step 1"]
    assert notes_of("student", "step") == ["in on_policy, training step 1"]


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_error_of_the_teacher_that_the_sampler_hears_first_is_not_lost(staleness: int) -> None:
    crew = simulated_crew(sample=0.05, score=0.02, train=(0.02, 2.0)[staleness])
    teacher, hear, heard = teacher_of(crew), teacher_of(crew).hear, list[Rollout]()

    def deaf(rollout: Rollout) -> None:
        heard.append(rollout)
        if len(heard) == 20:
            raise DistillError("no answer")
        hear(rollout)

    teacher.hear = deaf  # type: ignore[method-assign]
    stage = stage_of(crew, 5)
    with pytest.raises(DistillError, match=r"^on_policy, scoring step 1: no answer$"):
        metrics_of(stage, crew, batches_of(stage, crew, staleness=staleness))
    # Not after another step; one batch ahead, the training under way is broken off.
    assert crew.student.num_changes == 1 - staleness


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_judgement_that_fails_is_not_kept_until_the_next_response_ends(staleness: int) -> None:
    crew = simulated_crew(sample=0.05, score=0.02, train=0.02)
    sampler, teacher, heard, failed = sampler_of(crew), teacher_of(crew), list[Rollout](), list[float]()
    hear = teacher.hear

    def judge() -> None:
        failed.append(time.perf_counter())

    def check() -> None:
        if failed:
            raise DistillError("no answer")

    def hearing(rollout: Rollout) -> None:
        check()
        hear(rollout)
        heard.append(rollout)
        if len(heard) == 20:
            sampler.seconds = 80.0  # five a response, from now on
            threading.Timer(0.2, judge).start()

    teacher.hear, teacher.check = hearing, check  # type: ignore[method-assign]
    stage = stage_of(crew, 5)
    with pytest.raises(DistillError, match=r"^on_policy, scoring step 1: no answer$"):
        metrics_of(stage, crew, batches_of(stage, crew, staleness=staleness))
    assert time.perf_counter() - failed[0] < 3
    assert len(heard) == 20


@pytest.mark.parametrize(("score", "train"), [(5.0, 0.02), (0.02, 5.0)])
def test_an_error_in_the_batch_ahead_is_raised_at_once(score: float, train: float) -> None:
    """Neither the judging nor the training of the batch before it is waited for."""
    crew, failed = simulated_crew(sample=0.02, score=score, train=train), list[float]()
    stage, sample = stage_of(crew, 5), stage_of(crew, 5).sample

    def broken(number: int) -> list[Rollout]:
        if number == 1:
            time.sleep(0.3)
            failed.append(time.perf_counter())
            raise DistillError("no server")
        return sample(number)

    stage.sample = broken  # type: ignore[method-assign]
    with pytest.raises(DistillError, match=r"^on_policy, sampling step 1: no server$"):
        metrics_of(stage, crew, batches_of(stage, crew, staleness=1))
    assert time.perf_counter() - failed[0] < 3
    assert crew.student.num_changes == 0


def test_a_batch_ahead_that_breaks_off_forgets_nothing_of_the_one_that_is_judged() -> None:
    """Its own requests end with it; the others when the stage does."""
    crew = simulated_crew(sample=0.02, score=0.3, train=0.02)
    sampler, teacher, told = sampler_of(crew), teacher_of(crew), list[str]()
    speak, score, forget = sampler.generate, teacher.score, teacher.forget

    def broken(*arguments: Any) -> list[Rollout]:
        if len(sampler.asked) == 1:
            raise DistillError("no server")
        return speak(*arguments)

    def scored(rollouts: Sequence[Rollout]) -> Any:
        found = score(rollouts)
        told.append("scored")
        return found

    def forgotten() -> None:
        told.append("forget")
        forget()

    sampler.generate, teacher.score, teacher.forget = broken, scored, forgotten  # type: ignore[method-assign]
    teacher.break_off = lambda: told.append("break_off")  # type: ignore[method-assign]
    stage = stage_of(crew, 5)
    with pytest.raises(DistillError, match=r"^on_policy, sampling step 1: no server$"):
        metrics_of(stage, crew, batches_of(stage, crew, staleness=1))
    assert told == ["break_off", "forget"]


def test_numbers_that_are_not_finite_end_the_batch_under_way(tmp_path: Path) -> None:
    crew = simulated_crew(sample=5.0, score=0.0, train=0.05)
    sampler_of(crew).seconds = 0.05
    stage, kept = stage_of(crew, 5), list[int]()
    step = crew.student.step

    def broken(*arguments: Any, **options: Any) -> dict[str, Any]:
        if options["where"] == "on_policy step 1":
            sampler_of(crew).seconds = 5.0
            raise NonFiniteError("the loss is nan at on_policy step 1")
        return step(*arguments, **options)

    crew.student.step = broken  # type: ignore[method-assign]
    began = time.perf_counter()
    with pytest.raises(NonFiniteError, match="on_policy step 1"):
        metrics_of(
            stage,
            crew,
            batches_of(stage, crew, staleness=1),
            checkpoint=lambda done, ended: kept.append(done),
        )
    assert time.perf_counter() - began < 4
    assert kept == [1]
    assert not sampler_of(crew)._keeps  # the next stage sends its weights again


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("who", ["speaks", "judges"])
def test_a_server_that_is_gone_costs_no_finished_step(who: str, staleness: int) -> None:
    crew = simulated_crew(sample=0.02, score=0.02, train=0.02)
    stage, kept = stage_of(crew, 5), list[tuple[int, bool, int]]()
    sample, signal, trained = stage.sample, stage.signal, list[str]()
    step = crew.student.step

    def speaking(number: int) -> list[Rollout]:
        if who == "speaks" and number == 3:
            raise GoneError("the server ended unexpectedly")
        return sample(number)

    def judging(rollouts: Sequence[Rollout]) -> Judged:
        if who == "judges" and len(trained) == 3:
            raise GoneError("the server ended unexpectedly")
        return signal(rollouts)

    def learning(*arguments: Any, **options: Any) -> dict[str, Any]:
        metrics = step(*arguments, **options)
        trained.append(options["where"])
        return metrics

    stage.sample, stage.signal = speaking, judging  # type: ignore[method-assign]
    crew.student.step = learning  # type: ignore[method-assign]
    with pytest.raises(GoneError, match=r"^on_policy, (sampling|scoring) step 3: the server ended"):
        metrics_of(
            stage,
            crew,
            batches_of(stage, crew, staleness=staleness),
            checkpoint=lambda done, ended: kept.append((done, ended, len(trained))),
        )
    # The batch ahead may fail before the one that is wanted has been trained on.
    done = 2 if (who, staleness) == ("speaks", 1) and len(trained) == 2 else 3
    assert kept == [(done, False, done)]


def test_one_process_of_several_writes_no_checkpoint_alone() -> None:
    crew = simulated_crew(sample=0, score=0, train=0)
    kept: list[int] = []

    def examine(done: int) -> bool:
        if done == 2:
            object.__setattr__(crew, "ranks", Ranks(0, 2))
            raise GoneError("the server ended unexpectedly")
        return False

    stage = stage_of(crew, 5)
    with pytest.raises(GoneError):
        metrics_of(stage, crew, AtOnce(stage, crew), examine=examine, checkpoint=lambda done, ended: kept.append(done))
    assert not kept


@pytest.mark.parametrize("during", ["sampling", "training"])
def test_a_request_to_stop_ends_both_threads(during: str) -> None:
    slow = {"sampling": {"sample": 5.0, "train": 0.02}, "training": {"sample": 0.02, "train": 5.0}}[during]
    crew = simulated_crew(score=0.02, **slow)
    stage, kept = stage_of(crew, 5), list[int]()
    began = time.perf_counter()
    with interrupt.deferred_signals():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(StoppedError, match=r"^stopped by SIGINT$") as stopped:
            metrics_of(
                stage,
                crew,
                batches_of(stage, crew, staleness=1),
                checkpoint=lambda done, ended: kept.append(done),
            )
    assert stopped.value.exit_code == 130 and time.perf_counter() - began < 4


# Real weights


class CopiedSampler(Keeping):
    """The student's model a second time: what a server of its own is, in this process, and bit-reproducible."""

    def __init__(self, student: Student) -> None:
        self.student, self.weight_version = student, 0
        self.speaker = TransformersSampler(copy.deepcopy(student.model), encoder(), speaker="student")
        self.sent: list[int] = []
        self._taken = -1

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        if not self._keeps:
            self.take_weights()
        return self.speaker.generate(requests, on_finished)

    def take_weights(self) -> dict[str, float]:
        assert not self._keeps
        if self._taken != self.student.num_changes:
            self.speaker.model.load_state_dict(self.student.model.state_dict())
            self._taken = self.student.num_changes
            self.sent.append(self.weight_version)
        self.speaker.weight_version = self.weight_version
        return {}

    def facts(self) -> dict[str, float]:
        return {}


def real_crew() -> Crew:
    torch.manual_seed(0)
    student = Student(
        load_model(NANO, torch.float32, "cpu"),
        StudentSettings(dtype="float32", gradient_checkpointing=False, micro_batch_tokens=None),
        stop_ids=encoder().stop_ids,
    )
    student.begin(Optimiser(learning_rate=2e-4, warmup_steps=0))
    teachers = simulated_crew(sample=0, score=0, train=0).teachers
    return crew_of(teachers, student, CopiedSampler(student), NANO.shape)


class Rewarded(Grpo):
    """Group-relative policy gradient with a reward that an untrained student earns: even sums of ids."""

    def __init__(self, crew: Crew, steps: int, **policy_gradient: Any) -> None:
        sampling = ModeSampling(**{mode: SamplingSettings(max_new_tokens=8) for mode in MODES})
        super().__init__(
            "rl",
            GrpoStage(
                steps=steps,
                prompts_per_step=4,
                samples_per_prompt=4,
                sampling=sampling,
                policy_gradient={"overlong_share": 0.0, **policy_gradient},  # type: ignore[arg-type]
            ),
            crew,
            first_prompt=0,
        )
        self.verifier.verdicts = lambda rollouts: [sum(said.response_ids) % 2 == 0 for said in rollouts]  # type: ignore[assignment, method-assign]
        self.seen: list[list[Rollout]] = []

    def signal(self, rollouts: Sequence[Rollout]) -> Any:
        self.seen.append(list(rollouts))
        return super().signal(rollouts)


class CopyOfVllm:
    """What a vLLM sampler speaks through, in this process; the gap that it shows is the number of the transfer."""

    model: str | None = None
    vocabulary, weight_version = NANO.shape.vocabulary, 0

    def __init__(self, student: Student) -> None:
        self.student, self.num_sent, self.probes = student, 0, list[Rollout]()
        self.speaker = TransformersSampler(copy.deepcopy(student.model), encoder(), speaker="student")

    def send(self) -> None:
        self.speaker.model.load_state_dict(self.student.model.state_dict())
        self.num_sent += 1

    def ready(self) -> None: ...

    def forget_prefixes(self) -> None: ...

    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [(one.token_R - self.num_sent).tolist() for one in rescore(self.student, self.probes)]

    def generate(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Rollout]:
        self.speaker.weight_version = self.weight_version
        return self.speaker.generate(requests, on_finished)


@pytest.mark.parametrize(
    ("staleness", "empty", "expected"),
    [
        (0, None, [1, 2, 3, 4, 5]),
        # The step after the one that taught nothing speaks with the same weights.
        (0, 1, [1, 2, 2, 3, 4]),
        (0, 4, [1, 2, 3, 4, 5]),
        # What a step sends is for the next batch, and the last one sends nothing.
        (1, None, [1, 1, 2, 3, 4]),
        (1, 1, [1, 1, 2, 2, 3]),
    ],
)
def test_each_step_has_the_gap_of_the_weights_that_spoke(
    staleness: int, empty: int | None, expected: list[int]
) -> None:
    crew = real_crew()
    vllm = CopyOfVllm(crew.student)
    speaks = VllmSampler(crew.student, vllm, vllm, tolerance=100.0)
    vllm.probes = speaks.probes
    crew = replace(crew, student_sampler=speaks)
    stage = Rewarded(crew, 5)

    def verdicts(rollouts: Sequence[Rollout]) -> list[bool]:
        return [place % 2 == 0 and len(stage.seen) - 1 != empty for place, _ in enumerate(rollouts)]

    stage.verifier.verdicts = verdicts  # type: ignore[method-assign]
    rows = metrics_of(stage, crew, batches_of(stage, crew, staleness=staleness))
    assert [row["loss"] is None for row in rows] == [step == empty for step in range(5)]
    assert [row["sampler.gap"] for row in rows] == pytest.approx(expected, abs=1e-3)


def test_a_stale_batch_weighs_what_is_likelier_now_and_what_is_less() -> None:
    """Against a loss in float64 of whole softmaxes: -A min(p_now / p_sampler, cap), a constant times the gradient of
    log p_now."""
    crew = real_crew()
    stage = Rewarded(crew, 3, importance_cap=1.1)
    before: list[dict[str, Any]] = []
    step = crew.student.step

    def watched(examples: Any, loss: Any, **options: Any) -> dict[str, Any]:
        model = copy.deepcopy(crew.student.model).double()
        total, weights, count = torch.zeros((), dtype=torch.float64), list[float](), 0
        for example in examples:
            said = example.rollout
            ids = torch.tensor([said.prompt_ids + said.response_ids])
            first = len(said.prompt_ids) - 1
            logprobs = model(ids).logits[0, first : first + len(said.response_ids)].log_softmax(-1)
            stops = list(encoder().stop_ids)
            for row, (token, sampled) in enumerate(zip(said.response_ids, said.logprobs, strict=True)):
                action = logprobs[row, stops].logsumexp(0) if token in stops else logprobs[row, token]
                weight = min(float((logprobs[row, token].detach() - sampled).exp()), 1.1)
                weights.append(weight)
                total = total - example.signal.value * weight * (action - action.detach()).exp()
                count += 1
        (total / count).backward()
        norm = float(sum(p.grad.square().sum() for p in model.parameters()).sqrt())  # type: ignore[union-attr, misc]
        before.append({"loss": float(total.detach()) / count, "importance": sum(weights) / count, "norm": norm})
        return step(examples, loss, **options)

    crew.student.step = watched  # type: ignore[method-assign]
    metrics = metrics_of(stage, crew, Ahead(stage, crew))
    assert len(before) == 3 and [row["staleness"] for row in metrics] == [0.0, 1.0, 1.0]
    for row, naive in zip(metrics, before, strict=True):
        assert row["loss"] == pytest.approx(naive["loss"], rel=1e-4, abs=1e-6)
        assert row["importance"] == pytest.approx(naive["importance"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(naive["norm"], rel=1e-3)
    assert metrics[0]["importance"] == pytest.approx(1.0, abs=1e-4)
    assert all(abs(row["importance"] - 1) > 1e-3 and row["logprob_gap"] > 1e-3 for row in metrics[1:])


def test_weights_go_out_and_batches_come_back_in_order() -> None:
    """What is trained on at step n is what the weights before step n - 1 say to step n's prompts, and nothing else."""
    crew = real_crew()
    stage = Rewarded(crew, 4)
    metrics = metrics_of(stage, crew, Ahead(stage, crew))
    sampler = cast(CopiedSampler, crew.student_sampler)
    assert sampler.sent == [0, 1, 2]  # version 3 has no batch left to speak
    serial = real_crew()
    naive, said = Rewarded(serial, 4), list[list[Rollout]]()
    said.append(naive.sample(0))
    for step in range(4):
        if step + 1 < 4:
            said.append(naive.sample(step + 1))
        updates = naive.signal(said[step]).updates
        if updates[0]:
            torch.manual_seed(0)
            serial.student.step(updates[0], naive.loss, step=step, num_steps=4, where="")
        serial.student_sampler.weight_version += 1
    for ours, theirs in zip(stage.seen, naive.seen, strict=True):
        assert ours == theirs
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for mine, other in zip(crew.student.model.parameters(), serial.student.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_several_updates_are_clipped_around_the_weights_that_the_batch_is_trained_from() -> None:
    """The policy before the step is the trainer's, not the older one that spoke: that one is in the importance."""
    crew = real_crew()
    stage = Rewarded(crew, 3, updates_per_step=2)
    olds: list[Any] = []
    signal_of = stage.signal

    def watched(rollouts: Sequence[Rollout]) -> Any:
        judged = signal_of(rollouts)
        examples = [example for update in judged.updates for example in update]
        now = rescore(crew.student, [example.rollout for example in examples])
        for example, found in zip(examples, now, strict=True):
            assert torch.equal(example.signal.old.token_R, found.token_R)
        olds.append(len(examples))
        return judged

    stage.signal = watched  # type: ignore[method-assign]
    metrics = metrics_of(stage, crew, Ahead(stage, crew))
    assert sum(olds) > 0 and metrics[2]["importance"] != pytest.approx(1.0, abs=1e-3)


def test_metrics_of_several_updates_are_means_over_the_tokens_of_all() -> None:
    """The updates have other shares of thinking: a mean of their means is another number."""
    crew = real_crew()
    stage = Rewarded(crew, 1, updates_per_step=3)
    stage.verifier.verdicts = lambda said: [place % 2 == 0 for place, _ in enumerate(said)]  # type: ignore[method-assign]
    shares, entropies, rates = list[float](), {mode: list[float]() for mode in MODES}, list[dict[str, Any]]()
    loss, step = stage.loss, crew.student.step

    def watched(rows: Any) -> Any:
        felt = loss(rows)
        thinks, learns = rows.batch.think_N, rows.batch.weight_N > 0
        for mode, chosen in (("think", thinks), ("no_think", ~thinks)):
            entropies[mode] += felt.per_token_N["student_entropy"][chosen & learns].tolist()
        shares.append(float(thinks[learns].float().mean()))
        return felt

    def learning(*arguments: Any, **options: Any) -> dict[str, Any]:
        rates.append(step(*arguments, **options))
        return rates[-1]

    stage.loss, crew.student.step = watched, learning  # type: ignore[method-assign]
    (row,) = metrics_of(stage, crew, AtOnce(stage, crew))
    assert len(set(shares)) == 3
    both = [*entropies["think"], *entropies["no_think"]]
    for prefix, values in (("", both), *((f"{mode}.", found) for mode, found in entropies.items())):
        assert row[f"{prefix}student_entropy"] == pytest.approx(sum(values) / len(values), rel=1e-6), prefix
    assert row["num_tokens"] == len(both) and row["learning_rate"] == pytest.approx(2e-4)
    for name in ("loss", "grad_norm"):
        expected = sum(one["num_tokens"] * one[name] for one in rates) / len(both)
        assert row[name] == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_reverse_kl_is_that_of_the_weights_that_learn() -> None:
    """The batch is stale, its divergence is not: the trainer's states are new at every step."""
    config = resolve_run(assignments=["stages.off_policy=null"])
    with hired_faculty(
        config,
        find_teachers(config),
        encoder(),
        device=torch.device("cpu"),
        logs=Path("."),
        choose=cast(Any, None),
    ) as faculty:
        crew = replace(real_crew(), teachers=faculty)
        stage = OnPolicy("on_policy", settings(3, prompts=4, most=12), crew, first_prompt=0)
        naive: list[float] = []
        step = crew.student.step

        def watched(examples: Any, loss: Any, **options: Any) -> dict[str, Any]:
            teacher = cast(Any, faculty.default.hired.judge).model
            stops, found = list(encoder().stop_ids), list[float]()
            for example in examples:
                said = example.rollout
                rows = slice(len(said.prompt_ids) - 1, len(said.prompt_ids) - 1 + len(said.response_ids))
                ids = torch.tensor([said.prompt_ids + said.response_ids])
                with torch.no_grad():
                    p, q = (model(ids).logits[0, rows].double().softmax(-1) for model in (crew.student.model, teacher))
                others = [token for token in range(p.shape[1]) if token not in stops]
                p, q = (torch.cat([x[:, others], x[:, stops].sum(-1, True)], dim=1) for x in (p, q))
                found += (p * (p.log() - q.log())).sum(-1).tolist()
            naive.append(sum(found) / len(found))
            return step(examples, loss, **options)

        crew.student.step = watched  # type: ignore[method-assign]
        metrics = metrics_of(stage, crew, Ahead(stage, crew))
    assert [row["staleness"] for row in metrics] == [0.0, 1.0, 1.0]
    assert [row["reverse_kl"] for row in metrics] == pytest.approx(naive, rel=1e-4)
    assert metrics[0]["logprob_gap"] < 1e-4 < metrics[1]["logprob_gap"]


def test_costs_of_a_step_are_those_of_its_batch() -> None:
    """Sampled ahead or not, a checkpoint's costs are those of the steps that it has finished."""
    crew = real_crew()
    stage, kept = Rewarded(crew, 4), dict[int, Any]()

    def checkpoint(done: int, ended: bool) -> None:
        kept[done] = CostAccount.from_state(crew.meter.account.state()).of_stage("rl")

    metrics = metrics_of(stage, crew, Ahead(stage, crew), checkpoint=checkpoint, checkpoint_every=1)
    spoken = [sum(len(said.response_ids) for said in rollouts) for rollouts in stage.seen]
    assert [row["tokens.student_sample"] for row in metrics] == spoken
    for done in range(1, 5):
        assert kept[done]["student_sample"].tokens == sum(spoken[:done])
        assert kept[done]["student_sample"].seconds > 0
    assert crew.meter.account.peak_bytes["student_train"] > 0


@pytest.mark.parametrize("batches", [AtOnce, Ahead])
def test_an_interrupted_steps_costs_are_not_in_the_checkpoint(batches: type[AtOnce] | type[Ahead]) -> None:
    crew = real_crew()
    stage, kept = Rewarded(crew, 4), dict[int, Any]()
    trained = crew.student.step

    def step(*args: Any, **options: Any) -> Any:
        if len(stage.seen) > 2 and options["step"] == 2:
            raise StoppedError("stopped by SIGINT", exit_code=130)
        return trained(*args, **options)

    crew.student.step = step  # type: ignore[method-assign]

    def checkpoint(done: int, ended: bool) -> None:
        kept[done] = CostAccount.from_state(crew.meter.account.state()).of_stage("rl")

    with pytest.raises(StoppedError):
        metrics_of(stage, crew, batches(stage, crew), checkpoint=checkpoint)
    spoken = [sum(len(said.response_ids) for said in rollouts) for rollouts in stage.seen]
    assert kept[2]["student_sample"].tokens == sum(spoken[:2]) < sum(spoken[:3])
    assert kept[2]["student_train"].seconds > 0


def test_ahead_of_nothing_is_at_once() -> None:
    crew = simulated_crew(sample=0, score=0, train=0)
    stage = stage_of(crew, 1)
    assert isinstance(batches_of(stage, crew, staleness=0), AtOnce)
    stage.teacher_part = "speaks"
    assert isinstance(batches_of(stage, crew, staleness=1), AtOnce)


# Reading ahead of the judgement


class Slow:
    """A teacher whose answers come ``seconds`` after the last response, whatever this process does meanwhile."""

    hears = True

    def __init__(self, teacher: Any, seconds: float, *, hears: bool = True) -> None:
        self.teacher, self.seconds, self.hears = teacher, seconds, hears
        self.failure: Exception | None = None
        self._until = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def heard_all(self) -> None:
        self._until = time.perf_counter() + self.seconds

    def score(self, rollouts: Sequence[Rollout]) -> Any:
        work(self._until)
        if self.failure is not None:
            raise self.failure
        return self.teacher.score(rollouts)


@contextmanager
def taught_crew(seconds: float, *, hears: bool) -> Iterator[tuple[Crew, Slow]]:
    """Real weights, and a teacher that gives the exact signal."""
    config = resolve_run(assignments=["stages.off_policy=null"])
    candidates, device = find_teachers(config), torch.device("cpu")
    with hired_faculty(config, candidates, encoder(), device=device, logs=Path("."), choose=cast(Any, None)) as faculty:
        hired = faculty.default.hired
        slow = Slow(hired.judge, seconds, hears=hears)
        tutor = replace(faculty.default, hired=replace(hired, judge=cast(Any, slow)))
        yield replace(real_crew(), teachers=Faculty([tutor])), slow


def exact(crew: Crew, steps: int) -> OnPolicy:
    return OnPolicy("on_policy", settings(steps, prompts=8, most=12), crew, first_prompt=0)


@pytest.mark.parametrize("batches", [AtOnce, Ahead])
def test_the_student_reads_while_the_teacher_judges_and_no_number_changes(
    batches: type[AtOnce] | type[Ahead],
) -> None:
    rows: dict[bool, list[dict[str, Any]]] = {}
    weights: dict[bool, list[torch.Tensor]] = {}
    for hears in (False, True):
        with taught_crew(0.5, hears=hears) as (crew, _):
            read, stage = crew.student.rows, exact(crew, 3)

            def slowly(batch: Any, read: Any = read) -> Any:
                time.sleep(0.2)
                return read(batch)

            crew.student.rows = slowly  # type: ignore[method-assign]
            rows[hears] = metrics_of(stage, crew, batches(stage, crew))
            weights[hears] = [value.detach().clone() for value in crew.student.model.parameters()]
            costs = crew.meter.account.of_stage("on_policy")
            assert costs["student_train"].seconds >= 3 * 0.2
    assert [*map(reproducible, rows[False])] == [*map(reproducible, rows[True])]
    assert all(map(torch.equal, weights[False], weights[True]))
    # One batch ahead, later batches are judged behind the training before them.
    num = 3 if batches is AtOnce else 1
    waits, hides = (sum(row["seconds.score"] for row in rows[hears][:num]) for hears in (False, True))
    assert hides < waits - 0.1 * num
    for waited, hidden in zip(rows[False], rows[True], strict=True):
        assert waited["seconds.train"] >= 0.2 and hidden["seconds.train"] >= 0.2
        # The reading is the student's work, and it is done while the teacher works.
        assert len(hidden["timeline"]["train"]) == 2 and len(waited["timeline"]["train"]) == 1
        assert hidden["timeline"]["train"][0][1] <= hidden["timeline"]["score"][-1][1]
        assert hidden["busy.train"] >= 0.2
    assert_phases_add_up(rows[True])


@pytest.mark.parametrize("batches", [AtOnce, Ahead])
def test_a_judgement_that_fails_behind_the_reading_is_named_and_leaves_no_trace(
    batches: type[AtOnce] | type[Ahead],
) -> None:
    """The stage can be gone through afterwards, and comes to what it would have without."""
    with taught_crew(0.05, hears=True) as (crew, _):
        reference = metrics_of(exact(crew, 2), crew, batches(exact(crew, 2), crew))
    with taught_crew(0.05, hears=True) as (crew, slow):
        stage, before = exact(crew, 2), [value.detach().clone() for value in crew.student.model.parameters()]
        slow.failure = DistillError("the server holds another model")
        with pytest.raises(DistillError, match=r"^on_policy, scoring step 0: the server holds another model$"):
            metrics_of(stage, crew, batches(stage, crew))
        assert crew.student.num_changes == 0 or all(map(torch.equal, before, crew.student.model.parameters()))
        slow.failure = None
        again = metrics_of(stage, crew, batches(stage, crew))
    assert [row["loss"] for row in again] == [row["loss"] for row in reference]


def test_a_request_to_stop_is_heard_behind_the_reading() -> None:
    with taught_crew(0.02, hears=True) as (crew, slow):
        stage, kept, read = exact(crew, 4), list[int](), crew.student.read

        def watched(rollouts: Sequence[Rollout]) -> Any:
            if crew.student.num_changes == at_first + 1:
                slow._until = time.perf_counter() + 20
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return read(rollouts)

        at_first = crew.student.num_changes
        crew.student.read = watched  # type: ignore[method-assign]
        began = time.perf_counter()
        with interrupt.deferred_signals(), pytest.raises(StoppedError, match=r"^stopped by SIGTERM$") as stopped:
            metrics_of(stage, crew, AtOnce(stage, crew), checkpoint=lambda done, ended: kept.append(done))
        assert stopped.value.exit_code == 75 and kept == [1] and time.perf_counter() - began < 10


# Settings, arithmetic


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        ([], "sampler.backend=transformers samples with the very weights that are trained"),
        (
            [
                "sampler.backend=vllm",
                "teacher.signal=sampled",
                "stages.on_policy.divergence.merge_stop_ids=false",
            ],
            "teacher.signal=sampled in stages.on_policy takes tokens",
        ),
        (["sampler.staleness=2"], "staleness"),
        (["sampler.backend=vllm", "sampler.sleep=true"], "sampler.sleep gives the server's memory away"),
    ],
)
def test_staleness_that_cannot_be_is_refused(assignments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve_run(assignments=["sampler.staleness=1", *assignments])


def test_devices_by_phase() -> None:
    def of(*assignments: str, processes: int = 1, teacher_judges: bool = True) -> tuple[int, ...]:
        found = devices_of(resolve_run(assignments=assignments), processes, teacher_judges=teacher_judges)
        return found["sample"], found["score"], found["train"]

    assert of() == (1, 1, 1)
    assert of(processes=4) == (4, 4, 4)
    assert of("teacher.backend=vllm", "teacher.replicas=2", "teacher.tensor_parallel=4", processes=2) == (2, 8, 2)
    served = ("teacher.backend=vllm", "teacher.replicas=2", "teacher.tensor_parallel=4")
    assert of(*served, processes=2, teacher_judges=False) == (2, 2, 2)
    assert of("sampler.backend=vllm", "sampler.devices=['3']") == (1, 1, 1)
    urls = "teacher.urls.score=[http://a:1, http://b:1, http://c:1]"
    assert of("teacher.backend=vllm", urls) == (1, 3, 1)


@pytest.mark.parametrize(
    ("measure", "words", "sentence"),
    [
        (main, ["--steps", "4", "--no-vllm"], "--steps takes 5 or more (the first 3 do not count), got 4"),
        (sampler_main, ["--repeats", "0", "--no-vllm"], "--repeats takes 1 or more, got 0"),
    ],
)
def test_what_times_nothing_is_refused(
    measure: Callable[[list[str]], None], words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        measure(words)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_the_fewest_simulated_steps_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "5", "--seconds", "0.02", "--no-vllm", "--json"])
    assert all(one["wall"] > 0 for one in json.loads(capsys.readouterr().out)["simulated"].values())


def test_a_phase_counts_no_second_twice() -> None:
    """A request that waited behind the step before occupied nobody then."""
    clock = Clock({"sample": 1, "score": 8, "sync": 1, "train": 2}, begun=100.0)
    clock.metrics({"score": [(100.0, 104.0)], "train": [(104.0, 105.0)]}, wall=5.0)
    row = clock.metrics({"score": [(102.0, 106.0), (105.0, 107.0), (108.0, 109.0)]}, wall=8.0)
    assert row["timeline"]["score"] == [[4.0, 7.0], [8.0, 9.0]]
    assert row["busy.score"] == 4.0 and row["device_seconds.score"] == 32.0 and row["overlap_efficiency"] == 0.5
    assert row["timeline"]["train"] == [] and row["busy.train"] == 0.0
    times = {"seconds": 8.0, "seconds.train": 1.0, "sampler.sync_seconds": 0.1}
    facts = {"loss": 0.5, "sampler.gap": 1e-6}
    assert reproducible({**row, **times, **facts}) == facts


def test_stretches_of_time() -> None:
    assert united([(0, 1), (1, 2), (5, 6), (0.5, 1.5)]) == [(0, 2), (5, 6)]
    assert after([(0, 2), (5, 6)], 1) == [(1, 2), (5, 6)] and after([(0, 2)], 2) == []
    assert length([(0, 2), (5, 6)]) == 3


def test_work_of_one_thread_is_called_off_and_no_others() -> None:
    off, heard = threading.Event(), list[str]()

    def work_on() -> None:
        try:
            with interrupt.until(off):
                work(time.perf_counter() + 5)
        except interrupt.CalledOffError:
            heard.append("off")
        interrupt.check()

    thread = threading.Thread(target=work_on)
    thread.start()
    off.set()
    interrupt.check()
    thread.join(3)
    assert heard == ["off"]


# Real servers


@pytest.mark.server
@pytest.mark.timeout(900)
def test_a_run_with_two_servers_one_batch_ahead(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    limits = {mode: {"max_new_tokens": 16} for mode in MODES}
    optimiser = {"learning_rate": 1e-3, "warmup_steps": 0}
    shape = {"prompts_per_step": 4, "samples_per_prompt": 2, "sampling": limits, "optimiser": optimiser}
    recipe.write_text(
        yaml.safe_dump(
            {
                "teacher": {"model": "tiny", "dtype": "float32", "backend": "vllm", "wire": "fp32"},
                "student": {"model": "nano", "dtype": "float32", "gradient_checkpointing": False},
                "sampler": {"backend": "vllm", "staleness": 1},
                "stages": {
                    "on_policy": {"kind": "on_policy", "steps": 5, **shape},
                    "rl": {"kind": "grpo", "steps": 4, **shape},
                },
                "evaluation": {"num_questions": 2, "sampling": limits, "references": False},
                "checkpoint_every": 2,
                "max_prompt_tokens": 64,
            }
        )
    )
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distill.cli", "run", "--recipe", str(recipe), "--out", str(out), "--json"]

    def lines() -> list[dict[str, Any]]:
        path = out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while len(lines()) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr[-3000:]
    before = len(lines())
    assert before >= 3
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = lines()
    assert [(row["stage"], row["step"]) for row in steps] == [("on_policy", n) for n in range(5)] + [
        ("rl", n) for n in range(4)
    ]
    first = [row for row in steps if row["stage"] == "on_policy"]
    # The first batch of a process is not ahead of anything, and every other one is by one.
    assert [row["staleness"] for row in first] == [0.0 if n in (0, before) else 1.0 for n in range(5)]
    assert [row["staleness"] for row in steps if row["stage"] == "rl"] == [0.0, 1.0, 1.0, 1.0]
    assert all(row["sampler.gap"] <= 1e-4 for row in steps)
    for row in first:
        # Stale weights show in what trainer and sampler say of the same token, fresh ones do not.
        assert (row["logprob_gap"] > 1e-3) == (row["staleness"] == 1.0), row
        assert row["timeline"]["sample"] and row["timeline"]["score"] and row["timeline"]["train"]
    ahead = [(row, following) for row, following in pairwise(first) if following["staleness"]]
    for row, following in ahead:
        assert following["timeline"]["sample"][0][0] < row["timeline"]["train"][0][1]
    costs = json.loads(done.stdout)["costs"]
    assert costs["student_sample"]["stages"]["on_policy"]["tokens"] == sum(
        row["tokens.student_sample"] for row in first
    )
