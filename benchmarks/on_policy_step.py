"""An on-policy distillation step: ours against TRL's DistillationTrainer, the same shapes, prompts and limits.

    python -m benchmarks.on_policy_step --json --trl-python /path/to/python

A teacher of 256 x 6 layers, a student of 128 x 4, a vocabulary of 128, random fp32 weights; 32 prompts of 20 to 32
tokens, up to 64 new tokens each, reverse KL, AdamW. Ours runs the loop that ``distill run`` runs. A step's seconds are
the median over ``--steps`` after ``--warmup``, tokens those of the responses. ``parts`` are generating, the teacher's
forward pass and the student's forward and backward pass, each measured alone on the tokens of the last step;
``wall_over_parts`` is the step's time over their sum. TRL runs in its own environment (``--trl-python``; else null).
The two take turns, each time in a new process, and the median of ``--rounds`` is printed: a machine's speed wanders.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill.config import GuardSettings, RunConfig
from distill.family import Shape
from distill.journal import Journal
from distill.model_config import StudentSettings
from distill.sampler import TransformersSampler
from distill.stage_config import OnPolicyStage, Optimiser
from distill.types import Prompt, Request, Rollout, Sampling
from pipelines.batches import AtOnce
from pipelines.crew import Crew
from pipelines.faculty import Faculty
from pipelines.guards import Guards
from pipelines.loop import run_stage
from pipelines.meter import Meter
from pipelines.phases import PHASES, Clock
from pipelines.stages import OnPolicy
from pipelines.tracker import UNTRACKED
from students.batch import collate
from students.ranks import ALONE
from students.student import Student
from teachers.local import LocalTeacher

VOCABULARY, STOP = 128, 1
TEACHER = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
STUDENT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
NUM_PROMPTS, SHORTEST, LONGEST, MAX_NEW = 32, 20, 32, 64


def model(shape: dict[str, int], seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, head_dim=32, intermediate_size=3 * shape["hidden_size"], eos_token_id=STOP, **shape
    )
    return Qwen3ForCausalLM(config)


def prompts(step: int) -> list[tuple[int, ...]]:
    """Ids of step ``step``'s prompts; no stop token among them."""
    draw = random.Random(step)
    return [
        tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(SHORTEST, LONGEST))) for _ in range(NUM_PROMPTS)
    ]


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

    def requests(self, step: int) -> list[Request]:
        sampling = Sampling(max_new_tokens=MAX_NEW)
        return [
            Request(
                Prompt(({"role": "user", "content": str(ids)},)), "think", "hard", ids, sampling, 1000 * step + place
            )
            for place, ids in enumerate(prompts(step))
        ]

    def sample(self, step: int) -> list[Rollout]:
        return self.crew.student_sampler.generate(self.requests(step))


def ours(steps: int, warmup: int) -> dict[str, Any]:
    teacher, learner = model(TEACHER, 0), model(STUDENT, 1)
    settings = StudentSettings(dtype="float32", gradient_checkpointing=False, micro_batch_tokens=None)
    student = Student(learner, settings, stop_ids=(STOP,))
    encoder = cast(Any, Ids())
    judge = LocalTeacher(teacher, name="teacher", batch_tokens=65536)
    sampler = TransformersSampler(learner, encoder, speaker="student")
    tutor = SimpleNamespace(
        name="teacher",
        shape=Shape.from_config(teacher.config.to_dict()),
        role=lambda role: role,
        hired=SimpleNamespace(judge=judge),
        candidate=SimpleNamespace(domains=()),
    )
    crew = cast(
        Crew,
        SimpleNamespace(
            encoder=encoder,
            teachers=Faculty(cast(Any, [tutor])),
            student=student,
            student_shape=Shape.from_config(learner.config.to_dict()),
            student_sampler=sampler,
            meter=Meter(),
            seed=0,
            ranks=ALONE,
        ),
    )
    stage = Fixed("on_policy", OnPolicyStage(steps=steps + warmup), crew, first_prompt=0)
    student.begin(Optimiser(learning_rate=1e-4, warmup_steps=0))
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), RunConfig())
        run_stage(
            stage,
            student,
            crew,
            journal,
            first_step=0,
            global_step=0,
            checkpoint=lambda done, ended: None,
            checkpoint_every=10**9,
            guards=Guards(GuardSettings(), stage="on_policy", checkpoints=Path(folder), history=[]),
            tracking=UNTRACKED,
            examine=lambda done: False,
            batches=AtOnce(stage, crew),
            clock=Clock(dict.fromkeys(PHASES, 1)),
        )
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        journal.close()
    measured = [json.loads(line) for line in lines][warmup:]
    rates = [line["length"] * line["num_responses"] / line["seconds"] for line in measured]

    rollouts = stage.sample(steps + warmup - 1)
    examples = stage.signal(rollouts).updates[0]
    batch = collate(examples, torch.device("cpu"))

    def forward_backward() -> None:
        rows, _ = student.rows(batch)
        (stage.loss(rows).total / batch.num_weighted).backward()
        learner.zero_grad()

    works: dict[str, Callable[[], object]] = {
        "sample": lambda: stage.sample(steps + warmup - 1),
        "score": lambda: judge.score(rollouts),
        "train": forward_backward,
    }
    parts = {name: median_seconds(work, steps) for name, work in works.items()}
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
    }


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def trl(python: str, steps: int, warmup: int, threads: int) -> dict[str, Any]:
    """TRL's trainer in its own environment; it imports nothing of ours, so it is told the numbers."""
    task = {
        "teacher": TEACHER,
        "student": STUDENT,
        "vocabulary": VOCABULARY,
        "stop": STOP,
        "max_new": MAX_NEW,
        "steps": steps,
        "warmup": warmup,
        "threads": threads,
        "prompts": [ids for step in range(steps + warmup) for ids in prompts(step)],
        "batch": NUM_PROMPTS,
    }
    script = Path(__file__).with_name("on_policy_step_trl.py")
    done = subprocess.run(
        [python, "-W", "ignore", str(script)], input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True
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
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.alone:
        torch.set_num_threads(args.threads)
        print(json.dumps(ours(args.steps, args.warmup)))
        return
    command = [sys.executable, "-m", "benchmarks.on_policy_step", "--alone"]
    for name in ("steps", "warmup", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(args.rounds):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rounds["ours"].append(json.loads(done.stdout.splitlines()[-1]))
        if args.trl_python:
            rounds["trl"].append(trl(args.trl_python, args.steps, args.warmup, args.threads))
    results = {name: median(found) if found else None for name, found in rounds.items()}
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(name, "not installed" if result is None else json.dumps(result))


if __name__ == "__main__":
    main()
