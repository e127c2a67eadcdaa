"""The learning curve: examinations between the steps of a stage, on questions that no final score uses.

What a stage reached by when decides which checkpoint is its best and when a stage may end; both would flatter the
final scores if they looked at the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from distill.config import RunConfig
from distill.costs import Cost
from distill.errors import DistillError, UserError
from distill.evaluation_config import CurveSettings, StopSettings
from distill.journal import Journal, StoredTensors, writing
from distill.sampler import Sampler
from distill.seeding import derive
from eval.evaluation import Evaluation
from eval.runner import evaluate
from eval.tasks import Task, load_task
from pipelines.crew import Crew, Stage
from pipelines.meter import MeteredSampler
from students.shared_sampler import with_all_samplers
from students.student import Student


class Curve:
    """Examines the student every so many steps, records the point, and says when a stage has reached its goal."""

    def __init__(self, config: RunConfig, crew: Crew, journal: Journal, tasks: Sequence[Task]) -> None:
        settings = config.evaluation.curve
        assert settings is not None, "a run without evaluation.curve has no learning curve"
        self.settings: CurveSettings = settings
        self.config, self.crew, self.journal = config, crew, journal
        self.task = _validation_task(config, tasks)

    def ends(self, stage: Stage, done: int, global_step: int, student: Student) -> bool:
        """Examine the weights after ``done`` steps of ``stage`` if it is time to; whether the stage may end here."""
        if done % self.settings.every and done != stage.num_steps:
            return False
        ranks = self.crew.ranks
        with student.whole():
            found = with_all_samplers(ranks, self.crew.student_sampler, self._examine)
        scores = ranks.from_main(found)
        assert scores is not None
        cost = Cost()
        for part in self.crew.meter.account.of_stage(stage.name).values():
            cost.add(part)
        self.journal.record_curve(
            {
                "stage": stage.name,
                "step": done,
                "global_step": global_step,
                "tokens": cost.tokens,
                "flops": cost.flops,
                "seconds": cost.seconds,
                "scores": [_entry(evaluation) for evaluation in scores],
            }
        )
        if self.settings.keep_best:
            self._keep(stage, global_step, student)
        stop = self.config.stop.get(stage.name, StopSettings())
        return _is_reached(stop.score, _mean(scores[0])) or _is_reached(stop.flops, cost.flops)

    def settle(self, stage: Stage, student: Student) -> None:
        """At the end of ``stage``: take its best weights, if that is wanted."""
        if self.settings.keep_best:
            student.load_weights(StoredTensors(self._best(stage), ""))

    def tidy(self, stage: Stage) -> None:
        """Drop weights that were the best of ``stage`` once and that no run which is resumed from here on can want."""
        ranks = self.crew.ranks
        with ranks.together():
            found = self.journal.last_checkpoint() if ranks.is_main and self.settings.keep_best else None
            if found is None:
                return
            state, points = found[0], self.journal.curve()
            is_over = state["stage_end"] and state["stage_name"] == stage.name
            # A point at the checkpoint itself is found again, and may not be the best then.
            sure = points if is_over else [point for point in points if point["global_step"] < state["global_step"]]
            bests = [best_point(some, stage.name) for some in (points, sure)]
            wanted = {self._file(stage, best["global_step"]) for best in bests}
            for path in set(self._files(stage)) - wanted:
                with writing(path):
                    path.unlink()

    def _keep(self, stage: Stage, global_step: int, student: Student) -> None:
        """Write the weights down if their point is the best so far; see to it that the best ones are there if not."""
        ranks = self.crew.ranks
        if not ranks.from_main(
            ranks.is_main and best_point(self.journal.curve(), stage.name)["global_step"] == global_step
        ):
            self._best(stage)
            return
        weights = student.weights()
        with ranks.together():
            if ranks.is_main:
                _write(self._file(stage, global_step), weights)

    def _best(self, stage: Stage) -> Path:
        """The weights of the best point so far. Every process must call it."""
        ranks, path = self.crew.ranks, Path()
        with ranks.together():
            if ranks.is_main:
                point = best_point(self.journal.curve(), stage.name)
                path = self._file(stage, point["global_step"])
                if not path.exists():
                    raise DistillError(
                        f"{path} is missing: the weights of step {point['step']} of {stage.name}, the best point of "
                        "curve.jsonl so far, with which the stage is to end (evaluation.curve.keep_best); restore the "
                        "file, or give another --out"
                    )
        return ranks.from_main(path)

    def _file(self, stage: Stage, global_step: int) -> Path:
        # Each point has its own: steps that are done again may not be as good as they were, and then the best is an
        # earlier point.
        return self.journal.path / "checkpoints" / f"best-{stage.name}-step_{global_step}.safetensors"

    def _files(self, stage: Stage) -> list[Path]:
        return [
            path
            for path in (self.journal.path / "checkpoints").glob("best-*.safetensors")
            if path.stem.removeprefix(f"best-{stage.name}-step_").isdecimal()
        ]

    def _examine(self, sampler: Sampler) -> list[Evaluation]:
        return [
            evaluate(
                self.task,
                mode,
                sampler=MeteredSampler(sampler, self.crew.meter, self.crew.student_shape, "evaluate", "curve"),
                encoder=self.crew.encoder,
                sampling=self.config.evaluation.sampling.of(mode),
                samples=self.settings.samples,
                # The same random numbers at every point: what differs is the weights.
                seed=derive(self.config.seed, "curve", self.task.name, mode),
                checkpoint="curve",
                shape=self.crew.student_shape,
            )
            for mode in self.settings.modes
        ]


def _write(path: Path, weights: Mapping[str, Tensor]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, temporary)
        temporary.replace(path)


def best_point(points: Sequence[Mapping[str, Any]], stage: str) -> Mapping[str, Any]:
    """The point of ``stage`` with the highest score, the earliest of equals."""
    return max((point for point in points if point["stage"] == stage), key=lambda point: point["scores"][0]["mean"])


def _validation_task(config: RunConfig, examined: Sequence[Task]) -> Task:
    """The questions of the curve, none of them in a task of ``examined``."""
    assert config.evaluation.curve is not None
    name, num_questions = config.evaluation.curve.task, config.evaluation.curve.num_questions
    final = {prompt.id: task.name for task in examined for prompt in task.prompts}
    if name is None and config.prompts.kind == "embedded":
        # More than enough are drawn: the short chains are few, and the final questions may hold most of them.
        drawn = load_task("embedded", num_questions=num_questions + len(final), seed=derive(0, "validation"))
        fresh = tuple(prompt for prompt in drawn.prompts if prompt.id not in final)
        return replace(drawn, name="embedded-validation", prompts=fresh[:num_questions])
    if name is None:
        raise UserError(
            "evaluation.curve.task is null, and only the embedded task has validation questions of its own; name a "
            "task, or a JSONL file with questions that evaluation.tasks does not use"
        )
    task = load_task(name, num_questions=num_questions)
    shared = [prompt.id for prompt in task.prompts if prompt.id in final]
    if shared:
        raise UserError(
            f"evaluation.curve.task {name!r} shares {len(shared)} questions with the task {final[shared[0]]!r} of "
            f"evaluation.tasks; a checkpoint that was chosen on them would look better than it is: name another task"
        )
    return task


def _entry(evaluation: Evaluation) -> dict[str, Any]:
    entry = evaluation.entries[0]
    return {key: entry[key] for key in ("task", "mode", "metric", "mean", "ci95", "num_questions", "num_samples")}


def _mean(evaluation: Evaluation) -> float:
    return float(evaluation.entries[0]["mean"])


def _is_reached(goal: float | None, value: float) -> bool:
    return goal is not None and value >= goal
