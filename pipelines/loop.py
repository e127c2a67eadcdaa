"""The loop: sample, judge, feel, step, record. It runs every method and asks none which one it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from distill import interrupt
from distill.costs import Cost, rollout_flops
from distill.encode import Encoder
from distill.errors import DistillError, GoneError, GuardError, NonFiniteError, StoppedError, name_place
from distill.journal import Journal
from distill.progress import track
from distill.repetition import repetition
from distill.seeding import derive
from distill.types import MODES, Example, Mode, Rollout
from pipelines.batches import Batches
from pipelines.crew import Crew, Judged, Mean, Stage
from pipelines.guards import Guards
from pipelines.phases import Clock
from pipelines.tracker import Tracking
from students.means import Means
from students.ranks import Ranks
from students.student import Student

Checkpoint = Callable[[int, bool], None]
"""Called with the number of finished steps of the stage, and whether the stage has ended."""

Examine = Callable[[int], bool]
"""Called with the number of finished steps of the stage, before the first and after each; whether to end the stage."""


def run_stage(
    stage: Stage,
    student: Student,
    crew: Crew,
    journal: Journal,
    *,
    first_step: int,
    global_step: int,
    checkpoint: Checkpoint,
    checkpoint_every: int,
    guards: Guards,
    tracking: Tracking,
    examine: Examine,
    batches: Batches,
    clock: Clock,
) -> int:
    """Steps ``first_step`` to the stage's last, or to where ``examine`` ends it; the number of finished steps.

    A step that is interrupted leaves no trace; see ``interrupt``.

    ``batches`` is where the stage's batches come from, ``clock`` keeps when its phases worked.
    ``global_step`` counts the run's finished steps before ``first_step``. A stop on request or by a guard, a loss that
    is not finite, or a server that is gone for good writes a checkpoint of the last finished step on its way out, with
    the costs of that step. Several processes do not for a server: who started it alone hears of its end.
    """
    done, spent = first_step, crew.meter.account.of_stage(stage.name)
    try:
        with batches, track(f"{stage.name}: steps", stage.num_steps, "steps", done=done) as bar:
            for step in range(first_step, stage.num_steps):
                batches.rest()
                if examine(done):
                    break
                metrics = _step(stage, student, crew, step, batches=batches, clock=clock)
                done, spent = step + 1, crew.meter.account.of_stage(stage.name)
                entry = {"stage": stage.name, "step": step, "global_step": global_step + done - first_step, **metrics}
                journal.record(entry)
                tracking.step(entry)
                bar.advance(note=_note(metrics))
                guards.watch(entry)
                if done % checkpoint_every == 0 and done < stage.num_steps:
                    checkpoint(done, False)
            else:
                examine(done)
    except (StoppedError, NonFiniteError, GuardError, GoneError) as error:
        # All are raised between steps, or before one changes anything: the weights are those of the last finished step.
        # A checkpoint takes every process.
        if done > first_step and (crew.ranks.count == 1 or not isinstance(error, GoneError)):
            crew.meter.account.put_back(stage.name, spent)
            checkpoint(done, False)
        raise
    checkpoint(done, True)
    return done


def _step(stage: Stage, student: Student, crew: Crew, step: int, *, batches: Batches, clock: Clock) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(derive(crew.seed, stage.name, "torch", step))  # dropout: the same in a run that was resumed
    before = crew.meter.account.of_stage(stage.name)
    batch = batches.take(step)
    rollouts, judged = batch.rollouts, batch.judged
    taken = time.perf_counter()
    with crew.meter.measure("student_train", stage.name) as cost:
        metrics = _learn(stage, student, _own_updates(judged, crew.ranks), step, crew.ranks)
        trained = [example.rollout for examples in judged.updates for example in examples]
        cost.tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in trained)
        cost.flops = student.passes * rollout_flops(crew.student_shape, trained)
    learnt = time.perf_counter()
    staleness = _staleness(stage, crew, rollouts)
    crew.student_sampler.weight_version += 1
    crew.meter.pool(stage.name, before, crew.ranks)
    return {
        # No teacher judges some stages; their divergence is null, never zero.
        "reverse_kl": None,
        "forward_kl": None,
        **metrics,
        **_facts(crew.ranks.gather(judged.facts)),
        **_describe(crew.ranks.gather([_Response.of(rollout, crew.encoder) for rollout in rollouts])),
        **crew.student_sampler.facts(),
        # The last transfer may have been for the next batch, or for none.
        **batch.weights,
        **staleness,
        **_spent(before, crew.meter.account.of_stage(stage.name)),
        "seconds": (wall := batch.rested + time.perf_counter() - started),
        **{f"seconds.{phase}": seconds for phase, seconds in batch.waited.items()},
        **clock.metrics({**batch.spans, "train": [*batch.spans.get("train", ()), (taken, learnt)]}, wall=wall),
    }


def _staleness(stage: Stage, crew: Crew, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Steps between the weights that spoke and those that are trained, where the student spoke."""
    if stage.teacher_part == "speaks":
        return {}
    ages = [crew.student_sampler.weight_version - rollout.weight_version for rollout in rollouts]
    return {"staleness": sum(ages) / len(ages)}


def _own_updates(judged: Judged, ranks: Ranks) -> list[list[Example]]:
    """This process's examples of each update, with the step's groups numbered over all processes.

    Dealt in turn, all that the groups before its own change is at which update its dealing begins.
    """
    num_before = sum(ranks.gather(judged.num_dealt)[: ranks.number])
    first = num_before % len(judged.updates)
    return judged.updates[-first:] + judged.updates[:-first]


def _learn(
    stage: Stage, student: Student, updates: Sequence[Sequence[Example]], step: int, ranks: Ranks
) -> dict[str, float | None]:
    """One optimiser step for each of ``updates`` that has examples; their metrics together.

    The first may be interrupted, or find a number that is not finite, before anything has changed. From then on the
    step is gone through to its end, so that a checkpoint holds whole steps only.
    """
    learned, means = list[dict[str, Any]](), Means()
    for place, examples in enumerate(updates):
        if not any(ranks.gather(len(examples))):
            continue
        with interrupt.deferred() if learned else nullcontext():
            try:
                metrics = student.step(
                    examples,
                    stage.loss,
                    step=step * len(updates) + place,
                    num_steps=stage.num_steps * len(updates),
                    where=f"{stage.name} step {step}",
                    into=means,
                )
            except NonFiniteError as error:
                if not learned:
                    raise
                raise DistillError(f"{error}; the step had begun, so the run stands at its last checkpoint") from error
            except Exception as error:
                if not isinstance(error, DistillError):
                    name_place(error, f"{stage.name}, training step {step}")
                raise
        learned.append(metrics)
    return _together(learned, means)


def _together(updates: Sequence[Mapping[str, Any]], means: Means) -> dict[str, float | None]:
    """Metrics of a step's updates as one; ``means`` are those over all their tokens.

    Counts and seconds are added. What an update has one number of is a mean, weighted by the updates' tokens.
    """
    if not updates:
        return {"loss": None, "num_tokens": 0, "seconds.train": 0.0}
    if len(updates) == 1:
        return dict(updates[0])
    num_tokens, seconds = (sum(update[key] for update in updates) for key in ("num_tokens", "seconds.train"))
    known: dict[str, float | None] = {**means.means(), "num_tokens": num_tokens, "seconds.train": seconds}
    single = [key for key in updates[0] if key not in known]
    return known | {key: sum(one["num_tokens"] * one[key] for one in updates) / num_tokens for key in single}


def _spent(before: Mapping[str, Cost], after: Mapping[str, Cost]) -> dict[str, float]:
    """Tokens of each role and FLOPs of all, of one step."""
    spent = {role: (cost, before.get(role, Cost())) for role, cost in after.items()}
    return {
        "flops": sum(now.flops - then.flops for now, then in spent.values()),
        **{f"tokens.{role}": now.tokens - then.tokens for role, (now, then) in spent.items()},
    }


@dataclass(frozen=True, slots=True)
class _Response:
    """What a response looks like from outside."""

    mode: Mode
    length: float
    closure: float
    truncation: float
    forced: float
    repetition: float
    surprise: float
    """The entropy, sampled: a step that teaches nothing has no forward pass to measure it exactly."""

    @classmethod
    def of(cls, rollout: Rollout, encoder: Encoder) -> _Response:
        return cls(
            rollout.mode,
            length=float(len(rollout.response_ids)),
            closure=float(encoder.closed_thinking(rollout)),
            truncation=float(rollout.finish_reason == "length"),
            forced=float(any(rollout.forced)),
            repetition=repetition(rollout.response_ids),
            surprise=surprise(rollout),
        )


def _facts(parts: Sequence[Mapping[str, float | Mean]]) -> dict[str, float | None]:
    """The judging's metrics, of all processes together: counts are added."""
    pooled: dict[str, float | None] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        means = [value for value in values if isinstance(value, Mean)]
        if means:
            num = sum(mean.num for mean in means)
            pooled[name] = sum(mean.total for mean in means) / num if num else None
        else:
            pooled[name] = sum(value for value in values if not isinstance(value, Mean))
    return pooled


def _describe(parts: Sequence[Sequence[_Response]]) -> dict[str, float | None]:
    """The responses of all processes together and by mode."""
    everyone = [said for part in parts for said in part]
    groups = {"": everyone} | {f"{mode}.": [said for said in everyone if said.mode == mode] for mode in MODES}
    described: dict[str, float | None] = {}
    for prefix, group in groups.items():
        described[f"{prefix}num_responses"] = len(group)
        for name in ("length", "closure", "truncation", "forced", "repetition", "surprise"):
            values = [float(getattr(said, name)) for said in group]
            described[prefix + name] = sum(values) / len(values) if values else None
    return described


def surprise(rollout: Rollout) -> float:
    """Mean of -log p over the tokens that the speaker chose itself; 0 where there is none."""
    chosen = [value for value, kept in zip(rollout.logprobs, rollout.loss_mask, strict=True) if kept]
    return -sum(chosen) / len(chosen) if chosen else 0.0


def _note(metrics: Mapping[str, Any]) -> str:
    return "nothing to learn from" if metrics["loss"] is None else f"loss {metrics['loss']:.4f}"
