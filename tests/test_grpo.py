"""The reinforcement-learning stages: rewards on paper, a verifier that refuses, real runs that add up and resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from distill.embedded import checkpoint_dir
from distill.errors import StoppedError, UserError
from distill.interrupt import deferred_signals
from distill.types import Advantage, Example, Prompt, Request, Rollout, Sampling
from pipelines.grpo import _over_constant
from pipelines.phases import reproducible
from pipelines.resolution import resolve_run
from pipelines.rewards import group_advantages, overlong_penalty
from pipelines.strong_to_weak import run
from students.student import Student

Metrics = list[dict[str, Any]]


def test_advantages_on_paper() -> None:
    """One right of four: mean 1/4, sample deviation 1/2."""
    assert group_advantages([1.0, 0.0, 0.0, 0.0], divide=True) == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)
    assert group_advantages([1.0, 0.0, 0.0, 0.0], divide=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert group_advantages([1.0] * 4, divide=True) is None
    assert group_advantages([0.0, 0.0], divide=False) is None
    # Length alone tells these apart.
    assert group_advantages([-1.0, 0.0], divide=False) == [-0.5, 0.5]


def test_overlong_responses_lose_reward_evenly() -> None:
    assert [overlong_penalty(length, 100, 0.2) for length in (1, 80, 85, 100)] == [0.0, 0.0, -0.25, -1.0]
    assert overlong_penalty(100, 100, 0.0) == 0.0


def test_dr_grpo_turns_the_mean_over_tokens_into_a_sum_over_a_constant() -> None:
    request = Request(Prompt(({"role": "user", "content": "1+1="},)), "think", "hard", (1,), Sampling(10), 0)

    def example(length: int, forced: int, value: float) -> Example:
        marks = (False,) * (length - forced) + (True,) * forced
        rollout = Rollout(request, (5,) * length, marks, (-1.0,) * length, "stop", "student")
        return Example(rollout, Advantage(value))

    examples = [example(4, 0, 1.5), example(7, 2, -0.5)]
    scaled = [x.signal for x in _over_constant(examples, limit=30.0)]
    # The student divides by 4 + 5 tokens; together with the scale that is a division by 30.
    assert [x.value / 9 for x in scaled if isinstance(x, Advantage)] == pytest.approx([1.5 / 30, -0.5 / 30])


def configuration(stage: dict[str, Any], *more: str, **choices: Any) -> Any:
    """Two steps of off-policy training, which leave the embedded teacher's own weights worse for it, then ``stage``.

    Answers without thinking are two tokens and often wrong: groups with a difference cost next to nothing.
    """
    limits = {"think": {"max_new_tokens": 96}, "no_think": {"max_new_tokens": 16}}
    shape = {"steps": 3, "prompts_per_step": 8, "samples_per_prompt": 8, "mixture": {"think_share": 0.25}}
    optimiser = {"learning_rate": 3e-4, "warmup_steps": 0}
    stages = {"on_policy": None, "rl": {"sampling": limits, **shape, "optimiser": optimiser, **stage}}
    return resolve_run(
        recipe="embedded",
        student=str(checkpoint_dir("tiny")),
        assignments=[
            f"stages={json.dumps(stages)}",
            "stages.off_policy.num_prompts=16",
            "stages.off_policy.batch_size=16",
            "stages.off_policy.optimiser.learning_rate=5e-3",
            "evaluation.num_questions=2",
            "evaluation.modes=[think]",
            "checkpoint_every=100",
            "preflight.same_weights=true",
            *more,
        ],
        **choices,
    )


def numbers(out: Path, stage: str = "rl") -> Metrics:
    """The stage's lines of metrics.jsonl, times aside."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [reproducible(row) for row in rows if row["stage"] == stage]


SEVERAL = {"kind": "grpo", "kl_coefficient": 0.1, "policy_gradient": {"updates_per_step": 2}}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two optimiser steps a batch and a KL to the start, which both ask for passes of their own."""
    out = tmp_path_factory.mktemp("several") / "run"
    return out, run(configuration(SEVERAL), out, command=["a test"])


def test_what_a_step_does_and_costs(several: tuple[Path, dict[str, Any]]) -> None:
    out, summary = several
    rows = numbers(out)
    costs = {role: cost["stages"]["rl"] for role, cost in summary["costs"].items() if "rl" in cost["stages"]}
    assert {"student_sample", "student_score", "verify", "student_train"} <= costs.keys()
    # Of the groups that are kept: two more passes (the old policy, the start), and three of training.
    assert costs["student_score"]["tokens"] == 2 * costs["student_train"]["tokens"]
    assert costs["student_score"]["flops"] == pytest.approx(2 / 3 * costs["student_train"]["flops"])
    for row in rows:
        assert row["groups"] == 8 and row["num_responses"] == 64
        responses = row["tokens.student_sample"]
        assert (row["num_tokens"] < responses) == (row["groups.equal"] > 0) and row["num_tokens"] > 0
        assert row["reward"] == pytest.approx(0.25 * row["think.reward"] + 0.75 * row["no_think.reward"])
        assert row["reverse_kl"] is None  # no teacher judges
        assert row["importance"] == pytest.approx(1.0, abs=1e-3)
    assert sum(row["groups.equal"] for row in rows) > 0
    # The second update of a batch is off the policy that sampled it.
    assert all(row["ratio"] != 1.0 for row in rows)
    # The start is where the stage began: near at first, then left behind.
    assert 0 <= rows[0]["start_kl"] < rows[-1]["start_kl"]


def test_the_first_step_is_at_the_start(tmp_path: Path) -> None:
    """One update a step: the ratio is 1 and the reference is the student itself, up to rounding."""
    stage = {"kind": "grpo", "kl_coefficient": 0.1, "steps": 1, "policy_gradient": {"dr_grpo": True}}
    run(configuration(stage), tmp_path / "run", command=["a test"])
    (row,) = numbers(tmp_path / "run")
    assert row["start_kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["ratio"] == 1.0 and row["clipped"] == 0.0


def test_a_stop_within_a_batch_waits_for_its_end_and_the_run_goes_on_to_the_same_numbers(
    several: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, summary = several
    step, seen = Student.step, []

    def stopped(self: Student, *arguments: Any, **options: Any) -> dict[str, Any]:
        found = step(self, *arguments, **options)
        seen.append(options["where"])
        if options["where"] == "rl step 1" and seen.count("rl step 1") == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Student, "step", stopped)
        with deferred_signals(), pytest.raises(StoppedError):
            run(configuration(SEVERAL), out, command=["a test"])
    assert seen.count("rl step 1") == 2  # both updates of the batch
    assert numbers(out) == numbers(reference)[:2]
    again = run(configuration(SEVERAL), out, command=["a test"])
    assert numbers(out) == numbers(reference)
    assert again["scores"] == summary["scores"]
    assert again["costs"]["student_score"]["tokens"] == summary["costs"]["student_score"]["tokens"]


def test_a_teacher_and_a_verifier_in_one_loss(tmp_path: Path) -> None:
    """The loss is the sum of its parts: with next to no reward it is the divergence."""
    for name, reward in (("both", 1.0), ("teacher", 1e-12)):
        stage = {"kind": "opd_reward", "steps": 1, "reward_coefficient": reward, "divergence_coefficient": 0.5}
        summary = run(configuration(stage), tmp_path / name, command=["a test"])
        assert summary["costs"]["teacher_score"]["stages"]["rl"]["tokens"] > 0
    (both,), (teacher,) = numbers(tmp_path / "both"), numbers(tmp_path / "teacher")
    assert teacher["loss"] == pytest.approx(0.5 * teacher["reverse_kl"], rel=1e-4)
    assert both["reverse_kl"] == pytest.approx(teacher["reverse_kl"]) and both["grad_norm"] > 2 * teacher["grad_norm"]
    # Groups that are worth the same still hear the teacher.
    assert both["groups.equal"] > 0 and both["num_tokens"] == both["tokens.student_sample"]


def test_prompts_without_an_answer_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "my.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]
    rows[7].pop("answer")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration({"kind": "grpo", "steps": 20}, prompts=str(prompts))
    with pytest.raises(UserError, match=r"stage rl rewards right answers, and 1 of its 160 prompts have none.*'0\+7='"):
        run(config, tmp_path / "run", command=["a test"])
    assert not (tmp_path / "run" / "eval").exists()  # refused before anything was examined


def test_ones_own_answers_choose_their_grader(tmp_path: Path) -> None:
    prompts = tmp_path / "my.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(configuration({"kind": "grpo", "steps": 1}, prompts=str(prompts)), tmp_path / "run", command=["a test"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stages"]["rl"]["grader"] == "number"
    assert numbers(tmp_path / "run")[0]["think.reward"] > 0.5  # the teacher's weights know their sums
    with pytest.raises(UserError, match="no grader is known for 'exat'; nearest: exact"):
        run(configuration({"kind": "grpo", "policy_gradient": {"grader": "exat"}}), tmp_path / "x", command=["a test"])
