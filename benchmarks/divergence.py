"""The divergence's time, memory and error against its peers, on random states and heads of real shapes.

    python -m benchmarks.divergence --rows 512 --student-dim 1024 --teacher-dim 4096 --kind reverse_kl --dtype float32

One step is forward and backward with both gradients. Each contender runs in a process of its own, one after the other:

- ``ours``: ``distill.divergence.linear_divergence``
- ``naive``: whole [N, V] logits and plain autograd, softmax in float32
- ``cross_entropy``: ``distill.cross_entropy.linear_cross_entropy`` of the student, which has no teacher to project
- ``trl``: TRL's chunked divergence (``pip install trl``); has no skewed kinds
- ``liger``: Liger's chunked JSD (``pip install liger-kernel``); has no skewed kinds and takes its softmax in the
  inputs' dtype. Its hard loss is off.

With ``--device cuda`` there are more. ``ours_torch`` is ``ours`` without the fused kernels. ``tile_fused`` and
``tile_torch`` are the mathematics of one tile of ``--rows`` rows alone, the former with the bandwidth at which the
kernels read the logits and write the gradient. ``ceilings`` are what the machine reaches in a large product and a large
copy. ``tflops`` counts the products alone.

``seconds`` is the median after one uncounted step, ``cpu_seconds`` that of the processor time of all threads, which
says more on a machine that others use too. ``peak_extra_bytes`` is the peak memory of the uncounted step beyond
the inputs and the returned gradients. ``grad_error`` is the larger of the relative errors (Frobenius norm) of the two
gradients of the first ``--error-rows`` rows against float64 arithmetic on the same inputs. A peer that is not
installed, or does not have the kind, is null.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import ceilings
from distill.cross_entropy import linear_cross_entropy
from distill.device import finish
from distill.divergence import KINDS, TeacherLoss, linear_divergence
from distill.tiles import tiled_total

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Student hidden [N, d_s] and head [V, d_s], teacher hidden [N, d_t] and head [V, d_t]."""

Loss = Callable[[Inputs], Tensor]
Result = dict[str, float | None]
Results = dict[str, Result | None]
GKD_KINDS = ("reverse_kl", "forward_kl", "jsd")
LOGIT_STD = 3.0


def divergence_of_logits(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """The definition, summed over the rows; logits [N, V] of any precision."""
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)

    def mixture(weight_of_q: float) -> Tensor:
        log_weights = torch.tensor([1 - weight_of_q, weight_of_q], dtype=log_p.dtype).log().tolist()
        return torch.logaddexp(log_p + log_weights[0], log_q + log_weights[1])

    def kl(log_x: Tensor, log_y: Tensor) -> Tensor:
        return (log_x.exp() * (log_x - log_y)).sum()

    if kind == "jsd":
        log_m = mixture(beta)
        return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    other = {"skew_forward_kl": beta, "skew_reverse_kl": 1 - beta}
    if kind in ("forward_kl", "skew_forward_kl"):
        return kl(log_q, mixture(other[kind]) if kind in other else log_p)
    return kl(log_p, mixture(other[kind]) if kind in other else log_q)


def contender(name: str, kind: str, beta: float) -> Loss | None:
    """The loss that one step of ``name`` computes; None where it is not installed or does not have ``kind``."""

    def ours(x: Inputs) -> Tensor:
        return linear_divergence(*x, kind=kind, beta=beta).total

    def ours_torch(x: Inputs) -> Tensor:
        weights_N = torch.ones(len(x[0]), device=x[0].device)
        loss = TeacherLoss(kind, beta, 1.0, groups=[], sampled_ids_N=None, like_N=weights_N)
        return tiled_total([(x[0], x[1]), (x[2], x[3])], loss, weights_N, None)

    def naive(x: Inputs) -> Tensor:
        with torch.no_grad():
            teacher = (x[2] @ x[3].T).float()
        return divergence_of_logits((x[0] @ x[1].T).float(), teacher, kind, beta)

    def cross_entropy(x: Inputs) -> Tensor:
        return linear_cross_entropy(x[0], x[1], torch.arange(len(x[0]), device=x[0].device)).total

    own = {"ours": ours, "ours_torch": ours_torch, "naive": naive, "cross_entropy": cross_entropy}
    if name in own:
        return own[name]
    module = {"trl": "trl", "liger": "liger_kernel"}[name]
    if kind not in GKD_KINDS or importlib.util.find_spec(module) is None:
        return None
    weight_of_teacher = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": beta}[kind]
    return (trl if name == "trl" else liger)(weight_of_teacher)


def trl(beta: float) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Inputs) -> Tensor:
        values_N, _ = ChunkedDivergenceFunction.apply(x[0], x[1], None, x[2], x[3], None, beta)
        total: Tensor = values_N.sum()
        return total

    return loss


def liger(beta: float) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

    def loss(x: Inputs) -> Tensor:
        labels_N = torch.zeros(len(x[0]), dtype=torch.long, device=x[0].device)
        mean: Tensor = module(*x, labels_N)
        return mean * len(x[0])

    return loss


def make_inputs(args: argparse.Namespace) -> Inputs:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def head(width: int) -> Tensor:
        weight = torch.empty(args.vocab, width, dtype=dtype, device=args.device)
        for rows in weight.split(8192):  # a whole fp32 copy would hide the step's own peak
            rows.copy_(torch.randn(rows.shape, device=args.device) * (LOGIT_STD / width**0.5))
        return weight

    def hidden(width: int) -> Tensor:
        return torch.randn(args.rows, width, device=args.device).to(dtype)

    student = hidden(args.student_dim).requires_grad_(), head(args.student_dim).requires_grad_()
    return *student, hidden(args.teacher_dim), head(args.teacher_dim)


def step(loss: Loss, inputs: Inputs) -> list[Tensor]:
    for x in inputs:
        x.grad = None
    torch.autograd.backward(loss(inputs))
    return [x.grad for x in inputs if x.grad is not None]


def memory(device: str, field: str) -> int:
    """Bytes in use (VmRSS) or their peak since the last reset (VmHWM)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def exact_gradients(name: str, inputs: Inputs, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Gradients to student hidden and head in float64; the heads are widened slice by slice."""
    hidden_ND, head_VD, teacher_NE, teacher_VE = (x.detach() for x in inputs)

    def project(states: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([states.double() @ rows.double().T for rows in weight.split(8192)], -1)

    logits_NV = project(hidden_ND, head_VD).requires_grad_()
    if name == "cross_entropy":
        targets = torch.arange(len(hidden_ND), device=hidden_ND.device)
        total = torch.nn.functional.cross_entropy(logits_NV, targets, reduction="sum")
    else:
        total = divergence_of_logits(logits_NV, project(teacher_NE, teacher_VE), kind, beta)
    (slope_NV,) = torch.autograd.grad(total, logits_NV)
    slices = list(zip(slope_NV.split(8192, -1), head_VD.split(8192), strict=True))
    grad_hidden_ND = torch.stack([slope @ rows.double() for slope, rows in slices]).sum(0)
    return grad_hidden_ND, torch.cat([slope.T @ hidden_ND.double() for slope, _ in slices])


def grad_error(name: str, loss: Loss, inputs: Inputs, args: argparse.Namespace) -> float:
    rows = args.error_rows
    hidden_ND, head_VD, teacher_NE, teacher_VE = (x.detach() for x in inputs)
    few = hidden_ND[:rows].requires_grad_(), head_VD.requires_grad_(), teacher_NE[:rows], teacher_VE
    pairs = zip(step(loss, few), exact_gradients(name, few, args.kind, args.beta), strict=True)
    return max(float((ours.double() - exact).norm() / exact.norm()) for ours, exact in pairs)


def measure(name: str, args: argparse.Namespace) -> Result | None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if name == "ceilings":
        return dict(ceilings(args.device, getattr(torch, args.dtype)))
    return measure_tile(name, args) if name.startswith("tile_") else measure_step(name, args)


def measure_step(name: str, args: argparse.Namespace) -> Result | None:
    loss = contender(name, args.kind, args.beta)
    if loss is None:
        return None
    inputs = make_inputs(args)
    step(loss, tuple(x[:8].detach().requires_grad_(x.requires_grad) for x in inputs))  # type: ignore[arg-type]
    for x in inputs:
        x.grad = None
    reset_peak(args.device)
    before = memory(args.device, "VmRSS")
    grads = step(loss, inputs)
    peak = memory(args.device, "VmHWM") - before - sum(grad.nbytes for grad in grads)
    del grads
    seconds, cpu_seconds = times(lambda: step(loss, inputs), args)
    error = grad_error(name, loss, inputs, args) if args.error_rows else None
    result = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_extra_bytes": peak, "grad_error": error}
    if args.device == "cuda":
        teacher_flops = 0 if name == "cross_entropy" else 2 * args.teacher_dim
        result["tflops"] = (6 * args.student_dim + teacher_flops) * args.vocab * args.rows / seconds / 1e12
    return result


def times(call: Callable[[], object], args: argparse.Namespace) -> tuple[float, float]:
    """Medians of wall time and of the process's processor time."""
    pairs = []
    for _ in range(args.repeats):
        finish(torch.device(args.device))
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        finish(torch.device(args.device))
        pairs.append((time.perf_counter() - start, time.process_time() - cpu_start))
    seconds, cpu_seconds = zip(*pairs, strict=True)
    return statistics.median(seconds), statistics.median(cpu_seconds)


def measure_tile(name: str, args: argparse.Namespace) -> Result:
    """The mathematics of one tile of float32 logits, the gradient in ``--dtype``."""
    from distill.fused import FusedTeacherLoss

    loss_class = {"tile_fused": FusedTeacherLoss, "tile_torch": TeacherLoss}[name]
    weights_C = torch.ones(args.rows, device=args.device)
    logits = [LOGIT_STD * torch.randn(args.rows, args.vocab, device=args.device) for _ in range(2)]
    spare = [torch.empty_like(logits[0]) for _ in range(3)] if loss_class is TeacherLoss else []
    gradient_CV = torch.empty_like(logits[0], dtype=getattr(torch, args.dtype))
    loss = loss_class(args.kind, args.beta, 1.0, groups=[], sampled_ids_N=None, like_N=weights_C)
    rows = slice(0, args.rows)

    def form() -> None:
        if isinstance(loss, FusedTeacherLoss):
            loss.form_tile_(rows, logits, weights_C, gradient_CV)
        else:
            loss.form_(rows, logits, weights_C[:, None], spare)
            gradient_CV.copy_(logits[0])

    form()
    seconds, _ = times(form, args)
    passes = 2 if args.kind in ("reverse_kl", "forward_kl") else 3
    num_bytes = passes * sum(x.nbytes for x in logits) + gradient_CV.nbytes
    return {"seconds": seconds, "gigabytes_per_second": num_bytes / seconds / 1e9 if name == "tile_fused" else None}


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.divergence", description=__doc__.split("\n")[0])
    arguments.add_argument("--rows", type=int, default=512)
    arguments.add_argument("--student-dim", type=int, default=1024)
    arguments.add_argument("--teacher-dim", type=int, default=4096)
    arguments.add_argument("--vocab", type=int, default=151_936)
    arguments.add_argument("--kind", choices=list(KINDS), default="reverse_kl")
    arguments.add_argument("--beta", type=float, default=0.5)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--threads", type=int, help="default: torch's own number")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--error-rows", type=int, default=64, help="0 leaves the error out (null)")
    arguments.add_argument("--only", nargs="+", choices=CONTENDERS + GPU_CONTENDERS)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--alone", choices=CONTENDERS + GPU_CONTENDERS, help=argparse.SUPPRESS)
    return arguments


CONTENDERS = ("ours", "naive", "cross_entropy", "trl", "liger")
GPU_CONTENDERS = ("ours_torch", "tile_fused", "tile_torch", "ceilings")


def main() -> None:
    args = parser().parse_args()
    if args.alone:
        print(json.dumps(measure(args.alone, args)))
        return
    results: Results = {}
    for name in args.only or CONTENDERS + (GPU_CONTENDERS if args.device == "cuda" else ()):
        command = [sys.executable, "-m", "benchmarks.divergence", *sys.argv[1:], "--alone", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        if not args.json:
            print(f"{name:14}", line(results[name]), flush=True)
    if args.json:
        print(json.dumps(results))


UNITS = {
    "seconds": (1, ".3f", "s"),
    "cpu_seconds": (1, ".3f", "s of processor time"),
    "peak_extra_bytes": (1e9, ".2f", "GB extra"),
    "grad_error": (1, ".1e", "gradient error"),
    "tflops": (1, ".1f", "TFLOP/s"),
    "gigabytes_per_second": (1, ".0f", "GB/s"),
}


def line(result: Result | None) -> str:
    if result is None:
        return "not installed, or does not have this kind"
    parts = []
    for key, value in result.items():
        scale, shape, unit = UNITS[key]
        if value is not None:
            parts.append(f"{value / scale:{shape}} {unit}")
    return "   ".join(parts)


if __name__ == "__main__":
    main()
