"""The catalogue of methods. A stage answers three questions:

    stage        who speaks (sample)               who judges (signal)       how it is felt (loss)
    off_policy   the teacher, from its store       nobody                    cross-entropy on the response
    on_policy    the student                       the teacher, every token  divergence over the whole vocabulary

The loop that runs them never asks which one it runs. A new method is a class here and a line in ``STAGES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distill.chat import switch_in
from distill.config import Mixture, ModeSampling, OffPolicyStage, OnPolicyStage
from distill.costs import Cost, rollout_flops
from distill.divergence import linear_cross_entropy, linear_divergence
from distill.encode import Encoder
from distill.errors import UserError
from distill.family import Shape
from distill.progress import say
from distill.prompts import PromptSource
from distill.sampler import Sampler, TransformersSampler
from distill.seeding import derive, uniform
from distill.types import Example, HiddenStates, Mode, Prompt, Request, Rollout, Switch
from pipelines.meter import Meter, MeteredSampler
from students.student import Felt, Rows
from teachers.answers import Answers, answer
from teachers.store import ResponseStore, TeacherIdentity
from teachers.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Crew:
    """Everyone a stage can call on."""

    encoder: Encoder
    teacher: Teacher
    teacher_sampler: Sampler
    teacher_identity: TeacherIdentity
    teacher_shape: Shape
    student_sampler: TransformersSampler
    student_shape: Shape
    prompts: PromptSource
    store: ResponseStore
    meter: Meter
    seed: int
    run_id: str


class Stage(Protocol):
    """What the loop needs to know of a method."""

    name: str

    @property
    def num_prompts(self) -> int:
        """Positions of the prompt source that the stage uses; the next stage begins behind them."""
        ...

    @property
    def num_steps(self) -> int:
        """Optimiser steps; known after ``prepare``."""
        ...

    def prepare(self) -> None:
        """Make what must exist before the first step. Interrupted, it goes on where it was."""
        ...

    def sample(self, step: int) -> list[Rollout]:
        """The responses of a step: a function of the seed, the step and the student's weights only."""
        ...

    def signal(self, rollouts: Sequence[Rollout]) -> list[Example]:
        """What the judge says of them."""
        ...

    def loss(self, rows: Rows) -> Felt:
        """The sum of the weighted per-token losses, and per-token metrics."""
        ...

    def manifest(self) -> dict[str, Any]:
        """What the run's manifest keeps of this stage."""
        ...


class OffPolicy:
    """The teacher's responses in both modes, learnt by cross-entropy (Qwen3 report, section 4.5, first stage)."""

    def __init__(self, name: str, settings: OffPolicyStage, crew: Crew, *, first_prompt: int) -> None:
        self.name, self.settings, self.crew, self.first_prompt = name, settings, crew, first_prompt
        self._responses: list[Rollout] = []
        self._keys: list[str] = []
        self._num_truncated = 0

    @property
    def num_prompts(self) -> int:
        # A question asked again would get its stored response again, or be asked in both modes.
        return min(self.settings.num_prompts, self.crew.prompts.num_train or self.settings.num_prompts)

    @property
    def num_steps(self) -> int:
        return max(1, self.settings.epochs * len(self._responses) // self.settings.batch_size)

    def prepare(self) -> None:
        settings, crew = self.settings, self.crew
        if self.num_prompts < settings.num_prompts:
            wanted = f"fewer than num_prompts {settings.num_prompts}"
            say(f"{self.name}: all {self.num_prompts} prompts are asked once, {wanted}")
        prompts = crew.prompts.batch(self.first_prompt, self.num_prompts)
        requests = [
            # The response store is shared between runs, so a response's seed depends on its question, not on the run.
            crew.encoder.request(
                prompt,
                mode=mode,
                switch=switch,
                sampling=settings.sampling.of(mode),
                seed=derive(0, prompt.id, mode, sample),
            )
            for prompt, mode, switch in _with_modes(prompts, settings.mixture, crew.seed, self.name, self.first_prompt)
            for sample in range(settings.samples_per_prompt)
        ]
        sampler = MeteredSampler(crew.teacher_sampler, crew.meter, crew.teacher_shape, "teacher_generate", self.name)
        answers = answer(
            requests,
            crew.store,
            sampler,
            identity=crew.teacher_identity,
            run=crew.run_id,
            description=f"{self.name}: teacher responses",
        )
        self._charge(answers)
        self._keys = list(answers.keys)
        self._responses = [
            rollout for rollout in answers.rollouts if settings.keep_truncated or rollout.finish_reason == "stop"
        ]
        self._num_truncated = len(answers.rollouts) - len(self._responses)
        if not self._responses:
            raise UserError(
                f"all {len(answers.rollouts)} responses of the teacher reached the token limit; raise "
                f"stages.{self.name}.sampling.*.max_new_tokens"
            )

    def _charge(self, answers: Answers) -> None:
        """Charge what this run generated, now or before it was interrupted, and mark what it found."""
        entry = self.crew.meter.account.entries.setdefault("teacher_generate", {}).setdefault(self.name, Cost())
        paid = [rollout for rollout, reused in zip(answers.rollouts, answers.reused, strict=True) if not reused]
        entry.tokens = answers.generated_tokens
        entry.flops = rollout_flops(self.crew.teacher_shape, paid)
        entry.reused_tokens = answers.reused_tokens

    def sample(self, step: int) -> list[Rollout]:
        size, num = self.settings.batch_size, len(self._responses)
        return [self._at(position, num) for position in range(step * size, (step + 1) * size)]

    def _at(self, position: int, num: int) -> Rollout:
        """Entry ``position`` of an endless sequence of shuffled epochs."""
        epoch, place = divmod(position, num)
        order = np.random.default_rng(derive(self.crew.seed, self.name, "epoch", epoch)).permutation(num)
        return self._responses[int(order[place])]

    def signal(self, rollouts: Sequence[Rollout]) -> list[Example]:
        return [Example(rollout) for rollout in rollouts]

    def loss(self, rows: Rows) -> Felt:
        batch = rows.batch
        felt = linear_cross_entropy(rows.hidden_ND, rows.head_VD, batch.target_N, weights=batch.weight_N)
        return Felt(felt.total, {"sampled_logprob": -felt.values, "student_entropy": felt.entropy})

    def manifest(self) -> dict[str, Any]:
        return {"responses": self._keys, "num_truncated": self._num_truncated}


class OnPolicy:
    """The student's own responses, aligned with the teacher's whole distribution at every token (second stage)."""

    def __init__(self, name: str, settings: OnPolicyStage, crew: Crew, *, first_prompt: int) -> None:
        self.name, self.settings, self.crew, self.first_prompt = name, settings, crew, first_prompt

    @property
    def num_prompts(self) -> int:
        return self.settings.steps * self.settings.prompts_per_step

    @property
    def num_steps(self) -> int:
        return self.settings.steps

    def prepare(self) -> None:
        """Nothing: what a step needs, it makes."""

    def sample(self, step: int) -> list[Rollout]:
        settings, crew = self.settings, self.crew
        first = self.first_prompt + step * settings.prompts_per_step
        requests = group_requests(
            crew,
            crew.prompts.batch(first, settings.prompts_per_step),
            stage=self.name,
            first=first,
            mixture=settings.mixture,
            sampling=settings.sampling,
            samples=settings.samples_per_prompt,
        )
        sampler = MeteredSampler(crew.student_sampler, crew.meter, crew.student_shape, "student_sample", self.name)
        return sampler.generate(requests)

    def signal(self, rollouts: Sequence[Rollout]) -> list[Example]:
        with self.crew.meter.measure("teacher_score", self.name) as cost:
            signals = self.crew.teacher.score(rollouts)
            cost.tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
            cost.flops = rollout_flops(self.crew.teacher_shape, rollouts)
        return [Example(rollout, signal) for rollout, signal in zip(rollouts, signals, strict=True)]

    def loss(self, rows: Rows) -> Felt:
        batch, settings = rows.batch, self.settings.divergence
        assert isinstance(batch.signal, HiddenStates)
        divergence = linear_divergence(
            rows.hidden_ND,
            rows.head_VD,
            batch.signal.states_Rd,
            self.crew.teacher.head_VD,
            kind=settings.kind,
            beta=settings.beta,
            temperature=settings.temperature,
            weights=batch.weight_N,
            merged_ids=(self.crew.encoder.stop_ids,) if settings.merge_stop_ids else None,
            sampled_ids=batch.target_N,
        )
        assert divergence.sampled_logprob is not None
        return Felt(
            divergence.total,
            {
                "reverse_kl": divergence.reverse_kl,
                "forward_kl": divergence.forward_kl,
                "student_entropy": divergence.student_entropy,
                "teacher_entropy": divergence.teacher_entropy,
                "sampled_logprob": divergence.sampled_logprob,
                # What the sampler said of its tokens against what the trainer says: rounding, unless weights are stale.
                "logprob_gap": (divergence.sampled_logprob - batch.sampled_logprob_N).abs(),
            },
        )

    def manifest(self) -> dict[str, Any]:
        return {}


def group_requests(
    crew: Crew,
    prompts: Sequence[Prompt],
    *,
    stage: str,
    first: int,
    mixture: Mixture,
    sampling: ModeSampling,
    samples: int,
) -> list[Request]:
    """``samples`` requests for each prompt, one mode a prompt; ``first`` is the position of the first prompt."""
    return [
        crew.encoder.request(
            prompt,
            mode=mode,
            switch=switch,
            sampling=sampling.of(mode),
            seed=derive(crew.seed, stage, first + place, sample),
        )
        for place, (prompt, mode, switch) in enumerate(_with_modes(prompts, mixture, crew.seed, stage, first))
        for sample in range(samples)
    ]


def _with_modes(
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


STAGES: dict[type, Any] = {OffPolicyStage: OffPolicy, OnPolicyStage: OnPolicy}
"""Settings to method: reading this is reading the catalogue."""
