"""The loop: sample, judge, feel, step, record. It runs every method and asks none which one it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distill.costs import Cost, rollout_flops
from distill.encode import Encoder
from distill.errors import NonFiniteError, StoppedError
from distill.journal import Journal
from distill.progress import track
from distill.seeding import derive
from distill.types import MODES, Rollout
from pipelines.stages import Crew, Stage
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
    examine: Examine,
) -> int:
    """Steps ``first_step`` to the stage's last, or to where ``examine`` ends it; the number of finished steps.

    A step that is interrupted leaves no trace; see ``interrupt``.

    ``global_step`` counts the run's finished steps before ``first_step``. A stop on request, or a loss that is not
    finite, writes a checkpoint of the last finished step on its way out.
    """
    done = first_step
    try:
        with track(f"{stage.name}: steps", stage.num_steps, "steps", done=done) as bar:
            for step in range(first_step, stage.num_steps):
                if examine(done):
                    break
                metrics = _step(stage, student, crew, step)
                done = step + 1
                journal.record(
                    {"stage": stage.name, "step": step, "global_step": global_step + done - first_step, **metrics}
                )
                bar.advance(note=_note(metrics))
                if done % checkpoint_every == 0 and done < stage.num_steps:
                    checkpoint(done, False)
            else:
                examine(done)
    except (StoppedError, NonFiniteError):
        # Both are raised before a step changes anything, so the weights are those of the last finished step.
        if done > first_step:
            checkpoint(done, False)
        raise
    checkpoint(done, True)
    return done


def _step(stage: Stage, student: Student, crew: Crew, step: int) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(derive(crew.seed, stage.name, "torch", step))  # dropout: the same in a run that was resumed
    before = crew.meter.account.of_stage(stage.name)
    rollouts = stage.sample(step)
    sampled = time.perf_counter()
    examples = stage.signal(rollouts)
    scored = time.perf_counter()
    with crew.meter.measure("student_train", stage.name) as cost:
        metrics = student.step(
            examples, stage.loss, step=step, num_steps=stage.num_steps, where=f"{stage.name} step {step}"
        )
        cost.tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
        cost.flops = student.passes * rollout_flops(crew.student_shape, rollouts)
    crew.student_sampler.weight_version += 1
    return {
        # No teacher judges some stages; their divergence is null, never zero.
        "reverse_kl": None,
        "forward_kl": None,
        **metrics,
        **_describe(rollouts, crew.encoder),
        **_spent(before, crew.meter.account.of_stage(stage.name)),
        "seconds": time.perf_counter() - started,
        "seconds.sample": sampled - started,
        "seconds.score": scored - sampled,
    }


def _spent(before: Mapping[str, Cost], after: Mapping[str, Cost]) -> dict[str, float]:
    """Tokens of each role and FLOPs of all, of one step."""
    spent = {role: (cost, before.get(role, Cost())) for role, cost in after.items()}
    return {
        "flops": sum(now.flops - then.flops for now, then in spent.values()),
        **{f"tokens.{role}": now.tokens - then.tokens for role, (now, then) in spent.items()},
    }


def _describe(rollouts: Sequence[Rollout], encoder: Encoder) -> dict[str, float | None]:
    """Length, closure of thinking, truncation, early stops: all responses together and by mode."""
    groups = {"": list(rollouts)} | {f"{mode}.": [r for r in rollouts if r.mode == mode] for mode in MODES}
    described: dict[str, float | None] = {}
    for prefix, group in groups.items():
        described[f"{prefix}num_responses"] = len(group)
        for name, values in (
            ("length", [float(len(rollout.response_ids)) for rollout in group]),
            ("closure", [float(encoder.closed_thinking(rollout)) for rollout in group]),
            ("truncation", [float(rollout.finish_reason == "length") for rollout in group]),
            ("forced", [float(any(rollout.forced)) for rollout in group]),
        ):
            described[prefix + name] = sum(values) / len(values) if values else None
    return described


def _note(metrics: Mapping[str, Any]) -> str:
    return f"loss {metrics['loss']:.4f}"
