"""What a configuration makes everybody do: how many sequences, of what length, at which step of which stage.

Limits are in the configuration; how long responses are below them is not. A real model's lengths are taken as
exponential with a mean that is given, so that of a mean m cut at a limit l the mean is m (1 - exp(-l / m)), and the
longest of n is m (ln n + 0.577), at most l. The embedded task's lengths follow from its questions.
This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distill.config import RunConfig
from distill.costs import CostRole, sequence_flops
from distill.embedded.task import MAX_OPERATIONS, lengths_up_to
from distill.evaluation_config import TaskSettings
from distill.family import EMBEDDED_NAMES, Shape
from distill.prompt_config import EmbeddedPrompts
from distill.stage_config import GrpoStage, Mixture, ModeSampling, OffPolicyStage, OpdRewardStage, StageSettings
from distill.types import MODES, Mode
from eval.published import PUBLISHED

EULER = 0.5772
"""The longest of n exponential lengths is longer than their mean by about ln n plus this."""

QUESTIONS = {"gsm8k": 1319, "math500": 500, "aime24": 30, "aime25": 30, "gpqa_diamond": 198, "mmlu_redux": 5330}
"""Questions of the published tasks."""

UNKNOWN_QUESTIONS = 512
"""For a task of one's own, whose questions are not counted before it is opened; the embedded task asks as many."""

AFTER_BUDGET = 64
"""Tokens of the early-stop string and the answer behind thinking that was cut at its budget."""

SWITCHING_TURNS = 128 * 4
"""Responses of the task mode_switching."""

AROUND_QUESTION = 11
AROUND_THINKING = 7
LINE = 6
SHORT_LONGEST = 10
"""Tokens of the embedded family: of the template around a question, of the marks and the answer around thinking, of one
operation's line of it, of a response without thinking that was asked for by a flag."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt and of a response in each mode, on the mean; ``longest`` where they have an upper end."""

    prompt: float = 200.0
    think: float = 4000.0
    no_think: float = 700.0
    longest: int | None = None

    @classmethod
    def embedded(cls, max_operations: int = MAX_OPERATIONS) -> Lengths:
        """Those of chains of up to so many operations."""
        weights = lengths_up_to(max_operations)
        mean = sum(place * weight for place, weight in enumerate(weights, 1)) / sum(weights)
        return cls(
            prompt=2 * mean + 2 + AROUND_QUESTION,
            think=LINE * mean + AROUND_THINKING,
            no_think=2.6,  # the digit and the stop token; where a flag asks for the mode, an empty block before them
            longest=LINE * max_operations + AROUND_THINKING,
        )

    def of(self, mode: Mode, num: float, limit: int) -> Sequences:
        """``num`` sequences in ``mode`` whose responses may have ``limit`` tokens."""
        typical = self.think if mode == "think" else self.no_think
        if self.longest is None:
            return Sequences(num, self.prompt, -typical * math.expm1(-limit / typical), typical, limit)
        ceiling = self.longest if mode == "think" else SHORT_LONGEST
        return Sequences(num, self.prompt, min(typical, limit), typical, limit, min(ceiling, limit))


@dataclass(frozen=True, slots=True)
class Sequences:
    """``num`` sequences of one mode: mean tokens of the prompt, and of the response as it is and without its limit.

    ``ceiling`` is the longest response where lengths have an upper end.
    """

    num: float
    prompt: float
    response: float
    typical: float
    limit: int
    ceiling: int | None = None

    def longest_of(self, num: float) -> float:
        """Tokens of the longest of ``num`` responses."""
        if self.ceiling is not None:
            return self.ceiling
        return min(self.limit, max(self.response, self.typical * (math.log(max(num, 1.0)) + EULER)))

    @property
    def tokens(self) -> float:
        return self.num * (self.prompt + self.response)

    def forward_flops(self, shape: Shape) -> float:
        """Of one pass over all of them."""
        return self.num * sequence_flops(shape, self.prompt, self.response)


@dataclass(frozen=True, slots=True)
class Job:
    """What one role does in one stage, ``times`` over: ``sequences`` is one time's.

    ``decode`` writes the responses, ``score`` passes over whole sequences once, ``train`` forward and back.
    """

    stage: str
    role: CostRole
    kind: Literal["decode", "score", "train"]
    who: Literal["teacher", "student"]
    times: int
    sequences: tuple[Sequences, ...]
    judged: bool = False
    """Whether a teacher's distribution is part of the loss."""
    is_between: bool = False
    """Whether its times lie between the stage's steps: a learning curve's points."""

    def over(self, num: int) -> tuple[Sequences, ...]:
        """One of ``num`` equal shares of one time's sequences."""
        return tuple(replace(part, num=part.num / num) for part in self.sequences)

    @property
    def response_tokens(self) -> float:
        """Of one time."""
        return sum(part.num * part.response for part in self.sequences)

    @property
    def sequence_tokens(self) -> float:
        """Of one time, prompts included."""
        return sum(part.tokens for part in self.sequences)

    @property
    def tokens(self) -> float:
        """What the role's account would count in all."""
        return self.times * (self.response_tokens if self.kind == "decode" else self.sequence_tokens)

    def flops(self, shape: Shape, passes: int) -> float:
        """Of all times together; ``passes`` are forward-pass equivalents of a training step."""
        one = sum(part.forward_flops(shape) for part in self.sequences)
        return self.times * one * (passes if self.kind == "train" else 1)


@dataclass(frozen=True, slots=True)
class Workload:
    """All jobs of a run, in their order, and what was assumed about it."""

    jobs: tuple[Job, ...]
    lengths: Lengths
    notes: tuple[str, ...]
    is_assumed: bool = False
    """Whether the lengths are what is usual, of models whose own are not known."""

    def of(self, stage: str) -> tuple[Job, ...]:
        return tuple(job for job in self.jobs if job.stage == stage)


def workload(config: RunConfig, lengths: Lengths | None = None) -> Workload:
    """What ``config`` asks for; ``lengths`` None takes the usual ones."""
    notes, is_assumed = [], False
    if config.specialists:
        notes.append("specialists are left out: the plan is that of the teacher alone")
    if lengths is None:
        lengths = usual_lengths(config)
        is_assumed = lengths.longest is None
        if is_assumed:
            notes.append(
                f"responses are taken to have {lengths.think:,.0f} tokens on the mean when thinking and "
                f"{lengths.no_think:,.0f} when not, prompts {lengths.prompt:,.0f}; an assumption"
            )
    jobs: list[Job] = []
    examined = ["teacher", "start"] if config.evaluation.references else []
    for name, stage in config.stages.items():
        jobs += _stage_jobs(name, stage, lengths, config)
        examined.append(name)
    asked, more = _examination(config, lengths)
    notes += more
    for checkpoint in examined:
        who: Literal["teacher", "student"] = "teacher" if checkpoint == "teacher" else "student"
        jobs.append(Job(checkpoint, "evaluate", "decode", who, 1, tuple(asked)))
    return Workload(tuple(jobs), lengths, tuple(notes), is_assumed)


def usual_lengths(config: RunConfig) -> Lengths:
    """The embedded task's where that is the subject, else a real model's."""
    prompts = config.prompts
    return Lengths.embedded(prompts.max_operations) if isinstance(prompts, EmbeddedPrompts) else Lengths()


def _by_mode(mixture: Mixture, sampling: ModeSampling, lengths: Lengths, num: float) -> tuple[Sequences, ...]:
    """``num`` sequences in the mixture's modes."""
    share = {"think": mixture.think_share, "no_think": 1 - mixture.think_share}
    return tuple(lengths.of(mode, num * share[mode], sampling.of(mode).max_new_tokens) for mode in MODES if share[mode])


def _stage_jobs(name: str, stage: StageSettings, lengths: Lengths, config: RunConfig) -> list[Job]:
    if isinstance(stage, OffPolicyStage):
        num = stage.num_prompts * stage.samples_per_prompt
        spoken = _by_mode(stage.mixture, stage.sampling, lengths, num)
        steps = max(1, stage.epochs * num // stage.batch_size)
        learnt = _by_mode(stage.mixture, stage.sampling, lengths, stage.batch_size)
        return [
            Job(name, "teacher_generate", "decode", "teacher", 1, spoken),
            Job(name, "student_train", "train", "student", steps, learnt),
            *_curve(name, steps, lengths, config),
        ]
    said = _by_mode(stage.mixture, stage.sampling, lengths, stage.prompts_per_step * stage.samples_per_prompt)
    judged = not isinstance(stage, GrpoStage)
    jobs = [Job(name, "student_sample", "decode", "student", stage.steps, said)]
    if judged:
        jobs.append(Job(name, "teacher_score", "score", "teacher", stage.steps, said))
    if isinstance(stage, GrpoStage | OpdRewardStage):
        again = (stage.policy_gradient.updates_per_step > 1) + (
            isinstance(stage, GrpoStage) and stage.kl_coefficient > 0
        )
        if again:
            jobs.append(Job(name, "student_score", "score", "student", again * stage.steps, said))
    # Each of a step's updates is an optimiser step on its share of the responses.
    updates = stage.policy_gradient.updates_per_step if isinstance(stage, GrpoStage | OpdRewardStage) else 1
    train = Job(name, "student_train", "train", "student", updates * stage.steps, said, judged=judged)
    jobs.append(replace(train, sequences=train.over(updates)))
    return [*jobs, *_curve(name, stage.steps, lengths, config)]


def _curve(name: str, steps: int, lengths: Lengths, config: RunConfig) -> Iterator[Job]:
    curve = config.evaluation.curve
    if curve is None:
        return
    sampling = config.evaluation.sampling
    asked = _in_modes(sampling, curve.modes, curve.num_questions * curve.samples, lengths)
    points = 1 + steps // curve.every + (steps % curve.every > 0)
    yield Job(name, "evaluate", "decode", "student", points, tuple(asked), is_between=True)


def _examination(config: RunConfig, lengths: Lengths) -> tuple[list[Sequences], list[str]]:
    """What one checkpoint is asked, and what had to be assumed."""
    settings, asked, notes = config.evaluation, list[Sequences](), list[str]()
    for wanted in settings.tasks or (_own_task(config),):
        if wanted == "mode_switching":
            asked += _in_modes(settings.sampling, MODES, SWITCHING_TURNS / 2, lengths)
            continue
        task = wanted if isinstance(wanted, TaskSettings) else TaskSettings(name=wanted)
        limit = task.num_questions or settings.num_questions
        known = QUESTIONS.get(task.name or "")
        if known is None and limit is None and not (task.name or "").startswith("embedded"):
            label = task.label or task.name or task.path
            notes.append(f"the task {label} is taken to have {UNKNOWN_QUESTIONS} questions")
        published = PUBLISHED.get(task.name or "")
        num = min(limit or known or UNKNOWN_QUESTIONS, known or math.inf)
        num *= task.samples or settings.samples or (published.samples if published else 1)
        modes = task.modes or settings.modes
        asked += _in_modes(settings.sampling, modes, num, lengths)
        if "think" in modes:
            longest = settings.sampling.think.max_new_tokens
            asked += [lengths.of("think", num, min(budget + AFTER_BUDGET, longest)) for budget in settings.budgets]
    if (passing := settings.pass_at) is not None:
        asked += _in_modes(settings.sampling, passing.modes, passing.num_questions * passing.samples, lengths)
    return asked, notes


def _own_task(config: RunConfig) -> str:
    if config.prompts.kind == "embedded" or config.teacher.model in EMBEDDED_NAMES:
        return "embedded"
    return "prompts" if config.prompts.kind == "file" else "gsm8k"


def _in_modes(sampling: ModeSampling, modes: Sequence[Mode], num: float, lengths: Lengths) -> list[Sequences]:
    return [lengths.of(mode, num, sampling.of(mode).max_new_tokens) for mode in modes]
