"""A few of the student's own responses, token by token: what the report shades by the teacher's judgement.

Before the first and after the last step of every stage in which a teacher judges, the student answers the same few
prompts in both modes with the same random numbers, and each token is written down with its divergence to the teacher.
The training does not notice: the responses are not learnt from, their random numbers are their own, and what they cost
is charged to the examination. Left out on purpose: stages without a teacher's judgement, and the whole of a long
response; samples.jsonl is bounded whatever a run's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from distill.chat import switch_in
from distill.costs import rollout_flops
from distill.encode import Encoder
from distill.journal import Journal
from distill.seeding import derive
from distill.stage_config import OnPolicyStage, OpdRewardStage, StageSettings
from distill.types import MODES, Example, Mode, Request, Rollout
from eval.samples import shown
from pipelines.crew import Crew, Stage
from pipelines.losses import feel
from pipelines.meter import Meter
from students.rescoring import measured

NUM_PROMPTS = 4
"""Prompts that are asked, in each mode."""

SEARCHED = 64
"""Prompts of the stage that are searched for ones that leave the mode open."""

MOST_TOKENS = 1024
"""Longest recorded response; the stage's own limit, where that is lower."""

DIVERGENCES = ("reverse_kl", "topk_reverse_kl", "estimated_reverse_kl")
"""What a loss may call a token's divergence to the teacher: the whole, its lower bound, or an estimate."""

_SPLIT_CHARACTER = 4
"""Tokens that the bytes of one character may be spread over."""


class Specimens:
    """Records the student's responses of a run's stages."""

    def __init__(self, crew: Crew, journal: Journal) -> None:
        self.crew, self.journal = crew, journal

    def take(self, stage: Stage, settings: StageSettings, *, step: int, global_step: int) -> None:
        """Record the student as it is after ``step`` steps of ``stage``. Every process must call it."""
        if not isinstance(settings, OnPolicyStage | OpdRewardStage):
            return
        crew, student, ranks = self.crew, self.crew.student, self.crew.ranks
        aside = Meter()
        examples: list[Example] = []
        felt: list[dict[str, Tensor]] = []
        with crew.meter.measure("evaluate", "samples") as cost:
            with student.whole(), ranks.together():
                crew.student_sampler.take_weights()
                if ranks.is_main:
                    rollouts = crew.student_sampler.generate(self._requests(stage, settings))
                    signals = crew.teachers.judge(rollouts, aside, stage.name)
                    examples = [Example(said, signal) for said, signal in zip(rollouts, signals, strict=True)]
                    loss = partial(feel, settings=settings.divergence, crew=crew)
                    felt = measured(student, examples, loss)
            said = [example.rollout for example in examples]
            cost.tokens = sum(len(rollout.response_ids) for rollout in said)
            cost.flops = 2 * rollout_flops(crew.student_shape, said)
            cost.flops += sum(part.flops for part in aside.account.of_stage(stage.name).values())
        for rollout, per_token in zip(said, felt, strict=True):
            self.journal.record_sample(
                {
                    "stage": stage.name,
                    "step": step,
                    "global_step": global_step,
                    **_entry(rollout, per_token, crew.encoder),
                }
            )

    def _requests(self, stage: Stage, settings: OnPolicyStage | OpdRewardStage) -> list[Request]:
        """The same at every step of the stage."""
        prompts = self.crew.prompts.batch(stage.first_prompt, SEARCHED)
        asked: dict[str, tuple[Any, tuple[Mode, ...]]] = {}
        for is_open in (True, False):
            for prompt in prompts:
                own = prompt.mode or switch_in(prompt.messages)
                if (own is None) == is_open and len(asked) < NUM_PROMPTS:
                    asked.setdefault(prompt.id, (prompt, MODES if own is None else (own,)))
        return [
            self.crew.encoder.request(
                prompt,
                mode=mode,
                switch="hard" if switch_in(prompt.messages) is None else "soft",
                sampling=replace(
                    settings.sampling.of(mode),
                    max_new_tokens=min(settings.sampling.of(mode).max_new_tokens, MOST_TOKENS),
                ),
                seed=derive(self.crew.seed, stage.name, "samples", prompt.id, mode),
            )
            for prompt, modes in asked.values()
            for mode in modes
        ]


def _entry(rollout: Rollout, per_token: dict[str, Tensor], encoder: Encoder) -> dict[str, Any]:
    name = next(name for name in DIVERGENCES if name in per_token)
    return {
        "prompt_id": rollout.request.prompt.id,
        "prompt": shown(rollout.request.prompt),
        "reference": rollout.request.prompt.answer,
        "mode": rollout.mode,
        "finish_reason": rollout.finish_reason,
        "divergence": name,
        "tokens": pieces(rollout.response_ids, encoder),
        "kl": _rounded(per_token[name]),
        "logprob": _rounded(per_token["sampled_logprob"]),
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def pieces(ids: Sequence[int], encoder: Encoder) -> list[str]:
    """The text of each token. Where several tokens make one character, the last of them has it and the others none."""
    texts, pending = list[str](), list[int]()
    for token in ids:
        pending.append(token)
        text = encoder.decode(pending)
        if text.endswith("\ufffd") and len(pending) < _SPLIT_CHARACTER:
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts
