"""Everyone a stage can call on, and what the loop needs to know of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

from distill import interrupt
from distill.chat import switch_in
from distill.encode import Encoder
from distill.family import Shape
from distill.prompts import PromptSource
from distill.sampler import StudentSampler
from distill.seeding import derive, uniform
from distill.spans import Span
from distill.stage_config import GrpoStage, Mixture, OffPolicyStage, OnPolicyStage, OpdRewardStage, StageSettings
from distill.types import Example, Mode, Prompt, Request, Rollout, Switch
from pipelines.faculty import Faculty, TeacherPart
from pipelines.meter import Meter, MeteredSampler
from students.loss import Felt, Rows
from students.ranks import ALONE, Ranks
from students.student import Student
from teachers.store import ResponseStore

StudentSpeaks = OnPolicyStage | GrpoStage | OpdRewardStage
"""Settings of the stages in which the student speaks."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Everyone a stage can call on."""

    encoder: Encoder
    teachers: Faculty
    student: Student
    student_sampler: StudentSampler
    student_shape: Shape
    start_of: Callable[[str], PreTrainedModel]
    """A copy of the student as it was when the stage of this name began."""
    prompts: PromptSource
    store: ResponseStore
    meter: Meter
    seed: int
    run_id: str
    ranks: Ranks = ALONE


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric that is the mean of ``num`` values; none of them where it has no value."""

    total: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        return cls(sum(values), len(values))


@dataclass(frozen=True, slots=True)
class Judged:
    """What the judge made of a step's responses.

    ``updates`` are the examples of each optimiser step, as many in every step of a stage; one without examples teaches
    nothing and is left out. ``num_dealt`` is how many groups were dealt to them in turn, from the first update on: the
    next process's groups come behind these. ``facts`` are metrics of the judging; the processes' counts are added.
    ``read`` is when the student read the responses for its step meanwhile, where it did.
    """

    updates: list[list[Example]]
    facts: dict[str, float | Mean] = field(default_factory=dict)
    read: Span | None = None
    num_dealt: int = 0


class Stage(Protocol):
    """What the loop needs to know of a method."""

    name: str
    teacher_part: TeacherPart
    first_prompt: int
    """The position of its first prompt in the prompt source."""

    @property
    def num_prompts(self) -> int:
        """Positions of the prompt source that the stage uses; the next stage begins behind them."""
        ...

    @property
    def num_steps(self) -> int:
        """Sampled batches; known after ``prepare``."""
        ...

    def prepare(self) -> None:
        """Make what must exist before the first step. Interrupted, it goes on where it was."""
        ...

    def spoken(self) -> Sequence[Rollout]:
        """Responses of the teacher that the stage learns from; known after ``prepare``."""
        ...

    def sample(self, step: int) -> list[Rollout]:
        """This process's share of a step's responses; all shares together are a function of the seed, the step and the
        student's weights only."""
        ...

    def signal(self, rollouts: Sequence[Rollout]) -> Judged:
        """What the judge says of them."""
        ...

    def loss(self, rows: Rows) -> Felt:
        """The sum of the weighted per-token losses, and per-token metrics."""
        ...

    def manifest(self) -> dict[str, Any]:
        """What the run's manifest keeps of this stage."""
        ...


def student_responses(
    crew: Crew,
    stage: str,
    settings: StudentSpeaks,
    *,
    first: int,
    heard: bool,
) -> list[Rollout]:
    """What the student says to one step's prompts, one mode a prompt; of several processes, this one's share.

    ``first`` is the position of the step's first prompt. ``heard`` has the teachers judge each response from when it
    ends; those of a step that breaks off they forget.
    """
    prompts = crew.prompts.batch(first, settings.prompts_per_step)
    requests = student_requests(prompts, settings, crew.encoder, seed=crew.seed, stage=stage, first=first)
    sampler = MeteredSampler(crew.student_sampler, crew.meter, crew.student_shape, "student_sample", stage)
    own = crew.ranks.share(requests, block=settings.samples_per_prompt)
    if not heard:
        return sampler.generate(own)
    try:
        # A judgement that went wrong is not kept until the next response ends, which may take long.
        with interrupt.watching(crew.teachers.check):
            rollouts = sampler.generate(own, crew.teachers.hear)
        crew.teachers.heard_all()
    except BaseException:
        crew.teachers.break_off()
        raise
    return rollouts


def teacher_requests(
    prompts: Sequence[Prompt], settings: OffPolicyStage, encoder: Encoder, *, seed: int, stage: str, first: int
) -> list[Request]:
    """What the teacher is asked with ``prompts``, which stand at position ``first`` and behind it."""
    return [
        # The response store is shared between runs, so a response's seed depends on its question, not on the run.
        encoder.request(
            prompt,
            mode=mode,
            switch=switch,
            sampling=settings.sampling.of(mode),
            seed=derive(0, prompt.id, mode, sample),
        )
        for prompt, mode, switch in with_modes(prompts, settings.mixture, seed, stage, first)
        for sample in range(settings.samples_per_prompt)
    ]


def student_requests(
    prompts: Sequence[Prompt], settings: StudentSpeaks, encoder: Encoder, *, seed: int, stage: str, first: int
) -> list[Request]:
    """What the student is asked with ``prompts``, which stand at position ``first`` and behind it."""
    return [
        encoder.request(
            prompt,
            mode=mode,
            switch=switch,
            sampling=settings.sampling.of(mode),
            seed=derive(seed, stage, first + place, sample),
        )
        for place, (prompt, mode, switch) in enumerate(with_modes(prompts, settings.mixture, seed, stage, first))
        for sample in range(settings.samples_per_prompt)
    ]


def positions_of(settings: StageSettings, prompts: PromptSource) -> int:
    """Positions of the prompt source that a stage uses; the next stage begins behind them."""
    if isinstance(settings, OffPolicyStage):
        # A question asked again would get its stored response again, or be asked in both modes.
        return min(settings.num_prompts, prompts.num_train or settings.num_prompts)
    return settings.steps * settings.prompts_per_step


def with_modes(
    prompts: Sequence[Prompt], mixture: Mixture, seed: int, stage: str, first: int
) -> list[tuple[Prompt, Mode, Switch]]:
    """Each prompt with the mode it is asked in and how it is asked.

    A prompt's own mode, or the flag in its messages, is kept. For the others the modes are spread evenly, so that every
    batch has the configured share and not only the average one.
    """
    chosen: list[tuple[Prompt, Mode, Switch]] = []
    for place, prompt in enumerate(prompts):
        position = first + place
        share = mixture.think_share
        thinks = int((position + 1) * share + 1e-9) > int(position * share + 1e-9)
        flagged = switch_in(prompt.messages)
        mode: Mode = prompt.mode or flagged or ("think" if thinks else "no_think")
        soft = flagged is not None or uniform(seed, stage, "switch", position) < mixture.soft_switch_share
        chosen.append((prompt, mode, "soft" if soft else "hard"))
    return chosen
