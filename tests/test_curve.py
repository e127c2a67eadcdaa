"""Learning curves: apart from the final questions, deterministic under resume, and what ends a stage early."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.errors import DistillError, UserError
from distill.journal import Journal
from eval.tasks import load_task
from pipelines.curve import Curve, _validation_task, best_point
from pipelines.meter import Meter
from pipelines.resolution import resolve_run
from pipelines.strong_to_weak import run
from students.ranks import ALONE

SMALL = [
    "stages.off_policy.num_prompts=48",
    "stages.off_policy.batch_size=16",
    "stages.on_policy.steps=6",
    "stages.on_policy.prompts_per_step=8",
    "evaluation.num_questions=8",
    "evaluation.curve={every: 2, num_questions: 8}",
    "checkpoint_every=2",
]


def points(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in point.items() if key != "seconds"} for point in points(out)]


def test_validation_questions_are_no_final_questions() -> None:
    config = resolve_run(assignments=["evaluation.curve={num_questions: 300}"])
    final = load_task("embedded", num_questions=1000)
    validation = _validation_task(config, [final])
    assert len(validation.prompts) == 300
    assert not {prompt.id for prompt in validation.prompts} & {prompt.id for prompt in final.prompts}


def test_a_task_that_shares_questions_with_the_final_one_is_refused() -> None:
    config = resolve_run(assignments=["evaluation.curve={task: embedded, num_questions: 20}"])
    with pytest.raises(UserError, match=r"shares 20 questions with the task 'embedded'"):
        _validation_task(config, [load_task("embedded", num_questions=20)])


def test_stop_needs_a_stage_and_a_curve() -> None:
    with pytest.raises(UserError, match="'rl'"):
        resolve_run(assignments=["stop.rl.score=0.5", "evaluation.curve.every=2"])
    with pytest.raises(UserError, match=r"stop needs evaluation\.curve"):
        resolve_run(assignments=["stop.on_policy.score=0.5"])


def finished(folder: Path, *more: str) -> Path:
    """A run with a store of its own: what an earlier run left there would cost nothing again."""
    run(resolve_run(assignments=[*SMALL, f"store={folder / 'store'}", *more]), folder / "run", command=["test"])
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("curve"))


def test_a_curve_has_the_start_every_second_step_and_the_end(whole: Path) -> None:
    places = [(point["stage"], point["step"], point["global_step"]) for point in points(whole)]
    assert places == [
        *(("off_policy", step, step) for step in (0, 2, 4, 6)),
        *(("on_policy", step, 6 + step) for step in (0, 2, 4, 6)),
    ]
    on_policy = [point for point in points(whole) if point["stage"] == "on_policy"]
    assert [point["flops"] for point in on_policy] == sorted(point["flops"] for point in on_policy)
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    spent = sum(line["flops"] for line in metrics if line["stage"] == "on_policy")
    assert on_policy[0]["flops"] == 0 and on_policy[-1]["flops"] == pytest.approx(spent)


def test_flops_end_a_stage(whole: Path, tmp_path: Path) -> None:
    goal = next(point["flops"] for point in points(whole) if (point["stage"], point["step"]) == ("on_policy", 4))
    out = finished(tmp_path, f"stop.on_policy.flops={goal}")
    assert timeless(out) == timeless(whole)[:-1]
    state = json.loads((out / "checkpoints" / "step_10" / "state.json").read_text())
    assert state["stage_end"] and len((out / "metrics.jsonl").read_text().splitlines()) == 10


def test_a_score_ends_a_stage(tmp_path: Path) -> None:
    out = finished(tmp_path, "stop.off_policy.score=0.0")
    assert [point["step"] for point in points(out) if point["stage"] == "off_policy"] == [0]


def test_a_stage_ends_with_its_best_weights(whole: Path, tmp_path: Path) -> None:
    out = finished(tmp_path, "evaluation.curve.keep_best=true")
    best = best_point(points(out), "on_policy")
    assert best["scores"][0]["mean"] > points(out)[-1]["scores"][0]["mean"] or best["step"] < 6, "nothing to keep"
    (path,) = (out / "checkpoints").glob("best-on_policy-*.safetensors")
    assert path.stem == f"best-on_policy-step_{best['global_step']}"
    kept = load_file(path)
    student = load_file(out / "student" / "model.safetensors")
    assert all(torch.equal(tensor, student[name]) for name, tensor in kept.items() if name in student)
    last = load_file(whole / "student" / "model.safetensors")
    assert not torch.equal(kept["model.norm.weight"], last["model.norm.weight"])


class Weights:
    """A student of two numbers: the step that it has reached, and in which life of its run."""

    def __init__(self, life: int) -> None:
        self.life, self.step = life, 0

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        return {"step and life": torch.tensor([self.step, self.life])}

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        self.step, self.life = tensors["step and life"].tolist()


STAGE: Any = SimpleNamespace(name="on_policy", num_steps=6)


def live(
    out: Path, number: int, scores: Sequence[float], *, until: int, every: int = 2, stopped: bool = False
) -> tuple[Curve, Weights]:
    """Go on from the newest checkpoint in ``out`` to step ``until``, with these scores at the steps from there on.

    Who is ``stopped`` leaves a checkpoint behind the last point; who is killed does not.
    """
    config = resolve_run(assignments=["evaluation.curve={every: 1, num_questions: 2, keep_best: true}"])
    journal = Journal(out, config)
    journal.manifest({"command": "a test"})
    found = journal.last_checkpoint()
    first = 0 if found is None else found[0]["global_step"]
    journal.keep_steps(first)
    crew: Any = SimpleNamespace(ranks=ALONE, student_sampler=None, meter=Meter())
    curve, student, left = Curve(config, crew, journal, []), Weights(number), list(scores)
    entry = {"task": "t", "mode": "think", "metric": "m", "ci95": [0, 1], "num_questions": 1, "num_samples": 1}
    learner: Any = student
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curve, "_examine", lambda *_: [SimpleNamespace(entries=[{**entry, "mean": left.pop(0)}])])
        for step in range(first, until + 1):
            student.step = step
            if step > first and step % every == 0 and step < STAGE.num_steps:
                checkpoint(journal, curve, step, is_end=False)
            curve.ends(STAGE, step, step, learner)
    if stopped:
        checkpoint(journal, curve, until, is_end=False)
    assert not left
    journal.close()
    return curve, student


def checkpoint(journal: Journal, curve: Curve, step: int, *, is_end: bool) -> None:
    journal.write_checkpoint(step, {"stage_end": is_end, "stage_name": STAGE.name}, {}, lambda folder: None)
    curve.tidy(STAGE)


def end(curve: Curve, student: Weights) -> list[int]:
    """Step and life of the weights with which the stage ends."""
    learner: Any = student
    curve.settle(STAGE, learner)
    return [student.step, student.life]


def kept(out: Path) -> list[int]:
    found = (out / "checkpoints").glob("best-*.safetensors")
    return sorted(int(path.stem.rpartition("_")[2]) for path in found)


def test_weights_that_no_point_describes_any_more_are_not_taken(tmp_path: Path) -> None:
    """Killed behind a point that was the best, and is not where it is found again."""
    live(tmp_path, 1, [0.1, 0.3, 0.2, 0.9], until=3)
    curve, student = live(tmp_path, 2, [0.2, 0.25, 0.05, 0.1, 0.2], until=6)
    assert [point["scores"][0]["mean"] for point in points(tmp_path)] == [0.1, 0.3, 0.2, 0.25, 0.05, 0.1, 0.2]
    assert end(curve, student) == [1, 1]


def test_a_point_that_is_found_again_has_the_weights_of_the_life_that_found_it(tmp_path: Path) -> None:
    live(tmp_path, 1, [0.1, 0.3, 0.2, 0.9], until=3)
    curve, student = live(tmp_path, 2, [0.2, 0.4, 0.05, 0.1, 0.2], until=6)
    assert end(curve, student) == [3, 2]


def test_weights_stay_until_no_resume_can_want_them(tmp_path: Path) -> None:
    curve, student = live(tmp_path, 1, [0.1, 0.2, 0.3, 0.4], until=3)
    assert kept(tmp_path) == [1, 2, 3]  # step 2 is done again, so the best before it may be the best
    curve, student = live(tmp_path, 2, [0.3, 0.2, 0.5, 0.1, 0.6], until=6)
    assert kept(tmp_path) == [2, 4, 6]  # 1 and 3 went with the checkpoint at step 4
    assert end(curve, student) == [6, 2]
    journal = curve.journal
    checkpoint(journal, curve, 6, is_end=True)
    assert kept(tmp_path) == [6]


def test_a_stop_right_behind_the_best_point_leaves_the_best_before_it(tmp_path: Path) -> None:
    """Its own checkpoint is where the run is resumed, and that point is found again."""
    live(tmp_path, 1, [0.1, 0.3, 0.2, 0.9], until=3, stopped=True)
    assert kept(tmp_path) == [1, 3]
    curve, student = live(tmp_path, 2, [0.2, 0.1, 0.1, 0.1], until=6)
    assert end(curve, student) == [1, 1]


def test_best_weights_that_are_missing_end_the_run_at_its_next_point(tmp_path: Path) -> None:
    live(tmp_path, 1, [0.1, 0.9, 0.2], until=2)
    (tmp_path / "checkpoints" / "best-on_policy-step_1.safetensors").unlink()
    with pytest.raises(DistillError, match=r"best-on_policy-step_1\.safetensors is missing: the weights of step 1 of"):
        live(tmp_path, 2, [0.2], until=2)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_resume_finds_again_the_best_point_has_its_weights(tmp_path: Path, seed: int) -> None:
    """Killed or stopped three times anywhere, with other scores in every life."""
    draw = random.Random(seed)
    curve, student, lives = None, None, dict[int, int]()
    for life, until in enumerate([*(draw.randint(1, 5) for _ in range(3)), 6]):
        states = (tmp_path / "checkpoints").glob("step_*/state.json")
        first = max((int(path.parent.name.removeprefix("step_")) for path in states), default=0)
        if until >= first:
            scores = [draw.random() for _ in range(first, until + 1)]
            stopped, every = until < STAGE.num_steps and draw.random() < 0.5, draw.choice([1, 2, 3])
            curve, student = live(tmp_path, life, scores, until=until, every=every, stopped=stopped)
            lives |= dict.fromkeys(range(first, until + 1), life)
    assert curve is not None and student is not None
    best = best_point(points(tmp_path), "on_policy")["step"]
    assert end(curve, student) == [best, lives[best]]


def test_a_killed_run_has_the_same_curve(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "distill.cli", "run", "--out", str(out)]
    command += [part for assignment in SMALL for part in ("--set", assignment)] + ["--store", str(tmp_path / "store")]
    for place in (3, 7):  # in the first stage, and right after the second one's first point
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if (out / "curve.jsonl").exists() and len((out / "curve.jsonl").read_text().splitlines()) >= place:
                    os.kill(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.02)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert timeless(out) == timeless(whole)
