"""What a run spends: tokens, FLOPs and seconds, by role and by the stage that caused them.

A token's forward pass costs 2 N + 4 L heads head_dim c FLOPs at context c (``Shape.forward_flops``); over a sequence
the mean context is P/2 for its P prompt tokens and P + R/2 for its R response tokens. Scoring is one forward pass of
all of a sequence's tokens, training three (LoRA two: frozen weights get no gradient). Recomputed activations are not
counted: the figures are model FLOPs, comparable between machines and settings. Responses that come from the store cost
nothing again; the run that made them was charged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from distill.family import Shape
from distill.model_config import StudentSettings
from distill.types import Rollout

CostRole = str
"""Who worked: teacher_generate, teacher_score, student_sample, student_score (a forward pass of the student, or of its
earlier self, over responses that exist already), verify, student_train or evaluate. A specialist teacher's lines have
its domain behind a point (teacher_score.mathematics)."""


def sequence_flops(shape: Shape, num_prompt: float, num_response: float) -> float:
    """FLOPs of one forward pass over P prompt and R response tokens (sampling with a cache costs the same)."""
    prompt = num_prompt * shape.forward_flops(num_prompt / 2)
    return prompt + num_response * shape.forward_flops(num_prompt + num_response / 2)


def training_passes(settings: StudentSettings) -> int:
    """Forward-pass equivalents of a training step: forward, and backward to activations and to the weights."""
    return 3 if settings.lora is None else 2


def rollout_flops(shape: Shape, rollouts: Iterable[Rollout]) -> float:
    """FLOPs of one forward pass over all ``rollouts``."""
    return sum(sequence_flops(shape, len(rollout.prompt_ids), len(rollout.response_ids)) for rollout in rollouts)


@dataclass
class Cost:
    """``tokens`` are the ones the role worked on: sampled ones, or all that were scored or trained."""

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    reused_tokens: int = 0
    """Response tokens that came from the store and were charged to the run that made them."""

    def add(self, other: Cost) -> None:
        self.tokens += other.tokens
        self.flops += other.flops
        self.seconds += other.seconds
        self.reused_tokens += other.reused_tokens

    def since(self, then: Cost) -> Cost:
        """What has been spent since it was ``then``."""
        return Cost(
            self.tokens - then.tokens,
            self.flops - then.flops,
            self.seconds - then.seconds,
            self.reused_tokens - then.reused_tokens,
        )


@dataclass
class CostAccount:
    """Costs by role and stage; survives a resume through ``state``."""

    entries: dict[str, dict[str, Cost]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """The most memory that was held while a role worked."""

    def note_peak(self, role: CostRole, num_bytes: int) -> None:
        self.peak_bytes[role] = max(self.peak_bytes.get(role, 0), num_bytes)

    def charge(self, role: CostRole, stage: str, cost: Cost) -> None:
        self.entries.setdefault(role, {}).setdefault(stage, Cost()).add(cost)

    def of_stage(self, stage: str) -> dict[str, Cost]:
        """A copy of what one stage has cost so far, by role, examinations left out."""
        return {
            role: replace(stages[stage])
            for role, stages in self.entries.items()
            if stage in stages and role != "evaluate"
        }

    def put_back(self, stage: str, then: Mapping[str, Cost]) -> None:
        """Make what ``stage`` has cost again what ``of_stage`` gave once; examinations are left as they are."""
        for role, stages in self.entries.items():
            if role != "evaluate" and stage in stages:
                stages[stage] = replace(then.get(role, Cost()))

    def to_json(self) -> dict[str, Any]:
        """By role: ``Cost``'s fields, tokens_per_second, peak_memory_bytes, and the same by stage in ``stages``."""
        document: dict[str, Any] = {}
        for role, stages in self.entries.items():
            total = Cost()
            for cost in stages.values():
                total.add(cost)
            document[role] = {
                **_shown(total),
                "peak_memory_bytes": self.peak_bytes.get(role),
                "stages": {stage: _shown(cost) for stage, cost in stages.items()},
            }
        return document

    def state(self) -> dict[str, Any]:
        return {role: {stage: asdict(cost) for stage, cost in stages.items()} for role, stages in self.entries.items()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> CostAccount:
        """The account that ``to_json`` showed."""
        names = [entry.name for entry in fields(Cost)]
        account = cls.from_state(
            {
                role: {stage: {name: cost[name] for name in names} for stage, cost in shown["stages"].items()}
                for role, shown in document.items()
            }
        )
        peaks = {role: shown["peak_memory_bytes"] for role, shown in document.items()}
        account.peak_bytes = {role: peak for role, peak in peaks.items() if peak is not None}
        return account

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> CostAccount:
        return cls({role: {stage: Cost(**cost) for stage, cost in stages.items()} for role, stages in state.items()})


def _shown(cost: Cost) -> dict[str, Any]:
    return {**asdict(cost), "tokens_per_second": cost.tokens / cost.seconds if cost.seconds else None}
