"""Guards, provoked: a student wrecked for real, one whose entropy collapses, one that is its own teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from distill.config import FALLING_GUARDS, GuardLimits, GuardSettings
from distill.embedded import checkpoint_dir
from distill.errors import GuardError, UserError
from distill.repetition import repetition
from eval.report import write_report
from pipelines.guards import GUARDS, Guards
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run

Stream = list[dict[str, Any]]
ALL_OFF = dict.fromkeys(GUARDS)


def assignments(stage: dict[str, Any], guards: dict[str, Any]) -> list[str]:
    """The embedded teacher's own weights as the student, one stage, and hardly an examination."""
    limits = {"think": {"max_new_tokens": 96}, "no_think": {"max_new_tokens": 16}}
    stages = {"off_policy": None, "on_policy": None, "only": {"sampling": limits, **stage}}
    return [
        f"stages={json.dumps(stages)}",
        f"guards={json.dumps(guards)}",
        "evaluation.num_questions=2",
        "evaluation.modes=[think]",
        "preflight.same_weights=true",
    ]


def grpo(rate: float, steps: int, **more: Any) -> dict[str, Any]:
    optimiser = {"learning_rate": rate, "warmup_steps": 0}
    return {
        "kind": "grpo",
        "steps": steps,
        "prompts_per_step": 8,
        "samples_per_prompt": 4,
        "optimiser": optimiser,
        **more,
    }


def stream_of(out: Path, stage: dict[str, Any]) -> Stream:
    """The metrics of a real run that no guard watches."""
    config = resolve_run(
        recipe="embedded", student=str(checkpoint_dir("tiny")), assignments=assignments(stage, ALL_OFF)
    )
    run(config, out, command=["a test"])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def wrecked(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """A thousand times the learning rate: responses run to the limit, say the same again and again, then break off."""
    return stream_of(tmp_path_factory.mktemp("wrecked") / "run", grpo(1e-2, 6, mixture={"think_share": 0.5}))


def stopped_at(stream: Stream, settings: GuardSettings) -> tuple[int, str] | None:
    """Where guards with ``settings`` end the stream, and their sentence."""
    guards = Guards(settings, stage="only", checkpoints=Path("runs/x/checkpoints"), history=[])
    for metrics in stream:
        try:
            guards.watch(metrics)
        except GuardError as error:
            return metrics["step"], str(error)
    return None


def only(name: str, window: int, limits: GuardLimits | None = None) -> GuardSettings:
    """One guard alone, with its default limits unless others are given."""
    default = dict(GuardSettings())[name]
    return GuardSettings(**{**ALL_OFF, name: limits or default, "window": window})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("length", "times as long as at the beginning"),
        ("repetition", "share of repeated 4-grams has risen"),
        ("truncation", "cut off at the token limit has risen"),
        ("closure", "closed thinking has fallen"),
    ],
)
def test_a_wrecked_student_trips_each_guard(
    wrecked: Stream, name: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stopped_at(wrecked, only(name, window=1))
    assert found is not None
    step, said = found
    assert sentence in said and f"the guard '{name}' stopped the run at only step {step}" in said
    assert f"runs/x/checkpoints/step_{step + 1}" in said and f"guards.{name}" in said
    # It was warned of before, at an earlier step.
    assert f"warning, guard '{name}', only step" in capsys.readouterr().err and step >= 2


def test_a_step_away_from_the_limits_nothing_happens(wrecked: Stream) -> None:
    """The limits are settings; a stop takes a warning first; null switches off."""
    at = {
        name: stopped_at(wrecked, only("length", 1, GuardLimits(warn=warn, stop=stop)))
        for name, warn, stop in (("default", 2.0, 4.0), ("patient", 2.0, 9.0), ("deaf", 9.0, 9.5))
    }
    assert at["default"] is not None and at["patient"] is None and at["deaf"] is None
    assert stopped_at(wrecked, GuardSettings(**ALL_OFF, window=1)) is None
    assert stopped_at(wrecked[:1] * 20, GuardSettings()) is None
    # Responses of a teacher are nobody's fault.
    taught = [{key: value for key, value in row.items() if key != "tokens.student_sample"} for row in wrecked]
    assert stopped_at(taught, only("length", 1)) is None


def test_entropy_that_collapses(tmp_path: Path) -> None:
    """Answers without thinking, rewarded at a rate at which one guess soon is all that is left."""
    stage = grpo(3e-3, 16, mixture={"think_share": 0.0}, prompts_per_step=16)
    stream = stream_of(tmp_path / "run", stage)
    found = stopped_at(stream, only("entropy", 1, GuardLimits(warn=0.5, stop=0.1)))
    assert found is not None and "entropy, as sampled, is" in found[1]
    # A student that comes to be as certain as its teacher has not collapsed.
    judged = [{**row, "tokens.teacher_score": 1} for row in stream]
    assert stopped_at(judged, only("entropy", 1, GuardLimits(warn=0.5, stop=0.1))) is None


def test_the_teacher_as_its_own_student(tmp_path: Path) -> None:
    """A real process: exit code 1, one sentence, a checkpoint that loads, and the same again for the same command."""
    out = tmp_path / "run"
    stage = {"kind": "on_policy", "steps": 8, "prompts_per_step": 4, "samples_per_prompt": 1}
    sets = [part for text in assignments(stage, {"window": 2}) for part in ("--set", text)]
    command = [sys.executable, "-m", "distill.cli", "run", "--out", str(out), "--recipe", "embedded", *sets]
    command += ["--student", str(checkpoint_dir("tiny"))]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    sentence = next(line for line in process.stderr.splitlines() if "the guard 'kl' stopped the run" in line)
    assert "only step 2" in sentence
    config = resolve_run(
        recipe="embedded", student=str(checkpoint_dir("tiny")), assignments=assignments(stage, {"window": 2})
    )
    with pytest.raises(GuardError) as again:
        run(config, out, command=["a test"])
    assert str(again.value) in sentence
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step_3") is not None
    assert not (out / "summary.json").exists()
    # Kept once, however often the command is given.
    kept = [json.loads(line) for line in (out / "warnings.jsonl").read_text().splitlines()]
    assert [(found["verdict"], found["step"], found["guard"]) for found in kept] == [
        ("warn", 1, "kl"),
        ("stop", 2, "kl"),
    ]
    assert "The guard kl stopped this run at only step 2." in write_report(out).read_text()


@pytest.mark.parametrize(
    ("name", "limits", "cure"),
    [
        ("length", "{warn: 2, stop: 1.5}", r"warns at 2 and stops at 1\.5, .* set length\.warn to 1\.5 or a lower"),
        ("kl", "{warn: 1.0e-4, stop: 1.0e-3}", r"stops at 0\.001, .* set kl\.warn to 0\.001 or a higher"),
    ],
)
def test_a_guard_that_could_not_stop_where_it_should_is_refused(name: str, limits: str, cure: str) -> None:
    """A stop takes a warning: the run would go on beyond the limit that was set."""
    with pytest.raises(UserError, match=cure):
        resolve_run(assignments=[f"guards.{name}={limits}"])


def test_the_guards_that_fall_are_named_where_limits_are_compared() -> None:
    assert {name for name, guard in GUARDS.items() if guard.worse == "below"} == set(FALLING_GUARDS)


def test_a_resumed_guard_knows_what_it_saw(wrecked: Stream) -> None:
    """Wherever the stream is cut in two, the second half stops where the whole one does."""
    settings = only("truncation", window=1)
    whole = stopped_at(wrecked, settings)
    assert whole is not None
    for cut in range(whole[0] + 1):
        guards = Guards(settings, stage="only", checkpoints=Path("runs/x/checkpoints"), history=wrecked[:cut])
        with pytest.raises(GuardError) as stopped:
            for metrics in wrecked[cut:]:
                guards.watch(metrics)
        assert str(stopped.value) == whole[1]
    with pytest.raises(GuardError, match="the guard 'truncation'"):
        Guards(settings, stage="only", checkpoints=Path("runs/x/checkpoints"), history=wrecked[: whole[0] + 1])


def test_repetition_counts_what_was_said_before() -> None:
    assert repetition((1, 2, 3)) == 0.0
    assert repetition(tuple(range(50))) == 0.0
    # Nine 4-grams, of which (1, 2), (2, 1) alternate: two are new.
    assert repetition((1, 2) * 6) == pytest.approx(7 / 9)
