"""A run's examinations: its tasks, asked of each checkpoint in turn, and what the scores say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.config import RunConfig
from distill.costs import Cost
from distill.errors import UserError
from distill.family import EMBEDDED_NAMES
from distill.progress import say
from distill.prompts import PromptSource
from distill.sampler import Sampler
from distill.types import Mode, Prompt
from eval.budget import budget_curves
from eval.comparison_table import PASS
from eval.evaluation import Evaluation
from eval.runner import refuse_namesakes
from eval.statistics import paired_difference
from eval.switching import TASK as MODE_SWITCHING
from eval.switching import ModeSwitching
from eval.tasks import Task, load_task
from pipelines.crew import Crew
from pipelines.examination import Examined, Subject, examine_mode_switching, examine_task
from pipelines.meter import MeteredSampler


class Scores:
    """What a run's checkpoints scored. Reads the tasks when it is made, before anything is spent.

    Raises UserError where nothing is left to measure a gap on, and for tasks that cannot be told apart.
    """

    def __init__(self, config: RunConfig, held_out: Sequence[Prompt]) -> None:
        self.config = config
        settings = config.evaluation
        wanted = settings.tasks or _own_tasks(config, held_out)
        self.tasks: list[Task] = [
            load_task(one, num_questions=settings.num_questions, samples=settings.samples, held_out=held_out)
            for one in wanted
            if one != MODE_SWITCHING
        ]
        if not self.tasks:
            raise UserError("evaluation.tasks names mode_switching alone, which no gap is measured on; add a task")
        self._examines_switching = MODE_SWITCHING in wanted
        passing = [] if settings.pass_at is None else [f"{self.tasks[0].name}{PASS}"]
        switching = [MODE_SWITCHING] if self._examines_switching else []
        refuse_namesakes([*(task.name for task in self.tasks), *passing, *switching])
        self._evaluations: list[Evaluation] = []
        self._switching: list[ModeSwitching] = []

    def say_trained(self, source: PromptSource) -> None:
        """Say of a task whose questions the student is trained on that its score is none of new questions."""
        for task in self.tasks:
            num = source.num_trained(task.prompts)
            if num:
                say(
                    f"warning: {num} of the {len(task.prompts)} questions of the task {task.name} are among the "
                    "prompts that are trained on, and its scores are of questions that the student has seen; what is "
                    "held out of the prompts is the task prompts"
                )

    def examine(self, checkpoint: str, sampler: Sampler, crew: Crew, out: Path) -> None:
        """Every evaluation of one checkpoint, into the folder ``out``; what is there already is not made again."""
        settings, seed = self.config.evaluation, self.config.seed
        shape = crew.teachers.default.shape if checkpoint == "teacher" else crew.student_shape
        subject = Subject(
            checkpoint,
            MeteredSampler(sampler, crew.meter, shape, "evaluate", checkpoint),
            crew.encoder,
            shape=shape,
            context=self.config.max_prompt_tokens + self.config.longest_response,
        )
        for task in self.tasks:
            self._evaluations += examine_task(subject, task, settings, seed=seed, out=out)
        if (passing := settings.pass_at) is not None:
            few = replace(
                self.tasks[0],
                name=f"{self.tasks[0].name}{PASS}",
                prompts=self.tasks[0].prompts[: passing.num_questions],
                samples=passing.samples,
                pass_at=(passing.k,),
                modes=passing.modes,
            )
            without_budgets = settings.model_copy(update={"budgets": ()})
            self._evaluations += examine_task(subject, few, without_budgets, seed=seed, out=out)
        if self._examines_switching:
            self._switching.append(examine_mode_switching(subject, settings, seed=seed, out=out))
        crew.meter.account.entries.setdefault("evaluate", {})[checkpoint] = self._cost(checkpoint)

    @property
    def _examined(self) -> list[Examined]:
        return [*self._evaluations, *self._switching]

    def _cost(self, checkpoint: str) -> Cost:
        """From the evaluations themselves: parts of them may have been made by an earlier process of this run."""
        cost = Cost()
        for found in self._examined:
            if found.checkpoint == checkpoint:
                cost.add(Cost(found.num_tokens, found.flops or 0.0, found.seconds))
        return cost

    def summary(self, stages: Sequence[str]) -> dict[str, Any]:
        """The scores, budget curves and gaps of a run of these stages."""
        return {
            "scores": [entry for found in self._examined for entry in found.entries],
            "budget_curves": budget_curves(self._evaluations),
            "gap_closed": {mode: self._gap_closed(mode, stages) for mode in self.config.evaluation.modes},
        }

    def _gap_closed(self, mode: Mode, stages: Sequence[str]) -> float | None:
        """Share of the distance between the first stage's student and the teacher that the last stage covered;
        where there is one stage alone, between the start and the teacher.

        Of the first task; null where it is not asked in this mode, where the teacher's lead is not certain (its paired
        95 % interval reaches zero) or the teacher was not examined.
        """
        by_checkpoint = {
            evaluation.checkpoint: evaluation
            for evaluation in self._evaluations
            if evaluation.mode == mode
            and evaluation.task == self.tasks[0].name
            and evaluation.sampling.thinking_budget is None
        }
        if "teacher" not in by_checkpoint:
            return None
        before = stages[0] if len(stages) > 1 else "start"
        teacher, first, last = (by_checkpoint[name] for name in ("teacher", before, stages[-1]))
        if paired_difference(teacher.scores, first.scores).ci95[0] <= 0:
            return None
        return (_mean(last) - _mean(first)) / (_mean(teacher) - _mean(first))


def _own_tasks(config: RunConfig, held_out: Sequence[Prompt]) -> tuple[str, ...]:
    """What to examine on where the configuration leaves it open."""
    if config.prompts.kind == "embedded":
        return ("embedded",)
    if held_out:
        return ("prompts",)
    # The embedded models know their own task alone, and need no hub for it.
    return ("embedded",) if config.teacher.model in EMBEDDED_NAMES else ("gsm8k",)


def _mean(evaluation: Evaluation) -> float:
    """The first metric's mean: avg@K."""
    return next(iter(evaluation.metrics.values())).mean
