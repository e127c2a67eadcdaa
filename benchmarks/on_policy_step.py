"""An on-policy distillation step: ours against TRL's DistillationTrainer, the same shapes, prompts and limits.

    python -m benchmarks.on_policy_step --json --trl-python /path/to/python

``--setting small``: a teacher of 256 x 6 layers, a student of 128 x 4, a vocabulary of 128, random fp32 weights; 32
prompts of 20 to 32 tokens, up to 64 new tokens each, reverse KL, AdamW. ``--setting real``: the published shapes of 4B
and 0.6B with random bf16 weights; 32 prompts of 64 to 128 tokens, up to 256 new tokens each. Ours steps on fp32 master
weights, TRL on the bf16 ones themselves.

Ours runs the loop that ``distill run`` runs. A step's seconds are the median over ``--steps`` after ``--warmup``,
tokens those of the responses. ``parts`` are generating, the teacher's forward pass and the student's forward and
backward pass, each measured alone on the tokens of the last step; ``wall_over_parts`` is the step's time over their
sum. TRL runs in its own environment (``--trl-python``; else null). The two take turns, each time in a new process, and
the median of ``--rounds`` is printed: a machine's speed wanders. ``speedup`` is ours over TRL's within a round: the
median, the least and the most.

On a GPU ``reached`` says what each part makes of it: model FLOP/s (scoring, training), bytes of weights and cache read
a second (sampling), and both as shares of what a large product and a large copy reach there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from benchmarks.loop import metrics_of, only_judge
from benchmarks.machine import ceilings, median_seconds, random_model
from distill.costs import rollout_flops
from distill.family import SIZES, Shape
from distill.memory import cache_bytes
from distill.model_config import StudentSettings
from distill.sampler import TransformersSampler
from distill.stage_config import OnPolicyStage, Optimiser
from distill.types import Prompt, Request, Rollout, Sampling
from pipelines.batches import AtOnce
from pipelines.crew import Crew
from pipelines.meter import Meter
from pipelines.stages import OnPolicy
from students.batch import collate
from students.ranks import ALONE
from students.student import Student
from teachers.local import LocalTeacher

STOP = 1


@dataclass(frozen=True)
class Setting:
    """Who learns what from whom."""

    teacher: Shape
    student: Shape
    dtype: str
    prompt_lengths: tuple[int, int]
    max_new: int
    num_prompts: int = 32

    def prompts(self, step: int) -> list[tuple[int, ...]]:
        """Ids of step ``step``'s prompts; no stop token among them."""
        draw = random.Random(step)
        return [
            tuple(draw.randrange(2, self.student.vocabulary) for _ in range(draw.randint(*self.prompt_lengths)))
            for _ in range(self.num_prompts)
        ]


SETTINGS = {
    "small": Setting(
        teacher=Shape(6, 8, 4, 32, 256, 768, 128, False),
        student=Shape(4, 4, 2, 32, 128, 384, 128, False),
        dtype="float32",
        prompt_lengths=(20, 32),
        max_new=64,
    ),
    "real": Setting(
        teacher=SIZES["4B"], student=SIZES["0.6B"], dtype="bfloat16", prompt_lengths=(64, 128), max_new=256
    ),
}


@dataclass(frozen=True)
class Ids:
    """An encoder without text: what the sampler and the loss ask of one."""

    stop_ids: tuple[int, ...] = (STOP,)
    think_open_id: int = -1
    think_close_id: int = -2
    early_stop_ids: tuple[int, ...] = ()

    def closed_thinking(self, rollout: Rollout) -> bool:
        return True


class Fixed(OnPolicy):
    """On-policy distillation from prompts that are ids already."""

    setting: Setting

    def requests(self, step: int) -> list[Request]:
        sampling = Sampling(max_new_tokens=self.setting.max_new)
        return [
            Request(
                Prompt(({"role": "user", "content": str(ids)},)), "think", "hard", ids, sampling, 1000 * step + place
            )
            for place, ids in enumerate(self.setting.prompts(step))
        ]

    def sample(self, step: int) -> list[Rollout]:
        return self.crew.student_sampler.generate(self.requests(step))


def ours(setting: Setting, device: str, steps: int, warmup: int) -> dict[str, Any]:
    stage, judge = put_together(setting, device, steps + warmup)
    measured = metrics_of(stage, stage.crew, AtOnce(stage, stage.crew))[warmup:]
    rates = [line["length"] * line["num_responses"] / line["seconds"] for line in measured]
    rollouts = stage.sample(steps + warmup - 1)
    parts = parts_of(stage, judge, rollouts, device, step=steps + warmup - 1, repeats=steps)
    # The parts are of one step's tokens: the same step's wall time, again in the loop.
    walls = [line["seconds"] / (line["length"] * line["num_responses"]) for line in measured]
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return {
        "tokens_per_second": statistics.median(rates),
        "seconds_by_phase": {
            name: statistics.median(line[f"seconds.{name}"] for line in measured)
            for name in ("sample", "score", "train")
        },
        "parts": parts,
        "wall_over_parts": statistics.median(walls) * tokens / sum(parts.values()),
        **({"reached": reached(setting, rollouts, parts)} if device == "cuda" else {}),
    }


def put_together(setting: Setting, device: str, num_steps: int) -> tuple[Fixed, LocalTeacher]:
    """The stage, its student ready for the first step, and who judges in it."""
    teacher, learner = (
        random_model(shape, seed=seed, dtype=getattr(torch, setting.dtype), device=device, eos_token_id=STOP)
        for seed, shape in enumerate((setting.teacher, setting.student))
    )
    settings = StudentSettings(dtype=cast(Any, setting.dtype), gradient_checkpointing=False, micro_batch_tokens=None)
    student = Student(learner, settings, stop_ids=(STOP,))
    encoder = cast(Any, Ids())
    judge = LocalTeacher(teacher, name="teacher", batch_tokens=65536)
    crew = cast(
        Crew,
        SimpleNamespace(
            encoder=encoder,
            teachers=only_judge(judge, setting.teacher),
            student=student,
            student_shape=setting.student,
            student_sampler=TransformersSampler(learner, encoder, speaker="student"),
            meter=Meter(),
            seed=0,
            ranks=ALONE,
        ),
    )
    stage = Fixed("on_policy", OnPolicyStage(steps=num_steps), crew, first_prompt=0)
    stage.setting = setting
    student.begin(Optimiser(learning_rate=1e-4, warmup_steps=0))
    return stage, judge


def parts_of(
    stage: Fixed, judge: LocalTeacher, rollouts: Sequence[Rollout], device: str, *, step: int, repeats: int
) -> dict[str, float]:
    """Seconds of each part alone, on ``rollouts``, the step's responses."""
    student = stage.crew.student
    batch = collate(stage.signal(rollouts).updates[0], student.model.device)

    def forward_backward() -> None:
        rows, _ = student.rows(batch)
        (stage.loss(rows).total / batch.num_weighted).backward()
        student.model.zero_grad()

    works: dict[str, Callable[[], object]] = {
        "sample": lambda: stage.sample(step),
        "score": lambda: judge.score(rollouts),
        "train": forward_backward,
    }
    return {name: median_seconds(work, repeats, device) for name, work in works.items()}


def reached(setting: Setting, rollouts: Sequence[Rollout], parts: dict[str, float]) -> dict[str, float]:
    """What the parts make of a GPU, and its ceilings."""
    most = ceilings("cuda", getattr(torch, setting.dtype))
    num_prompt = sum(len(rollout.prompt_ids) for rollout in rollouts)
    num_response = sum(len(rollout.response_ids) for rollout in rollouts)
    # The heads are applied to the responses alone, the teacher's in the divergence.
    student_head, teacher_head = (2 * shape.vocabulary * shape.width for shape in (setting.student, setting.teacher))
    flops = {
        "score": rollout_flops(setting.teacher, rollouts) - teacher_head * (num_prompt + num_response),
        "train": 3 * (rollout_flops(setting.student, rollouts) - student_head * num_prompt)
        + teacher_head * num_response,
    }
    item = torch.finfo(getattr(torch, setting.dtype)).bits // 8
    passes = max(len(rollout.response_ids) for rollout in rollouts)
    looked_at = sum(
        len(rollout.response_ids) * (len(rollout.prompt_ids) + len(rollout.response_ids) / 2) for rollout in rollouts
    )
    read = item * passes * setting.student.total_parameters + cache_bytes(setting.student, item) * looked_at
    speeds = {name: value / parts[name] / 1e12 for name, value in flops.items()}
    return {
        "product.tflops": most["tflops"],
        "copy.gigabytes_per_second": most["gigabytes_per_second"],
        **{f"{name}.tflops": speed for name, speed in speeds.items()},
        **{f"{name}.share_of_product": speed / most["tflops"] for name, speed in speeds.items()},
        "sample.gigabytes_per_second": read / parts["sample"] / 1e9,
        "sample.share_of_copy": read / parts["sample"] / 1e9 / most["gigabytes_per_second"],
    }


def trl(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """TRL's trainer in its own environment; it imports nothing of ours, so it is told the numbers."""
    steps, warmup = args.steps, args.warmup
    task = {
        "teacher": asdict(setting.teacher),
        "student": asdict(setting.student),
        "dtype": setting.dtype,
        "device": args.device,
        "stop": STOP,
        "max_new": setting.max_new,
        "steps": steps,
        "warmup": warmup,
        "threads": args.threads,
        "prompts": [ids for step in range(steps + warmup) for ids in setting.prompts(step)],
        "batch": setting.num_prompts,
    }
    script = Path(__file__).with_name("on_policy_step_trl.py")
    done = subprocess.run(
        [args.trl_python, "-W", "ignore", str(script)],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def median(rounds: Sequence[Any]) -> Any:
    """The median of every number of equal documents."""
    if isinstance(rounds[0], dict):
        return {key: median([one[key] for one in rounds]) for key in rounds[0]}
    return statistics.median(rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_policy_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL 1.16; default: TRL is left out")
    parser.add_argument("--setting", choices=list(SETTINGS), default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    setting = SETTINGS[args.setting]
    if args.alone:
        torch.set_num_threads(args.threads)
        print(json.dumps(ours(setting, args.device, args.steps, args.warmup)))
        return
    command = [sys.executable, "-m", "benchmarks.on_policy_step", "--alone"]
    for name in ("setting", "device", "steps", "warmup", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(args.rounds):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rounds["ours"].append(json.loads(done.stdout.splitlines()[-1]))
        if args.trl_python:
            rounds["trl"].append(trl(setting, args))
    results = {name: median(found) if found else None for name, found in rounds.items()}
    if args.trl_python:
        pairs = zip(rounds["ours"], rounds["trl"], strict=True)
        ratios = [one["tokens_per_second"] / theirs["tokens_per_second"] for one, theirs in pairs]
        results["speedup"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(name, "not installed" if result is None else json.dumps(result))


if __name__ == "__main__":
    main()
