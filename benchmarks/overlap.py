"""How much of a step hides behind its longest phase: ``python -m benchmarks.overlap --json``.

``embedded``: the embedded pair after a short off-policy stage, with a vLLM teacher on a core of its own (``--cores``:
this process's, the teacher's), staleness 0; null with ``--no-vllm``. Each step's wall time is compared with the larger
of sample + train and score, where each was measured alone on the same responses, right behind the step (the learning
rate is next to nothing, so that they are the same). ``wall_over_bound`` is that of all steps together, ``median_step``
the median step's. ``one_response`` is what judging a single one takes. ``simulated``: sampler, teacher and trainer on
three devices that take their time elsewhere (they sleep), staleness 1, with each phase in turn as the longest: wall
time of a step over the longest phase.
In both the loop is the one that ``distill run`` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.loop import crew_of, encoder, metrics_of
from benchmarks.simulated import NUM_PROMPTS, simulated_crew
from distill.checkpoint import load_model, open_checkpoint
from distill.config import RunConfig
from distill.family import resolve
from distill.model_config import StudentSettings
from distill.sampler import StudentSampler, TransformersSampler
from distill.stage_config import ModeSampling, OnPolicyStage, Optimiser, SamplingSettings
from distill.types import Example, HiddenStates, Rollout
from distill.vllm.service import Service
from pipelines.batches import batches_of
from pipelines.crew import student_responses
from pipelines.faculty import find_teachers, hired_faculty
from pipelines.hiring import server_launches
from pipelines.resolution import resolve_run
from pipelines.stages import OnPolicy
from pipelines.strong_to_weak import run
from students.student import Student
from teachers.teacher import ExactTeacher

SKIPPED = 3
"""Simulated steps that count for nothing."""


def settings(steps: int, *, prompts: int = NUM_PROMPTS, most: int = 96) -> OnPolicyStage:
    sampling = ModeSampling(think=SamplingSettings(max_new_tokens=most), no_think=SamplingSettings(max_new_tokens=16))
    return OnPolicyStage(steps=steps, prompts_per_step=prompts, samples_per_prompt=1, sampling=sampling)


def seconds_a_step(metrics: Sequence[Mapping[str, Any]], *, skip: int) -> float:
    """From the end of one step's training to the next one's, of the steps behind the first ``skip``: half the median
    of two steps, which may be a short and a long one in turn."""
    ends = [row["timeline"]["train"][-1][1] for row in metrics[skip - 1 :]]
    return statistics.median(later - now for now, later in zip(ends, ends[2:], strict=False)) / 2


def simulated(steps: int, seconds: float) -> dict[str, Any]:
    """Each phase in turn as the longest, and all of one length."""
    found = {}
    for longest in ("sample", "score", "train", "none"):
        phases = {
            phase: seconds if longest in (phase, "none") else 0.6 * seconds for phase in ("sample", "score", "train")
        }
        crew = simulated_crew(**phases)
        stage = OnPolicy("on_policy", settings(steps), crew, first_prompt=0)
        metrics = metrics_of(stage, crew, batches_of(stage, crew, staleness=1))
        wall = seconds_a_step(metrics, skip=SKIPPED)
        found[longest] = {
            "seconds": phases,
            "wall": wall,
            "wall_over_longest": wall / max(phases.values()),
            "overlap_efficiency": statistics.median(row["overlap_efficiency"] for row in metrics[SKIPPED:]),
        }
    return found


def embedded(cores: Sequence[int], *, steps: int, warmup: int, taught: int, prompts: int) -> dict[str, Any]:
    """Staleness 0 with a vLLM teacher on a core of its own."""
    own, teachers = cores
    os.sched_setaffinity(0, {own})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student = taught_student(folder, taught)
        config = resolve_run(
            assignments=["teacher.backend=vllm", f"student.model={student}", f"store={folder / 'store'}"],
        )
        checkpoint = find_teachers(config)[0].checkpoint
        (launch,) = server_launches(config, checkpoint, "score", on_gpu=False, devices=[str(teachers)])
        os.sched_setaffinity(0, {teachers})  # a server inherits it
        service = Service(replace(launch, devices=(str(teachers),)), log=folder / "log")
        with service:
            os.sched_setaffinity(0, {own})
            service.wait()
            config = resolve_run(assignments=["teacher.backend=vllm", f"teacher.urls.score=[{service.url}]"])
            return steps_of(config, student, folder, steps=steps, warmup=warmup, prompts=prompts)


def taught_student(folder: Path, steps: int) -> Path:
    """The embedded student after so many steps of the off-policy stage: one that ends its responses."""
    config = resolve_run(
        assignments=[
            "stages.on_policy=null",
            f"stages.off_policy.num_prompts={32 * steps // 2}",
            "evaluation.num_questions=2",
            "evaluation.references=false",
            f"store={folder / 'store'}",
        ]
    )
    run(config, folder / "taught", command=["benchmarks.overlap"])
    return folder / "taught" / "student"


def steps_of(
    config: RunConfig, checkpoint: Path, folder: Path, *, steps: int, warmup: int, prompts: int
) -> dict[str, Any]:
    found = open_checkpoint(resolve(str(checkpoint), role="student"))
    student = Student(
        load_model(found, torch.float32, "cpu"),
        StudentSettings(dtype="float32", gradient_checkpointing=False, micro_batch_tokens=None),
        stop_ids=encoder().stop_ids,
    )
    student.begin(Optimiser(learning_rate=1e-9, warmup_steps=0))
    sampler: StudentSampler = TransformersSampler(student.model, encoder(), speaker="student")
    device = torch.device("cpu")
    with hired_faculty(
        config, find_teachers(config), encoder(), device=device, logs=folder, choose=cast(Any, None)
    ) as faculty:
        crew = crew_of(faculty, student, sampler, found.shape)
        stage = OnPolicy("on_policy", settings(steps + warmup, prompts=prompts), crew, first_prompt=0)
        judge = cast(ExactTeacher, faculty.default.hired.judge)
        alone, ones = list[dict[str, float]](), list[float]()

        def examine(done: int) -> bool:
            # Right behind the step, so that a machine that is slow for a while is so for both.
            if done > warmup:
                rollouts: list[Rollout] = []
                sample = seconds_of(lambda: rollouts.extend(said_alone(stage, done - 1)))
                signals: list[HiddenStates] = []
                score = seconds_of(lambda: signals.extend(judge.score(rollouts)))
                examples = [Example(rollout, signal) for rollout, signal in zip(rollouts, signals, strict=True)]
                learnt = student.step(examples, stage.loss, step=done, num_steps=stage.num_steps, where="alone")
                alone.append({"sample": sample, "score": score, "train": learnt["seconds.train"]})
                ones.append(seconds_of(lambda: judge.score(rollouts[:1])))
            return False

        metrics = metrics_of(stage, crew, batches_of(stage, crew, staleness=0), examine=examine)[warmup:]
    walls = [row["seconds"] for row in metrics]
    bounds = [max(parts["sample"] + parts["train"], parts["score"]) for parts in alone]
    return {
        "steps": len(metrics),
        "tokens_a_step": statistics.mean(row["tokens.student_sample"] for row in metrics),
        "wall": statistics.median(walls),
        "alone": {name: statistics.median(parts[name] for parts in alone) for name in alone[0]},
        "wall_over_bound": sum(walls) / sum(bounds),
        "median_step": statistics.median(wall / bound for wall, bound in zip(walls, bounds, strict=True)),
        "worst_step": max(wall / bound for wall, bound in zip(walls, bounds, strict=True)),
        "waited_for_score": statistics.median(row["seconds.score"] for row in metrics),
        "one_response": statistics.median(ones),
    }


def said_alone(stage: OnPolicy, step: int) -> list[Rollout]:
    """The step's responses, and nobody is told of them."""
    first = step * stage.settings.prompts_per_step
    return student_responses(stage.crew, stage.name, stage.settings, first=first, heard=False)


def seconds_of(what: Any) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], help="this process's, the teacher's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--taught", type=int, default=300, help="off-policy steps of the student beforehand")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5, help="the longest simulated phase")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    if args.steps < SKIPPED + 2:
        parser.error(f"--steps takes {SKIPPED + 2} or more (the first {SKIPPED} do not count), got {args.steps}")
    results: dict[str, Any] = {"simulated": simulated(args.steps, args.seconds), "embedded": None}
    if not args.no_vllm:
        results["embedded"] = embedded(
            args.cores, steps=args.steps, warmup=args.warmup, taught=args.taught, prompts=args.prompts
        )
    print(json.dumps(results) if args.json else json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
