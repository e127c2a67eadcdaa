"""The catalogue of methods. A stage answers three questions:

    stage        who speaks (sample)               who judges (signal)       how it is felt (loss)
    off_policy   the teacher, from its store       nobody                    cross-entropy on the response
    on_policy    the student                       the teacher, every token  divergence by signal (pipelines.losses)
    grpo         the student                       a verifier, once          group-relative policy gradient
    opd_reward   the student                       both                      the sum of these two

The loop that runs them never asks which one it runs. A new method is a class here and a line in ``STAGES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.costs import Cost, CostRole, rollout_flops
from distill.cross_entropy import linear_cross_entropy
from distill.errors import UserError
from distill.family import Shape
from distill.progress import say
from distill.sampler import Sampler
from distill.seeding import derive
from distill.stage_config import GrpoStage, OffPolicyStage, OnPolicyStage, OpdRewardStage
from distill.types import Example, Request, Rollout
from pipelines.crew import Crew, Judged, positions_of, student_responses, teacher_requests
from pipelines.faculty import TeacherPart, Tutor
from pipelines.grpo import Grpo, OpdReward
from pipelines.losses import feel
from pipelines.meter import MeteredSampler
from pipelines.verifier import verdicts_where_known
from students.loss import Felt, Rows
from students.shared_sampler import with_all_samplers
from teachers.answers import Answers, answer
from teachers.filters import sift


class OffPolicy:
    """The teacher's responses in both modes, learnt by cross-entropy (Qwen3 report, section 4.5, first stage)."""

    teacher_part: TeacherPart = "speaks"

    def __init__(self, name: str, settings: OffPolicyStage, crew: Crew, *, first_prompt: int) -> None:
        self.name, self.settings, self.crew, self.first_prompt = name, settings, crew, first_prompt
        self._responses: list[Rollout] = []
        self._keys: list[str] = []
        self._fallen: dict[str, int] = {}

    @property
    def num_prompts(self) -> int:
        return positions_of(self.settings, self.crew.prompts)

    @property
    def num_steps(self) -> int:
        return max(1, self.settings.epochs * len(self._responses) // self.settings.batch_size)

    def prepare(self) -> None:
        settings, crew = self.settings, self.crew
        if self.num_prompts < settings.num_prompts:
            wanted = f"fewer than num_prompts {settings.num_prompts}"
            say(f"{self.name}: all {self.num_prompts} prompts are asked once, {wanted}")
        prompts = crew.prompts.batch(self.first_prompt, self.num_prompts)
        requests = teacher_requests(
            prompts, settings, crew.encoder, seed=crew.seed, stage=self.name, first=self.first_prompt
        )
        found: dict[int, tuple[str, Rollout]] = {}
        for tutor, places in crew.teachers.groups([request.prompt for request in requests]):
            answers = self._answer(tutor, [requests[place] for place in places])
            found |= zip(places, zip(answers.keys, answers.rollouts, strict=True), strict=True)
        self._keys = [found[place][0] for place in range(len(requests))]
        sifted = sift(
            [found[place][1] for place in range(len(requests))],
            settings.filters,
            crew.encoder,
            lambda rollouts: verdicts_where_known(rollouts, crew.prompts, crew.encoder),
        )
        self._responses, self._fallen = list(sifted.kept), sifted.fallen
        say(f"{self.name}: {sifted.sentence}")
        self._say_scarce()
        if not self._responses:
            raise UserError(
                f"stages.{self.name}.filters leave none of the teacher's {len(requests)} responses "
                f"({', '.join(f'{count} {name}' for name, count in sifted.fallen.items() if count)}); raise "
                f"stages.{self.name}.sampling.*.max_new_tokens where they are truncated, or switch a filter off"
            )

    @property
    def _epochs(self) -> float:
        """How often the stage learns from each response, on average."""
        return self.num_steps * self.settings.batch_size / len(self._responses)

    def _say_scarce(self) -> None:
        """Say of a stage whose one step is more than all of its epochs that it goes beyond them."""
        settings, num = self.settings, len(self._responses)
        if num and self._epochs > settings.epochs:
            say(
                f"{self.name}: {num} responses in {settings.epochs} epochs do not fill a batch of "
                f"{settings.batch_size}: the one step takes each of them {self._epochs:.1f} times; set "
                f"stages.{self.name}.batch_size to at most {settings.epochs * num}"
            )

    def _answer(self, tutor: Tutor, requests: Sequence[Request]) -> Answers:
        """One teacher's answers, charged to it."""
        crew, role = self.crew, tutor.role("teacher_generate")

        def ask(speaker: Sampler) -> Answers:
            return answer(
                requests,
                crew.store,
                MeteredSampler(speaker, crew.meter, tutor.shape, role, self.name),
                identity=tutor.identity,
                run=crew.run_id,
                description=f"{self.name}: responses of {tutor.name}",
            )

        answers = crew.ranks.from_main(with_all_samplers(crew.ranks, tutor.hired.speaker, ask))
        assert answers is not None
        self._charge(answers, role, tutor.shape)
        return answers

    def _charge(self, answers: Answers, role: CostRole, shape: Shape) -> None:
        """Charge what this run generated, now or before it was interrupted, and mark what it found."""
        entry = self.crew.meter.account.entries.setdefault(role, {}).setdefault(self.name, Cost())
        entry.tokens = answers.generated_tokens
        entry.flops = rollout_flops(shape, answers.paid)
        entry.reused_tokens = answers.reused_tokens

    def spoken(self) -> Sequence[Rollout]:
        return self._responses

    def sample(self, step: int) -> list[Rollout]:
        size, num = self.settings.batch_size, len(self._responses)
        return self.crew.ranks.share([self._at(position, num) for position in range(step * size, (step + 1) * size)])

    def _at(self, position: int, num: int) -> Rollout:
        """Entry ``position`` of an endless sequence of shuffled epochs."""
        epoch, place = divmod(position, num)
        order = np.random.default_rng(derive(self.crew.seed, self.name, "epoch", epoch)).permutation(num)
        return self._responses[int(order[place])]

    def signal(self, rollouts: Sequence[Rollout]) -> Judged:
        return Judged([[Example(rollout) for rollout in rollouts]])

    def loss(self, rows: Rows) -> Felt:
        batch = rows.batch
        felt = linear_cross_entropy(rows.hidden_ND, rows.head_VD, batch.target_N, weights=batch.weight_N)
        return Felt(felt.total, {"sampled_logprob": -felt.values, "student_entropy": felt.entropy})

    def manifest(self) -> dict[str, Any]:
        return {
            "responses": self._keys,
            "num_kept": len(self._responses),
            "filtered": self._fallen,
            "epochs": round(self._epochs, 3),
        }


class OnPolicy:
    """The student's own responses, aligned with the teacher's distribution at every token (second stage)."""

    teacher_part: TeacherPart = "judges"

    def __init__(self, name: str, settings: OnPolicyStage, crew: Crew, *, first_prompt: int) -> None:
        self.name, self.settings, self.crew, self.first_prompt = name, settings, crew, first_prompt

    @property
    def num_prompts(self) -> int:
        return positions_of(self.settings, self.crew.prompts)

    @property
    def num_steps(self) -> int:
        return self.settings.steps

    def prepare(self) -> None:
        """Nothing: what a step needs, it makes."""

    def spoken(self) -> Sequence[Rollout]:
        return ()

    def sample(self, step: int) -> list[Rollout]:
        first = self.first_prompt + step * self.settings.prompts_per_step
        return student_responses(self.crew, self.name, self.settings, first=first, heard=True)

    def signal(self, rollouts: Sequence[Rollout]) -> Judged:
        crew, read = self.crew, None
        if crew.teachers.hears:
            # The last responses are still being judged, and the student's forward pass needs nothing of that.
            with crew.meter.measure("student_train", self.name):
                read = crew.student.read(rollouts)
        signals = crew.teachers.judge(rollouts, crew.meter, self.name)
        examples = [Example(rollout, signal) for rollout, signal in zip(rollouts, signals, strict=True)]
        return Judged([examples], read=read)

    def loss(self, rows: Rows) -> Felt:
        return feel(rows, self.settings.divergence, self.crew)

    def manifest(self) -> dict[str, Any]:
        return {}


STAGES: dict[type, Any] = {
    OffPolicyStage: OffPolicy,
    OnPolicyStage: OnPolicy,
    GrpoStage: Grpo,
    OpdRewardStage: OpdReward,
}
"""Settings to method: reading this is reading the catalogue."""
