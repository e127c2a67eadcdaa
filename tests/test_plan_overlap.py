"""How long a planned step is by the clock: by hand, and beside what the pipeline takes with simulated devices."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks.loop import metrics_of
from benchmarks.overlap import settings
from benchmarks.simulated import NUM_PROMPTS, SimulatedTeacher, simulated_crew, work
from distill.costs import CostRole
from distill.errors import UserError
from distill.hardware import load_devices, parse_pool
from distill.memory import RESERVED_BYTES, Memory, layer_bytes, student_memory
from distill.server_memory import GRAPH_BYTES
from distill.types import HiddenStates, Rollout
from pipelines.batches import batches_of
from pipelines.calibration import SERVER_TIMES, with_server
from pipelines.forecast import forecast, named_pair
from pipelines.layouts import Layout, StudentLayout, TeacherLayout
from pipelines.overlap import Step, step_of
from pipelines.plan import Plan
from pipelines.plan_document import commands, document, memory_by_phase
from pipelines.plan_lines import lines, short_lines
from pipelines.plan_notes import notes
from pipelines.planning import planned
from pipelines.resolution import resolve_run
from pipelines.stages import OnPolicy
from students.ranks import ALONE

AHEAD = ("sampler.backend=vllm", "sampler.staleness=1")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tables and measurements of this machine's user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan_for(teacher: str, student: str, gpus: str, *assignments: str) -> Plan:
    return planned(resolve_run(teacher=teacher, student=student, assignments=assignments), gpus=gpus)


def layout(*assignments: str, served: bool, device: str = "1xH100") -> Layout:
    """One process, and a teacher in it or behind a server; 4B and 0.6B."""
    config = resolve_run(teacher="4B", student="0.6B", assignments=assignments)
    pair, pool = named_pair(config), parse_pool(device, load_devices())
    assert pair is not None
    student = StudentLayout(1, "alone", student_memory(config, pair.student, pair.teacher))
    return Layout(config, TeacherLayout("vllm" if served else "local", 2), student, pool, pool, (), ())


def wall(step: Step, spent: dict[CostRole, float]) -> float:
    """Of the whole stage."""
    return sum(spent.values()) - sum(step.hidden.values())


def spent(num: int, sample: float, score: float, train: float, rescore: float = 0.0) -> dict[CostRole, float]:
    """Seconds of all steps; what is none is not done."""
    each: dict[CostRole, float] = {
        "student_sample": sample,
        "teacher_score": score,
        "student_score": rescore,
        "student_train": train,
    }
    return {role: num * seconds for role, seconds in each.items() if seconds}


OWN = (*AHEAD, 'sampler.devices=["1"]')
CHOSEN = (*OWN, "teacher.signal=chosen")


@pytest.mark.parametrize(
    ("assignments", "served", "seconds", "expected", "order"),
    [
        ((), True, (5, 3, 2), (7, 70), "sampling beside scoring, then training"),
        ((), True, (3, 5, 2), (7, 70), "sampling beside scoring, then training"),
        ((), False, (5, 3, 2), (10, 100), "sampling, then scoring, then training"),
        (("teacher.signal=chosen",), True, (5, 3, 2), (10, 100), "sampling, then scoring, then training"),
        # GRPO, alone and with a second update, and together with a teacher: what it says is collected behind rescoring.
        ((), True, (5, 0, 2), (7, 70), "sampling, then training"),
        ((), True, (5, 0, 2, 1), (8, 80), "sampling, then rescoring, then training"),
        ((), True, (5, 6.5, 2, 1), (8.5, 85), "sampling and rescoring beside scoring, then training"),
        # One ahead: the first batch is waited for, and behind the last one nobody speaks.
        (OWN, True, (5, 3, 2), (5, 52), "sampling the next batch beside training beside scoring"),
        (OWN, True, (3, 5, 2), (5, 52), "sampling the next batch beside training beside scoring"),
        (OWN, True, (2, 3, 5), (5, 53), "sampling the next batch beside training beside scoring"),
        (OWN, False, (4, 3, 2), (5, 54), "sampling the next batch beside scoring and training"),
        (OWN, False, (6, 3, 2), (6, 65), "sampling the next batch beside scoring and training"),
        (CHOSEN, True, (6, 3, 2), (6, 65), "sampling the next batch beside scoring and training"),
        (OWN, True, (5, 0, 2), (5, 52), "sampling the next batch beside training"),
        (OWN, True, (2, 0, 5, 1), (6, 62), "sampling the next batch beside rescoring and training"),
        # On the trainer's GPU the sampler takes turns with it.
        (AHEAD, True, (5, 3, 2), (7, 70), "sampling the next batch and training beside scoring"),
        (AHEAD, True, (3, 6, 2), (6, 62), "sampling the next batch and training beside scoring"),
        (AHEAD, False, (5, 3, 2), (10, 100), "sampling the next batch and scoring and training"),
        (AHEAD, True, (5, 0, 2), (7, 70), "sampling the next batch and training"),
    ],
)
def test_a_step_by_hand(
    assignments: tuple[str, ...], served: bool, seconds: tuple[float, ...], expected: tuple[float, float], order: str
) -> None:
    """Seconds of sampling, scoring, training and rescoring in each of ten steps; of a step by the clock, and of all."""
    given = spent(10, *seconds)
    found = step_of("a test", given, 10, layout(*assignments, served=served))
    assert (found.seconds, wall(found, given)) == pytest.approx(expected)
    assert found.order == order
    assert all(0 <= found.hidden[role] <= given[role] for role in found.hidden)


def test_a_cpu_s_sampler_has_cores_of_its_own() -> None:
    found = step_of("a test", spent(10, 5, 0, 2), 10, layout(*AHEAD, served=False, device="1xCPU"))
    assert found.seconds == 5


class InTurn(SimulatedTeacher):
    """One in the trainer's process: it judges when it is asked."""

    def hear(self, rollout: Rollout) -> None:
        """Nothing is done in the background."""

    def score(self, rollouts: Sequence[Rollout]) -> list[HiddenStates]:
        began = time.perf_counter()
        work(began + self.seconds)
        self._worked.append((began, time.perf_counter()))
        return [HiddenStates(torch.zeros(len(rollout.response_ids), 1), self.name) for rollout in rollouts]


NUM_STEPS = 8


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("seconds", [(0.24, 0.12, 0.1), (0.12, 0.24, 0.1), (0.1, 0.12, 0.24)])
def test_the_pipeline_takes_what_is_planned(staleness: int, served: bool, seconds: tuple[float, ...]) -> None:
    """Sampler, teacher and trainer that take their time elsewhere, in the loop that a run has."""
    sample, score, train = seconds
    crew = simulated_crew(sample=sample, score=score, train=train)
    if not served:
        cast(Any, crew.teachers.default).hired.judge = InTurn(score)
        cast(Any, crew.teachers.default).hired.judge.hears = False
    stage = OnPolicy("on_policy", settings(NUM_STEPS), crew, first_prompt=0)
    rows = metrics_of(stage, crew, batches_of(stage, crew, staleness=staleness))
    assert len(rows) == NUM_STEPS and rows[0]["num_responses"] == NUM_PROMPTS
    measured = rows[-1]["timeline"]["train"][-1][1] - rows[0]["timeline"]["sample"][0][0]
    given = spent(NUM_STEPS, *seconds)
    expected = wall(step_of("on_policy", given, NUM_STEPS, layout(*(OWN if staleness else ()), served=served)), given)
    # Responses that end last are judged behind the sampling; a busy machine is late now and then.
    assert 0.97 < measured / expected < 1.25, (measured, expected)


def test_memory_of_a_server_beside_the_trainer_by_hand() -> None:
    """0.6B in bf16 on one GPU: the least that vLLM works with, all the time; on its own, nothing; asleep, in turns."""
    pair = named_pair(resolve_run(teacher="4B", student="0.6B"))
    assert pair is not None

    def parts(*assignments: str, **more: Any) -> Memory:
        config = resolve_run(teacher="4B", student="0.6B", assignments=["teacher.backend=vllm", *assignments])
        return student_memory(config, pair.student, pair.teacher, **more)

    alone, ahead, own = parts(), parts(*AHEAD), parts(*OWN)
    asleep = parts("sampler.backend=vllm", "sampler.sleep=true")
    longest = resolve_run(teacher="4B", student="0.6B").longest_response + 2048 + 1
    least = 2 * 596_049_920 + 8192 * layer_bytes(pair.student, 2) + 8 * 256 * 151_936 + GRAPH_BYTES + longest * 114_688
    assert ahead.parts["server"] == least and ahead.parts["sampling"] == 0
    assert ahead.total == alone.total + least  # training was the larger of the two
    assert own.parts["server"] == own.parts["sampling"] == 0 and own.total == alone.total
    assert asleep.parts["server"] == 0 and asleep.parts["sampling"] == least and asleep.total == alone.total
    # A CPU has one memory: whatever cores the server has, it is there, with the cache that it is started with.
    on_cpu = parts(*OWN, processes=2, device="cpu")
    cache = math.ceil(8 * longest * 114_688 / 2**30) * 2**30
    assert on_cpu.parts["server"] == -(-(least - GRAPH_BYTES - longest * 114_688 + cache) // 2)


def test_a_server_gets_what_the_trainer_leaves() -> None:
    found = plan_for("32B", "1.7B", "8xH100", *AHEAD)
    sampler, pool = found.best.layout.student.sampler, found.best.layout.student_pool
    assert sampler is not None and sampler.devices == 0 and found.best.layout.student.processes == 1
    memory = found.best.layout.student.memory
    held = sampler.memory.has
    assert held == min(int(0.92 * pool.bytes), pool.bytes - RESERVED_BYTES - (memory.total - memory.parts["server"]))
    (said,) = (re.search(r"vLLM takes (0\.\d\d) of the GPU", note) for note in notes(found) if "vLLM takes" in note)
    assert said is not None and float(said[1]) <= held / pool.bytes < float(said[1]) + 0.01
    assert memory_by_phase(found.best.layout)["student, training"]["server"] == memory.parts["server"]
    assert "takes at least half of sampling, scoring and training together" in "\n".join(lines(found))
    # With a GPU of its own it is one GPU more, which is paid for and named, and the trainer's memory is its own.
    own = plan_for("32B", "1.7B", "8xH100", *OWN)
    layout = own.best.layout
    assert layout.gpus == layout.teacher.gpus + 2 and layout.student.sampler is not None
    assert layout.student.memory.parts["server"] == 0
    assert layout.student.sampler.memory.has == int(0.92 * pool.bytes)
    run = commands(own)[-1]
    assert run.startswith("CUDA_VISIBLE_DEVICES=6 ") and "'sampler.devices=[\"7\"]'" in run and "--processes 1" in run
    assert not layout.is_shared and own.best.gpu_hours == pytest.approx(layout.gpus * own.best.seconds / 3600)


def test_a_vllm_of_the_student_s_is_timed_as_a_server() -> None:
    """The same 60 microseconds a layer and step that the teacher's servers take, on one device for all processes."""
    found = plan_for("235B", "4B", "2x8xH100", "sampler.backend=vllm")
    (phase,) = [phase for phase in found.best.phases if phase.job.role == "student_sample"]
    latency = load_devices()["H100"].latency.serve * 1e-6
    assert phase.each.latency >= 36 * latency * max(part.longest_of(part.num) for part in phase.job.sequences)
    assert phase.each.latency / latency / 36 == pytest.approx(
        max(
            phase.job.response_tokens / _slots(found),
            max(part.longest_of(part.num) for part in phase.job.sequences),
        )
    )


def _slots(plan: Plan) -> float:
    sampler = plan.best.layout.student.sampler
    assert sampler is not None
    (job,) = [phase.job for phase in plan.best.phases if phase.job.role == "student_sample"]
    num = sum(part.num for part in job.sequences)
    return min(num, sampler.memory.slots(job.sequence_tokens / num, plan.config.sampler_batch))


def test_what_a_machine_has_no_room_for_is_not_planned() -> None:
    with pytest.raises(UserError, match="nothing fits 1xH100"):
        plan_for("4B", "0.6B", "1xH100", *OWN)
    # What trains fits one of two, and the cache of the longest sequence does not fit the other.
    long = "evaluation.sampling.think.max_new_tokens=400000"
    with pytest.raises(UserError, match=r"a server that samples from 0\.6B needs 5[0-9.]+ GB .* has 44\.2"):
        plan_for("4B", "0.6B", "4xL40S", *OWN, long)
    # A server is reached on its own machine: nine processes on two of eight are not planned.
    found = plan_for("4B", "0.6B", "2x8xH100", "sampler.backend=vllm")
    every = [found.best, *(one for _, one in found.others)]
    assert max(one.layout.student.processes for one in every) <= 8


def test_a_server_on_a_cpu_is_slower_than_a_sampler() -> None:
    """It took 3.3 to 4 times as long for 32 short responses, and twice as long for 64 (docs/plan.md)."""
    found = with_server({"sample": 0.6, "train": 0.4}, {"sample": 500.0, "train": 2000.0})
    assert found["shares"] == {"sample": 0.6, "train": 0.4, "serve": pytest.approx(0.6 / SERVER_TIMES)}
    assert found["latency"]["serve"] == 500 * SERVER_TIMES
    device = load_devices()["CPU"]
    assert device.shares.sample / device.shares.serve == pytest.approx(SERVER_TIMES, rel=0.05)
    assert device.latency.serve / device.latency.sample == SERVER_TIMES


def test_a_run_on_a_cpu_counts_its_server() -> None:
    config = resolve_run(assignments=AHEAD)
    pair = named_pair(config)
    assert pair is not None
    plans = forecast(config, pair, ALONE), planned(config)
    for plan in plans:
        assert str(plan.devices) == "2xCPU" and plan.best.layout.student.memory.parts["server"] > 2**30
    assert [phase.each for phase in plans[0].best.phases] == [phase.each for phase in plans[1].best.phases]


def test_grpo_hides_the_next_batch_behind_training() -> None:
    plans = [planned(resolve_run(recipe="embedded-grpo", assignments=sets)) for sets in ((), AHEAD)]
    (now,), (ahead,) = (plan.best.steps for plan in plans)
    assert now.stage == ahead.stage == "grpo" and now.num == ahead.num
    phases = {phase.job.role: phase for phase in plans[1].best.phases if phase.job.stage == "grpo"}
    sample, train = (phases[role] for role in ("student_sample", "student_train"))
    longer, shorter = sorted((sample, train), key=lambda phase: -phase.seconds)
    assert ahead.seconds == pytest.approx(longer.seconds / ahead.num)
    assert shorter.hidden == pytest.approx(shorter.seconds * (1 - 1 / ahead.num)) and not longer.is_hidden
    assert now.order == "sampling, then training" and ahead.order == "sampling the next batch beside training"


def test_a_plan_says_in_which_order_a_step_was_taken_to_go() -> None:
    found = plan_for("235B", "4B", "8xH200", *OWN)
    (step,) = found.best.steps
    shown = document(found)
    assert shown["steps"] == [{"stage": "on_policy", "times": 150, "seconds": step.seconds, "order": step.order}]
    assert step.order == "sampling the next batch beside training beside scoring"
    assert sum(one["seconds"] - one["seconds_hidden"] for one in shown["phases"]) == pytest.approx(found.best.seconds)
    text = "\n".join(lines(found))
    assert f", {step.order}" in text and " of it beside something longer)" in text
    # The run that is configured so says it too.
    config = resolve_run(assignments=AHEAD)
    pair = named_pair(config)
    assert pair is not None
    said = "\n".join(short_lines(forecast(config, pair, ALONE)))
    assert "a step of on_policy: " in said and "sampling the next batch beside scoring and training" in said
