"""Which of a teacher's responses are not worth learning (Qwen3 report, section 4.1, does so for its cold start).

Left out of the report's list on purpose: what only another model can judge (guesswork, thinking and answer that
contradict each other, changes of language or style, likeness to a question of the examination).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.encode import Encoder
from distill.repetition import repetition
from distill.stage_config import FilterSettings
from distill.types import Rollout

Verdicts = Callable[[Sequence[Rollout]], list[bool | None]]
"""Whether each response is right; None where its prompt has no answer to compare with."""

FILTERS = ("truncated", "unclosed", "repetitive", "wrong")
"""In the order in which they are applied, the dearest last."""


@dataclass(frozen=True, slots=True)
class Sifted:
    """What is left, and how many responses fell to each filter; one that several would take counts for the first."""

    kept: tuple[Rollout, ...]
    fallen: dict[str, int]
    num_unjudged: int = 0
    """Of those that were to be judged right or wrong: responses to prompts that have no answer."""

    @property
    def sentence(self) -> str:
        """For whoever watches: what was left out and why."""
        reasons = ", ".join(f"{count} {name}" for name, count in self.fallen.items() if count)
        notes = [f"left out: {reasons}"] if reasons else []
        if self.num_unjudged:
            notes.append(f"not judged: {self.num_unjudged}, whose prompts have no answer")
        return f"{len(self.kept)} of {len(self.kept) + sum(self.fallen.values())} responses are kept" + (
            f" ({'; '.join(notes)})" if notes else ""
        )


def sift(rollouts: Sequence[Rollout], settings: FilterSettings, encoder: Encoder, verdicts: Verdicts) -> Sifted:
    """``rollouts`` without those that ``settings`` leave out, in their order."""
    reasons = [_reason(rollout, settings, encoder) for rollout in rollouts]
    num_unjudged = 0
    if settings.wrong:
        left = [place for place, reason in enumerate(reasons) if reason is None]
        for place, is_right in zip(left, verdicts([rollouts[place] for place in left]), strict=True):
            num_unjudged += is_right is None
            if is_right is False:
                reasons[place] = "wrong"
    return Sifted(
        tuple(rollout for rollout, reason in zip(rollouts, reasons, strict=True) if reason is None),
        {name: reasons.count(name) for name in FILTERS},
        num_unjudged,
    )


def _reason(rollout: Rollout, settings: FilterSettings, encoder: Encoder) -> str | None:
    """The first filter but ``wrong`` that takes the response."""
    if settings.truncated and rollout.finish_reason == "length":
        return "truncated"
    if settings.unclosed and not encoder.closed_thinking(rollout):
        return "unclosed"
    if settings.max_repetition is not None and repetition(rollout.response_ids) > settings.max_repetition:
        return "repetitive"
    return None
