"""Settings of the examinations: tasks, learning curves, what may end a stage early."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Discriminator, Field, Tag, model_validator

from distill.settings import Distinct, PositiveFloat, PositiveInt, Settings, Share
from distill.stage_config import ModeSampling, SamplingSettings
from distill.types import Mode


class CurveSettings(Settings):
    """Examinations between the steps of a stage: its learning curve, and what may end it early (``stop``)."""

    every: PositiveInt = 20
    """Optimiser steps from one examination to the next; the weights a stage starts from are examined too."""
    task: str | None = None
    """A task whose questions no final score uses; null takes test questions of the embedded task that no
    task of ``evaluation.tasks`` asks."""
    num_questions: PositiveInt = 256
    samples: PositiveInt = 1
    modes: Annotated[tuple[Mode, ...], Field(min_length=1), Distinct] = ("think",)
    """The first one's score is what ``stop`` and ``keep_best`` look at."""
    keep_best: bool = False
    """A stage ends with the weights that scored best, the earliest of equals, instead of its last ones."""


class StopSettings(Settings):
    """Ends a stage before its last step, at the first examination that finds either reached."""

    score: Share | None = None
    flops: PositiveFloat | None = None
    """FLOPs of the stage, all roles together."""


class PassAtSettings(Settings):
    """How often one of k responses is right, from many responses to few questions (unbiased pass@k)."""

    k: PositiveInt = 64
    samples: PositiveInt = 128
    num_questions: PositiveInt = 100
    modes: Annotated[tuple[Mode, ...], Field(min_length=1), Distinct] = ("think",)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.samples < self.k:
            raise ValueError(f"pass@{self.k} needs at least {self.k} samples a question, and samples is {self.samples}")
        return self


class ModeText(Settings):
    """A text for each mode; null keeps the task's own."""

    think: str | None = None
    no_think: str | None = None


class TaskSettings(Settings):
    """A task with settings of its own; one without any is written as its name alone.

    One's own questions are two lines: ``path: my.jsonl`` and ``grader: math``.
    """

    name: str | None = None
    """A known task; null where ``path`` holds questions of one's own."""
    path: str | None = None
    """JSONL or parquet, or a folder of such files: one's own questions, or with ``name`` a local copy of that set, with
    the columns it has on the hub (CSV too)."""
    grader: str | None = None
    """How responses are graded; null takes the task's own, or the strictest grader that suits all of one's answers."""
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    instruction: ModeText = ModeText()
    """What every question ends with, by mode."""
    num_questions: PositiveInt | None = None
    """The first questions that are asked; null takes the whole examination's number."""
    samples: PositiveInt | None = None
    """Responses to each question; null takes the whole examination's number."""
    pass_at: Annotated[tuple[PositiveInt, ...], Distinct] = ()
    """Each k for which pass@k is estimated; empty means k = the number of samples."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1), Distinct] | None = None
    """The modes in which it is asked; null takes the whole examination's."""
    label: str | None = None
    """What results call it; null takes the name, or the file's. Two examinations on one task need two labels."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.name is None and self.path is None:
            raise ValueError("a task needs a name or a path")
        return self


def _kind_of_task(value: object) -> str:
    return "name" if isinstance(value, str) else "TaskSettings"


AnyTask = Annotated[
    Annotated[str, Tag("name")] | Annotated[TaskSettings, Tag("TaskSettings")], Discriminator(_kind_of_task)
]


class EvaluationSettings(Settings):
    """How every checkpoint is examined. The sampling is the report's, mode by mode (section 4.6).

    The report allows 32,768 tokens a response; the base models' positions end at 32,768, prompt included.
    """

    tasks: tuple[AnyTask, ...] | None = None
    """Names of tasks, or tasks with settings of their own. ``prompts`` is the held-out part of one's own prompts that
    have an answer, ``mode_switching`` whether the mode follows flags through a conversation. Null examines on the
    prompts' own kind: the embedded task, one's own answered prompts, or gsm8k where there are none."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1), Distinct] = ("think", "no_think")
    num_questions: PositiveInt | None = None
    """The first questions of a task; null takes all."""
    samples: PositiveInt | None = None
    """Responses to each question; null takes the task's own number (64 for AIME, as in the report, else 1)."""
    references: bool = True
    """Examine the teacher and the start too; without them there is no gap to close."""
    pass_at: PassAtSettings | None = None
    curve: CurveSettings | None = None
    """Null examines the checkpoints at the stages' ends only."""
    budgets: Annotated[tuple[PositiveInt, ...], Distinct] = ()
    """Thinking budgets, in response tokens, at which every checkpoint is examined besides."""
    sampling: ModeSampling = ModeSampling(
        think=SamplingSettings(max_new_tokens=30720, temperature=0.6, top_p=0.95, top_k=20),
        no_think=SamplingSettings(max_new_tokens=30720, temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
    )
