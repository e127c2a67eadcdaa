"""Guards: a training that goes wrong warns first and then stops, with a checkpoint and a sentence.

A guard compares the last steps with the stage's own beginning, so its limits hold for any task and any length of
response. It sees what stands in metrics.jsonl and nothing else; on a resume the lines that are there are gone through
again, so that a resumed run stops where one that was never interrupted stops.

Only steps in which the student spoke are watched: the teacher's responses do not change with the student. Left out on
purpose: anything that changes the training instead of stopping it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.config import GuardLimits, GuardSettings
from distill.errors import GuardError
from distill.progress import say

SHOWN = 6
"""Values of a guard's history that a sentence shows."""


@dataclass(frozen=True, slots=True)
class Guard:
    """What is watched, how it is compared, and what to say.

    ``compare`` takes the means over a window: of the last steps, of the first ones, and the lowest and the highest
    there has been. What it gives is beyond a limit on the side that ``worse`` names.
    """

    metrics: tuple[str, ...]
    compare: Callable[[_Means], float]
    worse: str
    finding: str
    advice: str
    where_judged: bool = True
    """Watched too where a teacher judges every token."""


@dataclass(frozen=True, slots=True)
class _Means:
    last: float
    first: float
    lowest: float
    highest: float


def _by_mode(name: str) -> tuple[str, ...]:
    return (f"think.{name}", f"no_think.{name}")


GUARDS: dict[str, Guard] = {
    "length": Guard(
        _by_mode("length"),
        lambda means: means.last / means.first,
        "above",
        "responses are {value:.1f} times as long as at the beginning",
        "Lower the learning rate; in a GRPO stage, punish length earlier (policy_gradient.overlong_share)",
    ),
    "repetition": Guard(
        _by_mode("repetition"),
        lambda means: means.last - means.lowest,
        "above",
        "the share of repeated 4-grams has risen by {value:.2f}",
        "Lower the learning rate, or raise the sampling's temperature if it is below 1",
    ),
    "truncation": Guard(
        _by_mode("truncation"),
        lambda means: means.last - means.lowest,
        "above",
        "the share of responses cut off at the token limit has risen by {value:.2f}",
        "Lower the learning rate, or raise sampling.*.max_new_tokens if the responses are good",
    ),
    "closure": Guard(
        _by_mode("closure"),
        lambda means: means.highest - means.last,
        "above",
        "the share of responses with closed thinking has fallen by {value:.2f}",
        "Lower the learning rate, or lengthen the stage before, which teaches the format",
    ),
    "entropy": Guard(
        _by_mode("surprise"),
        lambda means: means.last / means.first if means.first > 0 else 1.0,
        "below",
        "the student's entropy, as sampled, is {value:.3f} of what it was at the beginning",
        "Lower the learning rate; in a GRPO stage, raise policy_gradient.clip_high or end the stage earlier",
        # There the student becomes as certain as its teacher, however certain that is; the KL tells a collapse.
        where_judged=False,
    ),
    "kl": Guard(
        ("reverse_kl",),
        lambda means: means.last,
        "below",
        "the divergence to the teacher is {value:.1e} nats a token, which no student and teacher of their own have",
        "See that teacher.model is not the student itself, and that its server has the teacher's weights",
    ),
}
"""The catalogue. A guard's limits are the key of the same name in the configuration's block ``guards``."""


@dataclass
class _Watch:
    """One guard on one metric, so far."""

    name: str
    metric: str
    limits: GuardLimits
    window: int
    values: list[float] = field(default_factory=list)
    lowest: float = float("inf")
    highest: float = float("-inf")
    warned: bool = False

    def see(self, value: float) -> str | None:
        """Take in a step's value: "warn" or "stop" where this is the step to do it."""
        self.values.append(value)
        if len(self.values) < self.window:
            return None
        last = self._mean(self.values[-self.window :])
        self.lowest, self.highest = min(self.lowest, last), max(self.highest, last)
        found = self.value
        if not self._beyond(found, self.limits.warn):
            self.warned = False
            return None
        if not self.warned:
            self.warned = True
            return "warn"
        return "stop" if self._beyond(found, self.limits.stop) else None

    @property
    def value(self) -> float:
        """What the guard compares with its limits."""
        first, last = self._mean(self.values[: self.window]), self._mean(self.values[-self.window :])
        return GUARDS[self.name].compare(_Means(last, first, self.lowest, self.highest))

    def _beyond(self, value: float, limit: float) -> bool:
        return value > limit if GUARDS[self.name].worse == "above" else value < limit

    def _mean(self, values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def sentence(self) -> str:
        """What was found, and the history it was found in: evenly spaced window means, the newest last."""
        ends = range(len(self.values), self.window - 1, -max(1, (len(self.values) - self.window) // (SHOWN - 1)))
        means = [self._mean(self.values[end - self.window : end]) for end in list(ends)[:SHOWN][::-1]]
        history = ", ".join(f"{mean:.3g}" for mean in means)
        return f"{GUARDS[self.name].finding.format(value=self.value)} ({self.metric}: {history})"


class Guards:
    """The guards of one stage. ``history`` are the lines that metrics.jsonl holds of it; ``record`` keeps what is found
    from now on.

    Raises GuardError where the history itself ends with a guard's stop.
    """

    def __init__(
        self,
        settings: GuardSettings,
        *,
        stage: str,
        checkpoints: Path,
        history: Iterable[Mapping[str, Any]],
        record: Callable[[Mapping[str, Any]], None] = lambda found: None,
    ) -> None:
        self.stage, self.checkpoints, self.record = stage, checkpoints, record
        self.watches = [
            _Watch(name, metric, limits, settings.window)
            for name, guard in GUARDS.items()
            if (limits := settings.limits(name)) is not None
            for metric in guard.metrics
        ]
        for metrics in history:
            self._see(metrics, silent=True)

    def watch(self, metrics: Mapping[str, Any]) -> None:
        """Take in a step's metrics. Warns, and raises GuardError where a warning was not enough."""
        self._see(metrics, silent=False)

    def _see(self, metrics: Mapping[str, Any], *, silent: bool) -> None:
        if "tokens.student_sample" not in metrics:
            return
        where = f"{self.stage} step {metrics['step']}"
        is_judged = any(key.startswith("tokens.teacher_score") for key in metrics)
        for watch in self.watches:
            if is_judged and not GUARDS[watch.name].where_judged:
                continue
            value = metrics.get(watch.metric)
            verdict = None if value is None else watch.see(value)
            if verdict is not None and not silent:
                place = {key: metrics[key] for key in ("stage", "step", "global_step")}
                self.record({**place, "guard": watch.name, "verdict": verdict, "sentence": watch.sentence()})
            if verdict == "stop":
                raise GuardError(
                    f"the guard {watch.name!r} stopped the run at {where}: {watch.sentence()}. "
                    f"{GUARDS[watch.name].advice}, or set guards.{watch.name} "
                    f"(stop is {watch.limits.stop:g}, null switches it off), and give another --out. "
                    f"The student as it is: {self.checkpoints}/step_{metrics['global_step']}"
                )
            if verdict == "warn" and not silent:
                say(f"warning, guard {watch.name!r}, {where}: {watch.sentence()}; stops at {watch.limits.stop:g}")
