"""One configuration for the command line, Python, recipes and scheduled jobs.

``RunConfig`` is frozen and strict: an unknown key is an error that names its nearest neighbour. The text under a field
is its documentation. Defaults are the settings that the literature supports at real sizes; the recipes change what
their scale needs. The dump of a run (``config.yaml``) is itself a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill.errors import UserError
from distill.evaluation_config import EvaluationSettings, StopSettings
from distill.model_config import SamplerSettings, StudentSettings, TeacherSettings
from distill.prompt_config import EmbeddedPrompts, PromptSettings
from distill.settings import Count, PositiveInt, Settings
from distill.stage_config import (
    ModeSampling,
    OffPolicyStage,
    OnPolicyStage,
    OpdRewardStage,
    SamplingSettings,
    StageSettings,
    parts_of,
)
from distill.types import MODES, Mode
from distill.vllm.limits import check_drawable

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What may be a file's name everywhere."""

_NUM_STOP_TOKENS = 2
"""On which a model of the family may end; the student always asks about them."""


FALLING_GUARDS = ("entropy", "kl")
"""Guards of what is worse the lower it is."""


class GuardLimits(Settings):
    """Where a guard warns, and where it stops a run that it has warned of."""

    warn: float
    stop: float


class GuardSettings(Settings):
    """When a training that goes wrong is stopped. Null switches a guard off. All but ``kl`` compare the last steps
    with the stage's own, by mode."""

    window: PositiveInt = 5
    """Steps over which a metric is averaged before it is judged."""
    length: GuardLimits | None = GuardLimits(warn=2.0, stop=4.0)
    """Mean response length over that of the stage's first steps."""
    repetition: GuardLimits | None = GuardLimits(warn=0.2, stop=0.4)
    """Share of 4-grams that a response had said before, above its lowest."""
    truncation: GuardLimits | None = GuardLimits(warn=0.2, stop=0.5)
    """Share of responses that reached the token limit, above its lowest."""
    closure: GuardLimits | None = GuardLimits(warn=0.2, stop=0.5)
    """Share of responses with closed thinking, below its highest."""
    entropy: GuardLimits | None = GuardLimits(warn=0.02, stop=0.005)
    """The student's entropy over that of the stage's first steps."""
    kl: GuardLimits | None = GuardLimits(warn=1e-4, stop=1e-5)
    """Reverse KL to the teacher, nats a token. Rounding to 16 bits alone makes 5e-6 of a model to itself."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        """A stop takes a warning before it: one on the warning's other side would be passed without a word."""
        for name, limits in self:
            if not isinstance(limits, GuardLimits):
                continue
            falls = name in FALLING_GUARDS
            if limits.stop > limits.warn if falls else limits.stop < limits.warn:
                raise ValueError(
                    f"{name} warns at {limits.warn:g} and stops at {limits.stop:g}, and what it watches is worse the "
                    f"{'lower' if falls else 'higher'} it is: nothing stops before it has warned; set {name}.warn to "
                    f"{limits.stop:g} or a {'higher' if falls else 'lower'} number"
                )
        return self

    def limits(self, guard: str) -> GuardLimits | None:
        found = dict(self)[guard]
        assert found is None or isinstance(found, GuardLimits)
        return found


class PreflightSettings(Settings):
    """What is checked before the first gradient; the manifest holds what each check found."""

    skip: tuple[str, ...] = ()
    """Checks that are not made, by their names (--skip-preflight)."""
    same_weights: bool = False
    """Let a model be distilled into itself: its teacher may hold the student's own weights."""


class RunConfig(Settings):
    """Everything a run depends on besides the code and the data."""

    name: Annotated[str, Field(pattern=rf"^{_NAME}$")] | None = None
    """Also the run directory's name where ``--out`` is not given; null becomes TEACHER-to-STUDENT."""
    seed: Count = 0
    teacher: TeacherSettings = TeacherSettings()
    specialists: dict[str, TeacherSettings] = Field(default={})
    """Teachers for the prompts of one domain (a prompt's ``domain``); ``teacher`` teaches all others. The
    student is the same."""
    student: StudentSettings = StudentSettings()
    prompts: PromptSettings = EmbeddedPrompts()
    first_prompt: Count = 0
    """Position among the prompts at which the first stage begins: where the run stopped that trained this student."""
    stages: dict[str, StageSettings] = Field(default={"off_policy": OffPolicyStage(), "on_policy": OnPolicyStage()})
    """The stages by name, in the order in which they run; each one starts from the student the last one left."""
    stop: dict[str, StopSettings] = Field(default={})
    """Stages, by name, that may end early; looked at where ``evaluation.curve`` examines."""
    evaluation: EvaluationSettings = EvaluationSettings()
    guards: GuardSettings = GuardSettings()
    preflight: PreflightSettings = PreflightSettings()
    max_prompt_tokens: PositiveInt = 2048
    """A longer prompt is refused, with the line it came from."""
    sampler: SamplerSettings = SamplerSettings()
    sampler_batch: PositiveInt = 256
    """Most responses that are decoded together."""
    sampler_tokens: PositiveInt = 131072
    """Most tokens in the sampler's cache, each response counted at its limit; where responses may get long, fewer are
    decoded together."""
    checkpoint_every: PositiveInt = 25
    """Optimiser steps between two checkpoints."""
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = None
    """Where the metrics of every step and the scores are shown besides the run directory; the library of this name has
    to be installed. Null shows them nowhere else."""
    store: str | None = None
    """Folder of the teacher-response store; null takes DISTILL_STORE or a folder under the user's cache."""

    @property
    def longest_response(self) -> int:
        """Most tokens that any part of the run lets a model say."""
        blocks = [self.evaluation.sampling, *(stage.sampling for stage in self.stages.values())]
        return max(sampling.max_new_tokens for block in blocks for sampling in (block.think, block.no_think))

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Those in which the stages ask prompts that leave the choice to them."""
        shares = [stage.mixture.think_share for stage in self.stages.values()]
        asked = {"think": any(share > 0 for share in shares), "no_think": any(share < 1 for share in shares)}
        return tuple(mode for mode in MODES if asked[mode])

    @property
    def student_says_one_more(self) -> bool:
        """Whether the student may be asked for a token behind its longest response: vLLM tells the log-probabilities of
        forced tokens with one after them alone."""
        spoken = [stage.sampling for stage in self.stages.values() if not isinstance(stage, OffPolicyStage)]
        return self.sampler.backend == "vllm" and self._may_end_forced(spoken)

    def teacher_says_one_more(self, teacher: TeacherSettings) -> bool:
        """The same of this teacher of the run, which is asked so for the log-probabilities of what it judges, too."""
        stages = self.stages.values()
        spoken = [stage.sampling for stage in stages if isinstance(stage, OffPolicyStage)]
        judged = [stage.sampling for stage in stages if isinstance(stage, OnPolicyStage) and teacher.signal != "hidden"]
        is_judged = any(self._is_longest(sampling) for block in judged for sampling in (block.think, block.no_think))
        return teacher.backend == "vllm" and (self._may_end_forced(spoken) or is_judged)

    def _may_end_forced(self, blocks: Sequence[ModeSampling]) -> bool:
        samplings = [sampling for block in blocks for sampling in (block.think, block.no_think)]
        return any(one.thinking_budget is not None and self._is_longest(one) for one in samplings)

    def _is_longest(self, sampling: SamplingSettings) -> bool:
        return sampling.max_new_tokens == self.longest_response

    @property
    def most_processes(self) -> int:
        """Processes that every stage's steps can be shared among."""
        return min(parts_of(stage)[1] for stage in self.stages.values())

    def check_teachers(self) -> None:
        """Raises UserError where a run would pass over something that is set of a teacher."""
        self.teacher.check_read("teacher")
        for domain, settings in self.specialists.items():
            settings.check_read(f"specialists.{domain}")

    def check_processes(self, num: int) -> None:
        """Raises UserError where a run of ``num`` processes cannot be sampled, or not be shared among them."""
        self.sampler.check_processes(num)
        for name, stage in self.stages.items():
            setting, parts = parts_of(stage)
            if parts < num:
                raise UserError(
                    f"stages.{name}.{setting} is {parts}, and a step of it cannot be shared among {num} processes; "
                    f"raise it to {num} or more, or start at most {self.most_processes} "
                    f"process{'es' if self.most_processes > 1 else ''}"
                )

    @model_validator(mode="after")
    def _check_signal(self) -> Self:
        """What a signal cannot give is refused before anything is spent."""
        signal = self.teacher.signal
        for name, stage in self.stages.items():
            if isinstance(stage, OpdRewardStage) and signal != "hidden":
                raise ValueError(f"stages.{name} (opd_reward) needs teacher.signal=hidden, and it is {signal}")
            if not isinstance(stage, OnPolicyStage):
                continue
            if signal == "chosen" and self.teacher.top_k < _NUM_STOP_TOKENS:
                raise ValueError(
                    f"teacher.top_k is {self.teacher.top_k}, and teacher.signal=chosen always asks about the "
                    f"{_NUM_STOP_TOKENS} stop tokens; set it to {_NUM_STOP_TOKENS} or more, or teacher.signal to hidden"
                )
            where, divergence = f"stages.{name}.divergence", stage.divergence
            if signal != "hidden" and divergence.temperature != 1:
                raise ValueError(
                    f"{where}.temperature is {divergence.temperature}, and teacher.signal={signal} holds probabilities "
                    f"at temperature 1; set it to 1, or teacher.signal to hidden"
                )
            if signal != "sampled" and divergence.estimator != "k1":
                raise ValueError(
                    f"{where}.estimator is for teacher.signal=sampled; with {signal} nothing is estimated: leave it out"
                )
            if signal == "sampled":
                _check_sampled(where, name, stage)
        return self

    @model_validator(mode="after")
    def _check_staleness(self) -> Self:
        if self.sampler.staleness == 0:
            return self
        if self.sampler.backend != "vllm":
            raise ValueError(
                f"sampler.staleness is 1, and sampler.backend={self.sampler.backend} samples with the very weights "
                f"that are trained; set sampler.backend to vllm, whose server has its own, or sampler.staleness to 0"
            )
        if self.sampler.place != "server":
            raise ValueError(
                "sampler.staleness=1 samples the next batch while this one is trained on, and sampler.place=in_process "
                "has one process for both; set sampler.place to server, or sampler.staleness to 0"
            )
        if self.sampler.sleep:
            raise ValueError(
                "sampler.sleep gives the server's memory away while the student trains, and sampler.staleness=1 has it "
                "speak at that time; set one of them to its default"
            )
        for name, stage in self.stages.items():
            if isinstance(stage, OnPolicyStage) and self.teacher.signal == "sampled":
                raise ValueError(
                    f"sampler.staleness is 1, and teacher.signal=sampled in stages.{name} takes tokens that were drawn "
                    f"from the weights that are trained; set teacher.signal to hidden, or sampler.staleness to 0"
                )
        return self

    @model_validator(mode="after")
    def _check_drawn(self) -> Self:
        """What vLLM cannot draw, for whoever speaks through it."""
        student = ["sampler.backend to transformers"] if self.sampler.backend == "vllm" else []
        default = ["teacher.backend to local"] if self.teacher.backend == "vllm" else []
        others = [name for name, settings in self.specialists.items() if settings.backend == "vllm"]
        teachers = [*default, *(f"specialists.{name}.backend to local" for name in others)]
        for name, stage in self.stages.items():
            speakers = teachers if isinstance(stage, OffPolicyStage) else student
            _check_block(f"stages.{name}.sampling", stage.sampling, speakers)
        examined = [*student, *(default if self.evaluation.references else [])]
        where, block = "evaluation.sampling", self.evaluation.sampling
        _check_block(where, block, examined)
        for budget in self.evaluation.budgets[:1]:
            cut = block.think.model_copy(update={"thinking_budget": budget})
            _check_block(f"{where}, with evaluation.budgets", ModeSampling(think=cut), examined)
        return self

    @model_validator(mode="after")
    def _check_specialists(self) -> Self:
        for domain, settings in self.specialists.items():
            if "model" not in settings.model_fields_set:
                raise ValueError(f"specialists.{domain} names no model; set specialists.{domain}.model")
            if (settings.signal, settings.top_k) != (self.teacher.signal, self.teacher.top_k):
                raise ValueError(
                    f"specialists.{domain} has signal {settings.signal} and top_k {settings.top_k}, and teacher has "
                    f"{self.teacher.signal} and {self.teacher.top_k}; one loss feels them all: set them to the same"
                )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if not self.stages:
            raise ValueError("stages is empty; name at least one stage, for example off_policy")
        for name in self.stages:
            if not re.fullmatch(_NAME, name) or len(name) > 64:
                raise ValueError(
                    f"a stage's name is letters, digits, '.', '_' and '-', at most 64, and not {name[:80]!r}"
                )
        reserved = {"teacher", "start"} & set(self.stages)
        if reserved:
            raise ValueError(f"a stage may not be called {sorted(reserved)[0]!r}: reports use that name")
        unknown = sorted(set(self.stop) - set(self.stages))
        if unknown:
            raise ValueError(f"stop names the stage {unknown[0]!r}; the stages are {', '.join(self.stages)}")
        if self.stop and self.evaluation.curve is None:
            raise ValueError("stop needs evaluation.curve: only an examination can find a score reached")
        return self


def _check_block(where: str, block: ModeSampling, backends: Sequence[str]) -> None:
    """Raises UserError where vLLM cannot draw so; ``backends`` are the settings that would have others draw."""
    for mode in MODES if backends else ():
        check_drawable(block.of(mode), where=f"{where} in {mode} mode", instead=f"set {' and '.join(backends)}")


def _check_sampled(where: str, name: str, stage: OnPolicyStage) -> None:
    """The sampled token stands for the distribution it was drawn from: the student's own, stop tokens apart."""
    if stage.divergence.kind != "reverse_kl":
        raise ValueError(
            f"{where}.kind is {stage.divergence.kind}, and teacher.signal=sampled estimates the reverse_kl alone; set "
            f"it to reverse_kl, or teacher.signal to hidden"
        )
    if stage.divergence.merge_stop_ids:
        raise ValueError(
            f"{where}.merge_stop_ids is true, and teacher.signal=sampled does not tell the probability of the other "
            f"stop token; set it to false where the student has learnt to end as its teacher does, or teacher.signal "
            f"to hidden"
        )
    for mode, sampling in (("think", stage.sampling.think), ("no_think", stage.sampling.no_think)):
        if (sampling.temperature, sampling.top_p, sampling.top_k, sampling.presence_penalty) != (1, 1, 0, 0):
            raise ValueError(
                f"stages.{name}.sampling.{mode} changes the student's distribution, and teacher.signal=sampled takes "
                f"tokens that were drawn from it as it is; set temperature and top_p to 1, top_k and presence_penalty "
                f"to 0, or teacher.signal to hidden"
            )
