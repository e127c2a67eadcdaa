"""Settings of the stages: what is sampled, how it is judged and felt, and how the student steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.settings import LARGEST, Count, PositiveFloat, PositiveInt, Settings, Share
from distill.types import COLDEST, Mode, Sampling

Temperature = Annotated[float, Field(ge=COLDEST)]


class SamplingSettings(Settings):
    """How a model's responses are drawn in one mode."""

    max_new_tokens: PositiveInt = 4096
    """Longest response, in tokens; a response that reaches it is truncated."""
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Count = 0
    """Keep the k most probable tokens; 0 keeps all."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token the response already holds."""
    thinking_budget: PositiveInt | None = None
    """Response tokens after which an open thinking block is closed by the early-stop string; null never forces."""

    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump())


class ModeSampling(Settings):
    """Sampling for each mode."""

    think: SamplingSettings = SamplingSettings()
    no_think: SamplingSettings = SamplingSettings()

    def of(self, mode: Mode) -> Sampling:
        return (self.think if mode == "think" else self.no_think).sampling()


class Optimiser(Settings):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero along a cosine at the last step."""
    warmup_steps: Count = 10
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    max_grad_norm: PositiveFloat = 1.0


class Mixture(Settings):
    """Which modes a stage works in, and how a mode is asked for."""

    think_share: Share = 0.5
    """Share of prompts in thinking mode, among those that leave the choice to the stage."""
    soft_switch_share: Share = 0.1
    """Share of prompts whose mode is asked for by a flag in the last user message (/think, /no_think)."""


class FilterSettings(Settings):
    """Which of the teacher's responses are not trained on. A prompt with several samples keeps those that are left."""

    truncated: bool = True
    """Leave out responses that reached the token limit."""
    unclosed: bool = False
    """Leave out responses whose thinking is not closed: they end without an answer."""
    max_repetition: Share | None = None
    """Leave out responses of which a larger share of 4-grams repeats earlier ones; null leaves out none. What a
    teacher's responses have is in ``distill responses stats``."""
    wrong: bool = False
    """Leave out responses that do not give their prompt's answer, among prompts that have one."""


class OffPolicyStage(Settings):
    """Cross-entropy on the teacher's responses in both modes (Qwen3 report, section 4.5, first stage)."""

    kind: Literal["off_policy"] = "off_policy"
    num_prompts: PositiveInt = 20000
    """Questions the teacher answers; a question is asked in one mode."""
    samples_per_prompt: PositiveInt = 1
    epochs: PositiveInt = 2
    batch_size: PositiveInt = 64
    """Responses in an optimiser step."""
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling(
        think=SamplingSettings(max_new_tokens=16384, temperature=0.6, top_p=0.95, top_k=20),
        no_think=SamplingSettings(max_new_tokens=4096, temperature=0.7, top_p=0.8, top_k=20),
    )
    filters: FilterSettings = FilterSettings()
    optimiser: Optimiser = Optimiser(learning_rate=1e-5, schedule="cosine")


class DivergenceSettings(Settings):
    """What on-policy distillation minimises at every response token."""

    kind: Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"] = "reverse_kl"
    beta: Annotated[float, Field(ge=1e-6, lt=1.0)] = 0.5
    """Mixture weight of the Jensen-Shannon and the skewed divergences. What a smaller one adds, float32 rounds off."""
    temperature: Temperature = 1.0
    estimator: Literal["k1", "k3"] = "k1"
    """How the reverse KL is estimated where the teacher's signal is the sampled token: as log p - log q, or as
    q/p - 1 - log q/p, which is never negative. The gradient is the same."""
    merge_stop_ids: bool = True
    """Treat the family's stop tokens as one action; apart, a base student and its teacher disagree on which one ends
    a response and its length explodes."""


class OnPolicyStage(Settings):
    """The student speaks, the teacher judges every token (Qwen3 report, section 4.5, second stage)."""

    kind: Literal["on_policy"] = "on_policy"
    steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 64
    samples_per_prompt: PositiveInt = 4
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling()
    divergence: DivergenceSettings = DivergenceSettings()
    optimiser: Optimiser = Optimiser(learning_rate=2e-6)


class PolicyGradientSettings(Settings):
    """How a verifier's verdicts move the student: GRPO's advantages (arXiv 2402.03300) with DAPO's corrections."""

    grader: str | None = None
    """Who decides whether a response is right: number, words, math, choice, exact, embedded. Null chooses by the
    prompts: the strictest grader that all their answers suit."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: PositiveFloat = 0.28
    """How far a token's probability may move, down and up, within one sampled batch before it stops teaching."""
    updates_per_step: PositiveInt = 1
    """Optimiser steps on each sampled batch, each on its share of the groups. Clipping means something from 2 on."""
    overlong_share: Share = 0.2
    """The last share of the token limit, in which the reward falls evenly by up to 1 (DAPO); 0 punishes nothing."""
    dr_grpo: bool = False
    """Dr. GRPO (arXiv 2503.20783): advantages keep the scale of the reward, and a token counts one over the token limit
    of all responses instead of one over the tokens that there are."""
    importance_cap: Annotated[float, Field(ge=1.0)] = 2.0
    """A token weighs p(trainer) / p(sampler), at most this much: 1 where the two agree."""


class GrpoStage(Settings):
    """The student speaks, a verifier judges the response: the reinforcement-learning baseline."""

    kind: Literal["grpo"] = "grpo"
    steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 64
    samples_per_prompt: Annotated[int, Field(ge=2, le=LARGEST)] = 8
    """Size of a group: the responses to one prompt, which are compared with each other."""
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling()
    policy_gradient: PolicyGradientSettings = PolicyGradientSettings()
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the reverse KL to the student as the stage found it; 0 keeps no copy of that one."""
    optimiser: Optimiser = Optimiser(learning_rate=1e-6)


class OpdRewardStage(Settings):
    """On-policy distillation and reinforcement learning in one loss: the teacher judges every token, a verifier the
    response."""

    kind: Literal["opd_reward"] = "opd_reward"
    steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 64
    samples_per_prompt: Annotated[int, Field(ge=2, le=LARGEST)] = 8
    mixture: Mixture = Mixture()
    sampling: ModeSampling = ModeSampling()
    divergence: DivergenceSettings = DivergenceSettings()
    divergence_coefficient: PositiveFloat = 1.0
    policy_gradient: PolicyGradientSettings = PolicyGradientSettings()
    reward_coefficient: PositiveFloat = 1.0
    optimiser: Optimiser = Optimiser(learning_rate=2e-6)


StageSettings = Annotated[OffPolicyStage | OnPolicyStage | GrpoStage | OpdRewardStage, Field(discriminator="kind")]


def parts_of(stage: StageSettings) -> tuple[str, int]:
    """The setting that says among how many processes a step of the stage can be shared at most, and its value."""
    if isinstance(stage, OffPolicyStage):
        return "batch_size", stage.batch_size
    return "prompts_per_step", stage.prompts_per_step
