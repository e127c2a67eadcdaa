"""Reinforcement learning from a verifier, alone (GRPO) and together with a teacher.

The stage shares its student, prompts, sampler, optimiser and journal with the distilling ones: what differs is who
judges. GRPO is arXiv 2402.03300 with DAPO's corrections (arXiv 2503.14476): the loss is a mean over tokens, the upper
clip is higher than the lower, groups without a difference are dropped and responses near the token limit lose reward.

A KL penalty to the start, and the teacher of ``opd_reward``, are the exact divergence over the vocabulary. The k3
estimator that other trainers differentiate has, in expectation, the gradient of the forward KL; and one projection of
the other model's head is cheap next to a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from distill.costs import rollout_flops
from distill.divergence import Divergence, linear_divergence
from distill.errors import UserError
from distill.policy_gradient import Clip, linear_policy_gradient
from distill.stage_config import DivergenceSettings, GrpoStage, OpdRewardStage
from distill.types import MODES, ActionLogprobs, Advantage, Example, HiddenStates, Rollout
from pipelines.crew import Crew, Judged, Mean, positions_of, student_responses
from pipelines.faculty import TeacherPart
from pipelines.rewards import group_advantages, overlong_penalty
from pipelines.verifier import Verifier
from students.batch import Advantages
from students.loss import Felt, Rows
from students.rescoring import rescore
from teachers.local import LocalTeacher

START_BATCH_TOKENS = 65536
"""Padded tokens in one forward pass of the student's earlier self."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A distribution that the student is drawn to while it is rewarded.

    ``judge`` gives its states and charges for them, ``head_VD`` the head that makes logits of somebody's states.
    """

    judge: Callable[[Sequence[Rollout]], Sequence[HiddenStates]]
    head_VD: Callable[[str], Tensor]
    divergence: DivergenceSettings
    coefficient: float
    metrics: Callable[[Divergence], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class _Group:
    """The responses to one prompt; ``advantages`` is None where they are worth the same."""

    rollouts: Sequence[Rollout]
    verdicts: Sequence[bool]
    penalties: Sequence[float]
    advantages: Sequence[float] | None


class Grpo:
    """The student's own responses, each moved by how much better it was than the others to the same prompt."""

    teacher_part: TeacherPart = None
    reward_coefficient = 1.0
    keeps_equal_groups = False
    """Whether a group without advantages has something else to teach."""

    def __init__(self, name: str, settings: GrpoStage | OpdRewardStage, crew: Crew, *, first_prompt: int) -> None:
        self.name, self.settings, self.crew, self.first_prompt = name, settings, crew, first_prompt
        self.anchor: Anchor | None = None
        if settings.policy_gradient.dr_grpo and crew.ranks.count > 1:
            raise UserError(
                f"stages.{name}.policy_gradient.dr_grpo divides by a constant of the whole step, which the run's "
                f"{crew.ranks.count} processes do not share; leave it out, or start one process"
            )
        self.verifier = Verifier.for_prompts(
            crew.prompts,
            crew.prompts.batch(first_prompt, self.num_prompts),
            crew.encoder,
            grader=settings.policy_gradient.grader,
            stage=name,
        )

    @property
    def num_prompts(self) -> int:
        return positions_of(self.settings, self.crew.prompts)

    @property
    def num_steps(self) -> int:
        return self.settings.steps

    def prepare(self) -> None:
        """Load the student as the stage found it, if it is to stay near that one."""
        assert isinstance(self.settings, GrpoStage)
        if self.settings.kl_coefficient > 0:
            start = LocalTeacher(
                self.crew.start_of(self.name), name=f"start of {self.name}", batch_tokens=START_BATCH_TOKENS
            )

            def judge(rollouts: Sequence[Rollout]) -> list[HiddenStates]:
                with self._rescoring(rollouts):
                    return start.score(rollouts)

            self.anchor = Anchor(
                judge,
                lambda name: start.head_VD,
                DivergenceSettings(),
                self.settings.kl_coefficient,
                metrics=lambda divergence: {"start_kl": divergence.reverse_kl},
            )

    def spoken(self) -> Sequence[Rollout]:
        return ()

    def sample(self, step: int) -> list[Rollout]:
        first = self.first_prompt + step * self.settings.prompts_per_step
        heard = self.teacher_part == "judges"
        return student_responses(self.crew, self.name, self.settings, first=first, heard=heard)

    def signal(self, rollouts: Sequence[Rollout]) -> Judged:
        with self.crew.meter.measure("verify", self.name) as cost:
            groups = self._groups(rollouts)
            cost.tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        kept = [group for group in groups if group.advantages is not None or self.keeps_equal_groups]
        spoken = [rollout for group in kept for rollout in group.rollouts]
        compared = zip(self._old(spoken), self._anchor_states(spoken), strict=True)
        updates: list[list[Example]] = [[] for _ in range(self.settings.policy_gradient.updates_per_step)]
        for number, group in enumerate(kept):
            advantages = group.advantages or [0.0] * len(group.rollouts)
            updates[number % len(updates)] += [
                Example(rollout, Advantage(value, *next(compared)))
                for rollout, value in zip(group.rollouts, advantages, strict=True)
            ]
        if self.settings.policy_gradient.dr_grpo:
            limit = sum(rollout.request.sampling.max_new_tokens for rollout in rollouts) / len(updates)
            updates = [_over_constant(update, limit) for update in updates]
        return Judged(updates, _facts(groups), num_dealt=len(kept))

    def _groups(self, rollouts: Sequence[Rollout]) -> list[_Group]:
        settings, size = self.settings.policy_gradient, self.settings.samples_per_prompt
        verdicts = self.verifier.verdicts(rollouts)
        penalties = [
            overlong_penalty(len(said.response_ids), said.request.sampling.max_new_tokens, settings.overlong_share)
            for said in rollouts
        ]
        groups = []
        for first in range(0, len(rollouts), size):
            group = slice(first, first + size)
            rewards = [right + penalty for right, penalty in zip(verdicts[group], penalties[group], strict=True)]
            advantages = group_advantages(rewards, divide=not settings.dr_grpo)
            groups.append(_Group(rollouts[group], verdicts[group], penalties[group], advantages))
        return groups

    def _old(self, rollouts: Sequence[Rollout]) -> Sequence[ActionLogprobs | None]:
        """What the policy says before the step; not needed where the only optimiser step begins at that policy."""
        if self.settings.policy_gradient.updates_per_step == 1:
            return [None] * len(rollouts)
        with self._rescoring(rollouts):
            return rescore(self.crew.student, rollouts)

    @contextmanager
    def _rescoring(self, rollouts: Sequence[Rollout]) -> Iterator[None]:
        """Charges a pass of the student, or of its earlier self, over what was said."""
        with self.crew.meter.measure("student_score", self.name) as cost:
            cost.tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
            cost.flops = rollout_flops(self.crew.student_shape, rollouts)
            yield

    def _anchor_states(self, rollouts: Sequence[Rollout]) -> Sequence[HiddenStates | None]:
        if self.anchor is None:
            return [None] * len(rollouts)
        return self.anchor.judge(rollouts)

    def loss(self, rows: Rows) -> Felt:
        batch, settings = rows.batch, self.settings.policy_gradient
        assert isinstance(batch.signal, Advantages)
        stop_ids = self.crew.encoder.stop_ids
        policy = linear_policy_gradient(
            rows.hidden_ND,
            rows.head_VD,
            batch.target_N,
            batch.signal.value_N,
            old=batch.signal.old,
            sampler_logprobs=batch.sampled_logprob_N,
            clip=Clip(settings.clip_low, settings.clip_high),
            importance_cap=settings.importance_cap,
            weights=batch.weight_N,
            merged_ids=(stop_ids,),
        )
        total = self.reward_coefficient * policy.total
        metrics = {
            "student_entropy": policy.entropy,
            "sampled_logprob": policy.token_logprob,
            "logprob_gap": (policy.token_logprob - batch.sampled_logprob_N).abs(),
            "importance": policy.importance,
            "ratio": policy.ratio,
            "clipped": policy.clipped,
        }
        if self.anchor is not None:
            assert batch.signal.anchor is not None
            chosen = self.anchor.divergence
            divergence = linear_divergence(
                rows.hidden_ND,
                rows.head_VD,
                batch.signal.anchor.states_Rd,
                self.anchor.head_VD(batch.signal.anchor.teacher),
                kind=chosen.kind,
                beta=chosen.beta,
                temperature=chosen.temperature,
                weights=batch.weight_N,
                merged_ids=(stop_ids,) if chosen.merge_stop_ids else None,
            )
            total = total + self.anchor.coefficient * divergence.total
            metrics |= self.anchor.metrics(divergence)
        return Felt(total, metrics)

    def manifest(self) -> dict[str, Any]:
        return {"grader": self.verifier.grader}


class OpdReward(Grpo):
    """On-policy distillation and the verifier's reward in one loss, a coefficient each."""

    teacher_part: TeacherPart = "judges"
    keeps_equal_groups = True

    def __init__(self, name: str, settings: OpdRewardStage, crew: Crew, *, first_prompt: int) -> None:
        super().__init__(name, settings, crew, first_prompt=first_prompt)
        self.reward_coefficient = settings.reward_coefficient
        self.anchor = Anchor(
            # The configuration allows this stage with teacher.signal=hidden alone.
            lambda rollouts: cast(list[HiddenStates], crew.teachers.judge(rollouts, crew.meter, name)),
            crew.teachers.head_VD,
            settings.divergence,
            settings.divergence_coefficient,
            metrics=lambda divergence: {
                "reverse_kl": divergence.reverse_kl,
                "forward_kl": divergence.forward_kl,
                "teacher_entropy": divergence.teacher_entropy,
            },
        )

    def prepare(self) -> None:
        """Nothing: what a step needs, it makes."""


def _over_constant(examples: list[Example], limit: float) -> list[Example]:
    """The examples with advantages that turn the student's mean over tokens into a sum over the constant ``limit``."""
    scale = sum(sum(example.rollout.loss_mask) for example in examples) / limit
    return [
        replace(example, signal=replace(example.signal, value=scale * example.signal.value))
        for example in examples
        if isinstance(example.signal, Advantage)
    ]


def _facts(groups: Sequence[_Group]) -> dict[str, float | Mean]:
    """What the verifier saw: shares of right responses by mode, punishment for length, groups without a difference."""
    facts: dict[str, float | Mean] = {"groups": len(groups), "groups.equal": sum(g.advantages is None for g in groups)}
    for prefix, modes in (("", MODES), *((f"{mode}.", (mode,)) for mode in MODES)):
        chosen = [group for group in groups if group.rollouts[0].mode in modes]
        for name, values in (
            ("reward", [float(right) for group in chosen for right in group.verdicts]),
            ("overlong", [penalty for group in chosen for penalty in group.penalties]),
        ):
            facts[prefix + name] = Mean.of(values)
    return facts
