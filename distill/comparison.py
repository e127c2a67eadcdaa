"""The configuration of a comparison: the same starts, several ways to go on from them, several seeds.

Every member is an ordinary run, made of a recipe with a few keys laid over it. What one arm needs to know of another
(how much the baseline may spend, when it has caught up) is filled in when the other is done.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from distill.settings import PositiveFloat, Settings

Overlay = dict[str, Any]
"""Keys that are laid over those of a recipe; checked when the members' configurations are made."""


class ArmSettings(Settings):
    """One way to go on from a start."""

    stage: Overlay = Field(default={})
    """Laid over the recipe's stage of the same kind where it has one."""
    run: Overlay = Field(default={})
    """Laid over the rest of the member's configuration."""


class ArmsSettings(Settings):
    """The ways that are compared."""

    on_policy: ArmSettings = ArmSettings()
    rl: ArmSettings = ArmSettings(stage={"kind": "grpo"})
    off_policy_more: ArmSettings = ArmSettings()
    """More off-policy distillation; as many fresh questions as the on-policy arm's FLOPs pay for."""


class ComparisonConfig(Settings):
    """On-policy distillation against reinforcement learning and more off-policy distillation (Qwen3 report, Table 21).

    From each start and with each seed: the on-policy arm runs to its end; the RL arm until it has reached the same
    validation score or spent ``rl_flops`` times as much; the off-policy arm with the on-policy arm's FLOPs. All are
    examined on the same questions.
    """

    kind: Literal["comparison"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "comparison"
    recipe: str = "embedded"
    """Where every member run's configuration begins."""
    common: Overlay = Field(default={})
    """Laid over the recipe in every member run."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    starts: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], Overlay] = Field(
        default={"start": {}}, min_length=1
    )
    """By name, what is laid over the recipe's off-policy stage: how far the student is when the arms part. The
    headline is the first one's."""
    arms: ArmsSettings = ArmsSettings()
    rl_flops: PositiveFloat = 10.0
    """Most FLOPs of the RL arm, in multiples of the on-policy arm's (teacher included)."""
    parallel: PositiveInt | None = None
    """Chains of runs (one start, one seed) at a time; null takes one a core on a machine without GPU, else one."""
    quick: Overlay = Field(default={})
    """Laid over this configuration by ``--quick``: fewer seeds, starts and questions."""

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds holds a seed twice: {list(self.seeds)}")
        return self
