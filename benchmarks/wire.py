"""What the number type in which hidden states travel costs: the KL it causes at every response token.

    python -m benchmarks.wire

A server casts its states to the wire's type and the client casts them back, so the loss of a wire is that of the cast,
and no server is needed to measure it (tests/test_server.py sees the same from real ones). Two teachers in float32: the
embedded one, on its own responses in both modes, and a random Qwen3 with the real 151,936 rows whose logits spread like
those of a trained model (the one of ``benchmarks.teacher_signal``).

``teacher_kl``: KL(teacher || teacher over the wire). ``student_kl``: KL(student || teacher), the loss of on-policy
distillation, and by how much the wire changes it, on the mean (with its sign) and at most. It is taken for the embedded
teacher and two students: ``far``, the untrained nano, and ``near``, the teacher with 3 % of noise on every weight.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.teacher_signal import make_rollouts, make_teacher
from distill.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from distill.divergence import linear_divergence
from distill.encode import Encoder
from distill.family import resolve
from distill.sampler import TransformersSampler
from distill.types import MODES, Prompt, Rollout, Sampling
from teachers.local import LocalTeacher

NOISE = 0.03
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "e5m2 (not offered)": torch.float8_e5m2,
}


def load(checkpoint: Checkpoint, *, noise: float = 0.0) -> LocalTeacher:
    model = load_model(checkpoint, torch.float32, "cpu")
    torch.manual_seed(0)
    for parameter in model.parameters() if noise else ():
        parameter.mul_(1 + noise * torch.randn_like(parameter))
    return LocalTeacher(model, name=checkpoint.name, batch_tokens=16384)


def states(model: LocalTeacher, rollouts: Sequence[Rollout]) -> Tensor:
    return torch.cat([signal.states_Rd for signal in model.score(rollouts)])


def losses(teacher: LocalTeacher, rollouts: Sequence[Rollout], students: dict[str, LocalTeacher]) -> dict[str, Any]:
    states_Nd, head_VD = states(teacher, rollouts), teacher.head_VD
    results: dict[str, Any] = {}
    for wire, dtype in DTYPES.items():
        wired_Nd = states_Nd.to(dtype).to(states_Nd.dtype)
        # The wired teacher in the student's place, in float64: the numbers are tiny.
        pair = (wired_Nd.double(), head_VD.double(), states_Nd.double(), head_VD.double())
        caused_N = linear_divergence(*pair, kind="forward_kl").values
        results[wire] = {"teacher_kl": {"mean": float(caused_N.mean()), "max": float(caused_N.max())}}
        for name, student in students.items():
            own = states(student, rollouts), student.head_VD
            exact_N, wired_N = (
                linear_divergence(*own, teacher_Nd, head_VD, kind="reverse_kl").values
                for teacher_Nd in (states_Nd, wired_Nd)
            )
            change_N = wired_N - exact_N
            results[wire][f"student_kl, {name}"] = {
                "mean": float(exact_N.mean()),
                "change_mean": float(change_N.mean()),
                "change_max": float(change_N.abs().max()),
            }
    return results


def embedded(num: int) -> dict[str, Any]:
    checkpoint = open_checkpoint(resolve("tiny", role="teacher"))
    teacher, encoder = load(checkpoint), Encoder(load_tokenizer(checkpoint))
    students = {"far": load(open_checkpoint(resolve("nano", role="student"))), "near": load(checkpoint, noise=NOISE)}
    requests = [
        encoder.request(
            Prompt(({"role": "user", "content": f"{number % 10}+4*{number % 7}-2="},)),
            mode=MODES[number % 2],
            sampling=Sampling(96),
            seed=number,
        )
        for number in range(num)
    ]
    rollouts = TransformersSampler(teacher.model, encoder, speaker="teacher").generate(requests)
    return losses(teacher, rollouts, students)


def random(num: int, vocabulary: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        teacher = load(make_teacher(Path(folder), vocabulary=vocabulary, max_positions=256))
        return losses(teacher, make_rollouts(num, 52, 96, vocabulary), {})


@torch.no_grad()
def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__.split("\n")[0])
    arguments.add_argument("--embedded-sequences", type=int, default=512)
    arguments.add_argument("--random-sequences", type=int, default=8)
    arguments.add_argument("--vocab", type=int, default=151_936)
    args = arguments.parse_args()
    results = {"embedded": embedded(args.embedded_sequences), "random": random(args.random_sequences, args.vocab)}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
