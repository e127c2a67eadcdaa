"""An optimiser step of the published shapes: time, share of what a large product reaches, and memory by the formula.

    python -m benchmarks.student_step --student 0.6B --student 4B --device cuda --json

Random weights in bf16 with fp32 masters, reverse KL to a teacher of the 8B shape whose states are given. A step is
``--sequences`` of ``--prompt`` and ``--response`` tokens, in micro-batches of ``--micro-batch-tokens``. The median of
``--steps`` after two that do not count. ``tflops`` are model FLOPs (recomputed activations are not counted), of them
``share_of_product`` what a large product reaches. ``peak_bytes`` is the allocator's peak, ``formula_bytes`` that of
``distill.memory``. ``variant`` is checkpointing, whether its activations are kept, or 8-bit AdamW.
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any, cast

import torch

from benchmarks.machine import ceilings, median_seconds, random_model
from distill.config import RunConfig
from distill.costs import sequence_flops
from distill.divergence import linear_divergence
from distill.family import SIZES
from distill.memory import Load, student_memory
from distill.model_config import StudentSettings, TeacherSettings
from distill.stage_config import Optimiser
from distill.types import Example, HiddenStates, Prompt, Request, Rollout, Sampling
from students.loss import Felt, Rows
from students.student import Student

TEACHER = SIZES["8B"]
VARIANTS: dict[str, dict[str, Any]] = {
    "checkpointed": {},
    "kept": {"gradient_checkpointing": False},
    "8bit": {"adamw": "8bit"},
}


def example(seed: int, num_prompt: int, num_response: int, vocabulary: int, device: str) -> Example:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (num_prompt + num_response,), generator=draw).tolist()
    request = Request(
        Prompt(({"role": "user", "content": "?"},)),
        "think",
        "hard",
        tuple(ids[:num_prompt]),
        Sampling(num_response),
        seed,
    )
    rollout = Rollout(
        request=request,
        response_ids=tuple(ids[num_prompt:]),
        forced=(False,) * num_response,
        logprobs=(0.0,) * num_response,
        finish_reason="length",
        speaker="student",
    )
    states = torch.randn(num_response, TEACHER.width, dtype=torch.bfloat16, device=device)
    return Example(rollout, HiddenStates(states, "8B"))


def measure(name: str, variant: str, arguments: argparse.Namespace, product_tflops: float) -> dict[str, float]:
    shape, device = SIZES[name], arguments.device
    settings = StudentSettings(
        dtype="bfloat16", micro_batch_tokens=arguments.micro_batch_tokens, **cast(Any, VARIANTS[variant])
    )
    config = RunConfig(student=settings, teacher=TeacherSettings(model="8B", backend="vllm"), sampler_tokens=1024)
    num_prompt, num_response = arguments.prompt, arguments.response
    load = Load(arguments.micro_batch_tokens, arguments.sequences * num_response)
    formula = student_memory(config, shape, TEACHER, device=device, load=load)
    gc.collect()  # the student before holds its memory until then
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    student = Student(random_model(shape, seed=0, dtype=torch.bfloat16, device=device), settings, stop_ids=[1])
    student.begin(Optimiser(learning_rate=1e-6, warmup_steps=0))
    head_VD = torch.randn(shape.vocabulary, TEACHER.width, dtype=torch.bfloat16, device=device).mul_(0.02)
    examples = [
        example(seed, num_prompt, num_response, shape.vocabulary, device) for seed in range(arguments.sequences)
    ]

    def loss(rows: Rows) -> Felt:
        assert isinstance(rows.batch.signal, HiddenStates)
        felt = linear_divergence(rows.hidden_ND, rows.head_VD, rows.batch.signal.states_Rd, head_VD, kind="reverse_kl")
        return Felt(felt.total, {"reverse_kl": felt.reverse_kl})

    def step() -> None:
        student.step(examples, loss, step=0, num_steps=1, where="a benchmark")

    step()
    seconds = median_seconds(step, arguments.steps, device)
    peak = torch.cuda.max_memory_allocated() - before
    passes = 3 * (sequence_flops(shape, num_prompt, num_response) - 2 * shape.vocabulary * shape.width * num_prompt)
    flops = arguments.sequences * (passes + 2 * shape.vocabulary * TEACHER.width * num_response)
    tflops = flops / seconds / 1e12
    return {
        "seconds": seconds,
        "tokens_per_second": arguments.sequences * (num_prompt + num_response) / seconds,
        "tflops": tflops,
        "share_of_product": tflops / product_tflops,
        "peak_bytes": peak,
        "formula_bytes": formula.stays + formula.training,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.student_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--student", choices=[size for size in SIZES if "-" not in size], action="append", required=True
    )
    parser.add_argument("--variant", choices=list(VARIANTS), action="append", help="default: checkpointed, kept")
    parser.add_argument("--device", choices=["cuda"], default="cuda", help="only a GPU counts its memory exactly")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=896)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line instead of an indented document")
    arguments = parser.parse_args()
    most = ceilings(arguments.device, torch.bfloat16)
    found: dict[str, Any] = {"ceilings": most}
    for name in arguments.student:
        found[name] = {
            variant: measure(name, variant, arguments, most["tflops"])
            for variant in arguments.variant or ["checkpointed", "kept"]
        }
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
