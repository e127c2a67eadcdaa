"""The divergence against a naive float64 reference, its gradients, its numerics and what it must not do."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distill import scratch
from distill.cross_entropy import linear_cross_entropy, linear_logprobs
from distill.divergence import KINDS, Divergence, linear_divergence
from distill.errors import UserError
from distill.stage_config import DivergenceSettings
from distill.types import COLDEST

N, V, D, E = 7, 23, 5, 6
GROUPS = ((3, 17), (4, 20, 9))


def naive(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    merged_ids: tuple[tuple[int, ...], ...] = (),
    sampled_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """The specification: the definitions, written down over whole [N, V] distributions."""
    logits = student_hidden @ student_head.T
    p, q = (torch.softmax(x / temperature, -1) for x in (logits, teacher_hidden @ teacher_head.T))
    alone = [i for i in range(p.shape[1]) if all(i not in group for group in merged_ids)]
    p, q = (torch.cat([x[:, alone], *(x[:, list(g)].sum(-1, keepdim=True) for g in merged_ids)], -1) for x in (p, q))

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x.log() - y.log())).sum(-1)

    mixture = beta * q + (1 - beta) * p
    values = {
        "reverse_kl": lambda: kl(p, q),
        "forward_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(q, mixture) + (1 - beta) * kl(p, mixture),
        "skew_forward_kl": lambda: kl(q, mixture),
        "skew_reverse_kl": lambda: kl(p, beta * p + (1 - beta) * q),
    }[kind]()
    facts = {"reverse_kl": kl(p, q), "forward_kl": kl(q, p), "values": values}
    facts["student_entropy"], facts["teacher_entropy"] = (-(x * x.log()).sum(-1) for x in (p, q))
    if sampled_ids is not None:
        facts["sampled_logprob"] = torch.log_softmax(logits, -1).gather(-1, sampled_ids[:, None]).squeeze(-1)
    return facts | {"total": values.sum() if weights is None else (weights * values).sum()}


def make(dtype: torch.dtype = torch.float64, rows: int = N, scale: float = 1.5) -> list[Tensor]:
    """Student hidden and head (which require gradients), teacher hidden and head."""
    torch.manual_seed(0)
    shapes = (rows, D), (V, D), (rows, E), (V, E)
    inputs = [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in shapes]
    return [x.requires_grad_(i < 2) for i, x in enumerate(inputs)]


def weights_like(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.5, 0.0, 2.0, -1.0, 1.0, 0.25, 0.125], dtype=dtype)


def gradients(total: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, inputs[:2]))


@pytest.mark.parametrize("chunk_rows", [None, 1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_definition(kind: str, dtype: torch.dtype, tolerance: float, chunk_rows: int | None) -> None:
    """Values, facts, total and both gradients, over every combination of the options."""
    inputs, exact = make(dtype), [x.detach().double().requires_grad_(x.requires_grad) for x in make(dtype)]
    sampled_ids = torch.arange(N) * 3
    for (temperature, beta), weights, merged_ids, ids in itertools.product(
        ((1.0, 0.5), (0.6, 0.1), (1.7, 0.9)), (None, weights_like(dtype)), ((), GROUPS), (None, sampled_ids)
    ):
        ours = linear_divergence(
            *inputs,
            kind=kind,
            beta=beta,
            temperature=temperature,
            weights=weights,
            merged_ids=merged_ids,
            sampled_ids=ids,
            chunk_rows=chunk_rows,
        )
        spec = naive(
            *exact,
            kind=kind,
            beta=beta,
            temperature=temperature,
            weights=None if weights is None else weights.double(),
            merged_ids=merged_ids,
            sampled_ids=sampled_ids,
        )
        for name in ("values", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "total"):
            assert_close(getattr(ours, name), spec[name], tolerance)
        assert (ours.sampled_logprob is None) == (ids is None)
        if ours.sampled_logprob is not None:
            assert_close(ours.sampled_logprob, spec["sampled_logprob"], tolerance)
        for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
            assert mine.dtype == dtype
            assert_close(mine, theirs, tolerance)


def assert_close(ours: Tensor, spec: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest entry (and of 1)."""
    difference = (ours.detach().double() - spec.detach().double()).abs().max()
    assert difference <= tolerance * max(1.0, spec.abs().max().item()), difference


@pytest.mark.parametrize("merged_ids", [(), GROUPS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, temperature: float, merged_ids: tuple[tuple[int, ...], ...]) -> None:
    student_hidden, student_head, *teacher = make(rows=3, scale=0.8)

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        weights = weights_like(torch.float64)[2:5]
        options: dict[str, Any] = {"kind": kind, "beta": 0.3, "temperature": temperature, "merged_ids": merged_ids}
        return linear_divergence(hidden, head, *teacher, **options, weights=weights, chunk_rows=2).total

    assert torch.autograd.gradcheck(total, (student_hidden, student_head))


def test_pinned_numbers() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4), on paper; ln 2 + ln(1/3)/2 and so on."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    log_q = torch.tensor([[0.25], [0.75]], dtype=torch.float64).log()
    pinned = {
        "reverse_kl": 0.1438410362,
        "forward_kl": 0.1308120359,
        "jsd": 0.0338220756,
        "skew_forward_kl": 0.0353748906,
        "skew_reverse_kl": 0.0322692606,
    }
    for kind, value in pinned.items():
        assert linear_divergence(one, zero, one, log_q, kind=kind).values.item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind: str, dtype: torch.dtype) -> None:
    hidden, head = make(dtype, scale=3.0)[:2]
    ours = linear_divergence(hidden, head, hidden.detach(), head.detach(), kind=kind, merged_ids=GROUPS)
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    assert ours.values.abs().max() <= rounding
    assert ours.reverse_kl.abs().max() == 0
    assert ours.forward_kl.abs().max() == 0
    for gradient in gradients(ours.total, [hidden, head]):
        assert gradient.abs().max() <= 10 * rounding


@pytest.mark.parametrize("merged_ids", [(), GROUPS])
@pytest.mark.parametrize("teacher_scale", [1.0, 400.0])
@pytest.mark.parametrize("student_scale", [1.0, 400.0])
@pytest.mark.parametrize("kind", KINDS)
def test_underflow_is_not_nan(
    kind: str, student_scale: float, teacher_scale: float, merged_ids: tuple[tuple[int, ...], ...]
) -> None:
    """Probabilities far below the smallest float32, on either side or both, still give the exact number."""
    scales = (student_scale, 1, teacher_scale, 1)
    inputs = [
        (x.detach() * scale).requires_grad_(x.requires_grad)
        for x, scale in zip(make(torch.float32), scales, strict=True)
    ]
    ours = linear_divergence(*inputs, kind=kind, beta=0.2, merged_ids=merged_ids)
    double = linear_divergence(*(x.double() for x in inputs), kind=kind, beta=0.2, merged_ids=merged_ids)
    for name in ("values", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"):
        assert_close(getattr(ours, name), getattr(double, name), 2e-4)
    for mine, exact in zip(gradients(ours.total, inputs), gradients(double.total, inputs), strict=True):
        assert_close(mine, exact, 2e-4)


@pytest.mark.parametrize(("kind", "bound"), [("jsd", 0.6931472), ("skew_forward_kl", 2.302585)])
def test_the_bounded_kinds_stay_bounded_when_nothing_is_shared(kind: str, bound: float) -> None:
    """Disjoint one-hot distributions: the jsd is ln 2, the skewed KL is -ln(1 - 0.9)."""
    one, beta = torch.ones(1, 1), 0.5 if kind == "jsd" else 0.1
    student, teacher = torch.tensor([[0.0], [-500.0]]), torch.tensor([[-500.0], [0.0]])
    assert linear_divergence(one, student, one, teacher, kind=kind, beta=beta).values.item() == pytest.approx(bound)


def test_weight_zero_still_reports_but_does_not_teach() -> None:
    inputs = make()
    ours = linear_divergence(*inputs, kind="jsd", weights=weights_like(torch.float64))
    assert ours.values[1] > 0.01
    gradient_ND = gradients(ours.total, inputs)[0]
    assert gradient_ND[1].abs().max() == 0
    assert gradient_ND[[0, 2, 3, 4, 5, 6]].abs().amin(-1).min() > 0


def test_only_the_total_carries_a_gradient() -> None:
    inputs = make()
    ours = linear_divergence(*inputs, kind="jsd", sampled_ids=torch.zeros(N, dtype=torch.long))
    carries = [name for name in Divergence.__slots__ if getattr(ours, name).requires_grad]
    assert carries == ["total"]


def test_the_upstream_gradient_scales() -> None:
    inputs = make()
    total = linear_divergence(*inputs, kind="forward_kl").total
    for plain, scaled in zip(gradients(total, inputs), gradients(-2.5 * fresh(inputs), inputs), strict=False):
        assert_close(scaled, -2.5 * plain, 1e-12)


def fresh(inputs: list[Tensor]) -> Tensor:
    return linear_divergence(*inputs, kind="forward_kl").total


def test_gradients_accumulate_over_calls_and_over_two_uses_of_a_tied_head() -> None:
    """The embedding of a tied model is the head, and two micro-batches add up to the batch."""
    ids = torch.arange(N)
    _, head, teacher_hidden, teacher_head = make()
    mix = torch.randn(D, D, dtype=torch.float64)
    for tile in (slice(0, 3), slice(3, N)):
        hidden = torch.tanh(head[ids[tile]] @ mix)
        linear_divergence(hidden, head, teacher_hidden[tile], teacher_head, kind="reverse_kl").total.backward()
    assert head.grad is not None
    exact = head.detach().clone().requires_grad_()
    naive(torch.tanh(exact[ids] @ mix), exact, teacher_hidden, teacher_head)["total"].backward()
    assert exact.grad is not None
    assert_close(head.grad, exact.grad, 1e-12)


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_work_is_done_only_for_what_requires_a_gradient() -> None:
    """Each head is projected once; a frozen head (LoRA), frozen states and no_grad each save their product."""
    hidden, head, *teacher = make()
    student, project = 2 * N * V * D, 2 * N * V * D + 2 * N * V * E
    for trains_hidden, trains_head in itertools.product((True, False), (True, False)):
        hidden.requires_grad_(trains_hidden)
        head.requires_grad_(trains_head)

        def step() -> None:
            total = linear_divergence(hidden, head, *teacher, kind="jsd", chunk_rows=3).total
            if total.requires_grad:
                total.backward()

        hidden.grad = head.grad = None
        assert flops(step) == project + student * (trains_hidden + trains_head)
        assert (hidden.grad is not None, head.grad is not None) == (trains_hidden, trains_head)
    hidden.requires_grad_()
    head.requires_grad_()
    with torch.no_grad():
        assert flops(lambda: linear_divergence(hidden, head, *teacher, kind="jsd")) == project


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns, views included.

    The bytes that the tiles lie in count for themselves, and begin with nothing that an earlier call has left.
    """

    numel = num_bytes = 0

    def __init__(self) -> None:
        super().__init__()
        scratch._kept.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.uint8:
                self.num_bytes = max(self.num_bytes, tensor.numel())
            elif isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out

    def fits(self, most: int, *, tile: int, models: int, dtype: torch.dtype) -> bool:
        """No tensor of more than ``most`` elements, and of tiles alone: each model's in ``dtype``, and in float32 one
        for each and one more, and each model's again where ``dtype`` is narrower. Each begins on a line's start."""
        num_wide = models + 1 + (models if dtype.itemsize == 2 else 0)
        num_bytes = models * (tile * dtype.itemsize + 63) + num_wide * (tile * 4 + 63)
        return self.numel <= most and 0 < self.num_bytes <= num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_has_all_rows_times_the_vocabulary(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, vocab, chunk_rows = 256, 300, 8
    hidden, teacher_hidden = (torch.randn(rows, d).to(dtype) for d in (D, E))
    head, teacher_head = (torch.randn(vocab, d).to(dtype) for d in (D, E))
    hidden.requires_grad_()
    head.requires_grad_()
    with LargestTensor() as seen:
        ours = linear_divergence(
            hidden, head, teacher_hidden, teacher_head, kind=kind, merged_ids=((1, 2),), chunk_rows=chunk_rows
        )
        ours.total.backward()
    tile = vocab * chunk_rows
    assert seen.fits(max(2 * tile, vocab * E), tile=tile, models=2, dtype=dtype)  # as a float32 tile seen as 16 bits
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, head, torch.arange(rows), chunk_rows=chunk_rows).total.backward()
    assert seen.fits(max(tile, vocab * D), tile=tile, models=1, dtype=dtype)


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_inputs(kind: str, dtype: torch.dtype, chunk_rows: int | None) -> None:
    """Gradients in the inputs' dtype, near the exact ones of the same rounded inputs; values within a rounding of the
    difference between the models' logits."""
    inputs = make(dtype, scale=1.0)
    ours = linear_divergence(*inputs, kind=kind, chunk_rows=chunk_rows)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    spec = naive(*exact, kind=kind)
    assert ours.values.dtype == torch.float32
    assert_close(ours.values, spec["values"], torch.finfo(dtype).eps)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, theirs) < 5e-3


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("merged_ids", [(), ((3, 17),)])
@pytest.mark.parametrize("margin", [10.0, 20.0, 30.0])
@pytest.mark.parametrize("kind", KINDS)
def test_two_models_that_are_sure_of_one_token(
    kind: str, margin: float, merged_ids: tuple[tuple[int, ...], ...]
) -> None:
    """Their gradient is felt in full, though to float32 both probabilities are 1."""
    torch.manual_seed(0)
    sure, inputs = 3, [torch.randn(N, V) for _ in range(2)]
    for logits_NV in inputs:
        logits_NV[:, sure] = logits_NV.amax(-1) + margin
    options: dict[str, Any] = {"kind": kind, "beta": 0.3, "merged_ids": merged_ids}

    def gradient(loss: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        student_NV, teacher_NV = (x.to(dtype) for x in inputs)
        result = loss(student_NV.requires_grad_(), torch.eye(V, dtype=dtype), teacher_NV, torch.eye(V, dtype=dtype))
        (found_NV,) = torch.autograd.grad(result, student_NV)
        return found_NV.double()

    ours = gradient(lambda *x: linear_divergence(*x, **options).total, torch.float32)
    exact = gradient(lambda *x: naive(*x, **options)["total"], torch.float64)
    # That to the sure token is a difference of numbers near 1 to float64 as well; all of a row's have the sum 0.
    exact[:, sure] = 0
    exact[:, sure] = -exact.sum(-1)
    assert relative_error(ours, exact) < 1e-5
    assert relative_error(ours[:, sure], exact[:, sure]) < 1e-5


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_near_its_teacher_is_told_the_way(kind: str, beta: float) -> None:
    """Ratios of 1e-3, of which exp(x) - 1 of a share, a small part of that, would leave little in float32."""
    torch.manual_seed(0)
    student_NV = 3 * torch.randn(N, V)
    teacher_NV = student_NV + 1e-3 * torch.randn(N, V)
    exact_NV, eye = student_NV.double().requires_grad_(), torch.eye(V, dtype=torch.float64)
    spec = naive(exact_NV, eye, teacher_NV.double(), eye, kind=kind, beta=beta)["total"]
    ours = linear_divergence(student_NV.requires_grad_(), eye.float(), teacher_NV, eye.float(), kind=kind, beta=beta)
    (found_NV,), (expected_NV,) = torch.autograd.grad(ours.total, student_NV), torch.autograd.grad(spec, exact_NV)
    assert relative_error(found_NV, expected_NV) < 1e-3


def near_the_teacher(rows: int, vocab: int, width: int) -> list[Tensor]:
    """A bfloat16 student close to its teacher over a Zipf-like vocabulary, logits near 20: the end of a training."""
    torch.manual_seed(0)
    student_hidden, student_head = torch.randn(rows, width), torch.randn(vocab, width) * 5 / width**0.5
    student_hidden[:, 0] = 1
    student_head[:, 0] = 10 - torch.arange(1, vocab + 1).log()
    teacher_hidden = torch.cat([student_hidden, torch.randn(rows, width)], 1)
    teacher_head = torch.cat([student_head, torch.randn(vocab, width) * 0.1 / width**0.5], 1)
    inputs = [x.bfloat16() for x in (student_hidden, student_head, teacher_hidden, teacher_head)]
    return [x.requires_grad_(i < 2) for i, x in enumerate(inputs)]


@pytest.mark.parametrize("chunk_rows", [None, 10])
def test_the_signal_of_a_student_near_its_teacher_is_not_drowned_by_rounded_logits(chunk_rows: int | None) -> None:
    """More columns than are taken twice, several slices of the gradient; rounded logits alone are off by 20 %."""
    inputs = near_the_teacher(rows=32, vocab=12_000, width=64)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    ours = linear_divergence(*inputs, kind="reverse_kl", chunk_rows=chunk_rows)
    spec = naive(*exact)
    assert 1e-3 < spec["values"].mean() < 1e-2
    assert_close(ours.values, spec["values"], 5e-5)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert relative_error(mine, theirs) < 1e-2

    student, teacher = (inputs[i].detach() @ inputs[i + 1].detach().T for i in (0, 2))
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (student, teacher))
    slope_NV = log_p.exp() * (log_p - log_q - (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True))
    assert relative_error(slope_NV @ exact[1].detach(), gradients(naive(*exact)["total"], exact)[0]) > 0.2


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_model_of_32_bits_beside_one_of_16(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = near_the_teacher(rows=16, vocab=6_000, width=64)
    inputs = [x.detach().to(dtypes[i // 2]).requires_grad_(x.requires_grad) for i, x in enumerate(inputs)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    ours, spec = linear_divergence(*inputs, kind="jsd", chunk_rows=10), naive(*exact, kind="jsd")
    assert_close(ours.values, spec["values"], 5e-5)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert relative_error(mine, theirs) < 1e-2


@pytest.mark.parametrize("shift", [40.0, -40.0])
def test_what_all_logits_of_a_row_have_in_common_is_not_rounded_with_them(shift: float) -> None:
    """A softmax ignores it, and two models need not agree on it."""
    *student, teacher_hidden, teacher_head = near_the_teacher(rows=16, vocab=6_000, width=64)
    ones_ND, shift_VD = torch.ones_like(teacher_hidden[:, :1]), torch.full_like(teacher_head[:, :1], shift)
    inputs = [*student, torch.cat([teacher_hidden, ones_ND], 1), torch.cat([teacher_head, shift_VD], 1)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    ours, spec = linear_divergence(*inputs, kind="reverse_kl"), naive(*exact)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert relative_error(mine, theirs) < 1e-2


def test_autocast_does_not_reach_inside() -> None:
    inputs = make(torch.float32)
    plain = linear_divergence(*inputs, kind="reverse_kl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_divergence(*inputs, kind="reverse_kl")
    assert torch.equal(plain.values, cast.values)


def test_the_result_does_not_depend_on_the_tiles() -> None:
    inputs = make()
    whole, tiled = (linear_divergence(*inputs, kind="jsd", chunk_rows=rows) for rows in (None, 2))
    assert_close(tiled.values, whole.values, 1e-14)


def test_no_rows_is_a_total_of_zero_with_zero_gradients() -> None:
    """A micro-batch may have no response token left; its process must still take part in the step."""
    inputs = make(rows=0)
    total = linear_divergence(*inputs, kind="reverse_kl").total
    assert total.item() == 0
    assert [gradient.abs().sum().item() for gradient in gradients(total, inputs)] == [0, 0]


def test_a_compiled_model_around_it_gives_the_same_gradients() -> None:
    inputs = make()
    mix = torch.randn(D, D, dtype=torch.float64)

    def step(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        body = torch.tanh(hidden @ mix)
        return 2 * linear_divergence(body, head, teacher_hidden, teacher_head, kind="jsd", merged_ids=GROUPS).total

    plain = gradients(step(*inputs), inputs)
    compiled = gradients(torch.compile(step, backend="aot_eager")(*inputs), inputs)
    for mine, theirs in zip(compiled, plain, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_a_second_derivative_is_refused() -> None:
    inputs = make()
    first = torch.autograd.grad(fresh(inputs), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_cross_entropy_agrees_with_the_definition(
    dtype: torch.dtype, tolerance: float, weighted: bool, chunk_rows: int | None
) -> None:
    inputs, target_ids = make(dtype)[:2], torch.tensor([0, 3, 22, 5, 5, 1, 17])
    weights = weights_like(dtype) if weighted else None
    ours = linear_cross_entropy(*inputs, target_ids, weights=weights, chunk_rows=chunk_rows)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    log_p = torch.log_softmax(exact[0] @ exact[1].T, -1)
    values = -log_p.gather(-1, target_ids[:, None]).squeeze(-1)
    total = values.sum() if weights is None else (values * weights.double()).sum()
    assert_close(ours.values, values, tolerance)
    assert_close(ours.entropy, -(log_p.exp() * log_p).sum(-1), tolerance)
    assert_close(ours.total, total, tolerance)
    assert_close(linear_logprobs(*inputs, target_ids), -values, tolerance)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(total, exact), strict=True):
        assert_close(mine, theirs, tolerance)


def test_cross_entropy_gradcheck() -> None:
    hidden, head = make(rows=3)[:2]
    ids = torch.tensor([1, 22, 1])
    assert torch.autograd.gradcheck(lambda x, y: linear_cross_entropy(x, y, ids).total, (hidden, head))


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "revers_kl"}, "did you mean 'reverse_kl'"),
    ({"kind": "skewed_forward"}, "did you mean 'skew_forward_kl'"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"temperature": 9e-7}, "temperature is 9e-07 and must be finite and at least 1e-06"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"beta": 1.0}, "beta is 1.0"),
    ({"beta": 1e-17}, "beta is 1e-17"),  # 1 - beta is 1 in floating point
    ({"weights": torch.ones(N + 1)}, "weights has shape"),
    ({"merged_ids": ((1, V),)}, "merged_ids"),
    ({"merged_ids": ((1, 2), (2, 3))}, "none overlapping"),
    ({"merged_ids": ((),)}, "none empty"),
    ({"sampled_ids": torch.full((N,), V)}, f"ids {V} to {V}"),
    ({"sampled_ids": torch.zeros(N)}, "must be int64"),
    ({"chunk_rows": 0}, "chunk_rows is 0"),
    ({"student_hidden": torch.ones(N, D + 1, dtype=torch.float64)}, "student: hidden states of shape"),
    ({"teacher_hidden": torch.ones(N, E)}, "teacher: hidden states are torch.float32"),
    ({"teacher_hidden": torch.ones(N + 1, E, dtype=torch.float64)}, "7 rows and teacher_hidden 8"),
    ({"teacher_head": torch.ones(V + 2, E, dtype=torch.float64)}, "student_head has 23 .* teacher_head 25"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments: dict[str, Any] = {"kind": "jsd", **dict(zip(names, make(), strict=True)), **change}
    with pytest.raises(UserError, match=sentence):
        linear_divergence(**arguments)


@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_may_be_as_uneven_as_a_number_can_say(kind: str) -> None:
    for beta in (sys.float_info.epsilon, 1 - sys.float_info.epsilon):
        inputs = make()
        ours, spec = linear_divergence(*inputs, kind=kind, beta=beta), naive(*inputs, kind=kind, beta=beta)
        assert_close(ours.values, spec["values"], 1e-10)


def test_a_float16_gradient_keeps_its_digits_with_weights_of_one_and_the_division_in_the_scaled_total() -> None:
    """What docs/divergence.md advises: a float16 number below 6e-5 loses digits, and gradients are formed with the
    weights, before a scale reaches them."""
    inputs, exact = make(torch.float16, scale=0.5), [x.detach().double() for x in make(torch.float16, scale=0.5)]
    exact = [x.requires_grad_(i < 2) for i, x in enumerate(exact)]
    scale, num_tokens = 65536.0, 50_000

    def error(weight: float, factor: float) -> float:
        ours = linear_divergence(*inputs, kind="reverse_kl", weights=torch.full((N,), weight))
        spec = gradients(naive(*exact)["total"] * weight * factor, exact)
        pairs = zip(gradients(ours.total * factor, inputs), spec, strict=True)
        return max(float((mine.double() - theirs).norm() / theirs.norm()) for mine, theirs in pairs)

    assert error(1.0, scale / num_tokens) < 3e-3
    assert error(1 / num_tokens, 1.0) > 1e-2


def test_a_recipe_names_no_mixture_below_rounding_and_no_temperature_that_overflows() -> None:
    for below in ({"beta": 1e-17}, {"temperature": 1e-38}):
        with pytest.raises(ValueError, match=r"greater than or equal to 0\.000001"):
            DivergenceSettings(**below)  # refused before anything is sampled


@pytest.mark.parametrize("kind", KINDS)
def test_the_lowest_temperature_is_finite_in_float32(kind: str) -> None:
    options: dict[str, Any] = {"kind": kind, "temperature": COLDEST, "merged_ids": ((3, 5),)}
    inputs = [(10 * x).detach().requires_grad_() for x in make(dtype=torch.float32)]
    ours, exact = linear_divergence(*inputs, **options), linear_divergence(*(x.double() for x in inputs), **options)
    assert_close(ours.values, exact.values, 1e-5)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(ours.total, inputs))


def test_padded_rows_take_part_and_slicing_takes_them_out() -> None:
    """The one rule: what the heads have is the vocabulary. Slicing both is the way to leave the padding out."""
    student_hidden, student_head, teacher_hidden, teacher_head = make()
    whole = linear_divergence(student_hidden, student_head, teacher_hidden, teacher_head, kind="reverse_kl")
    real = linear_divergence(student_hidden, student_head[:20], teacher_hidden, teacher_head[:20], kind="reverse_kl")
    assert_close(whole.values, naive(student_hidden, student_head, teacher_hidden, teacher_head)["values"], 1e-12)
    sliced = naive(student_hidden, student_head[:20], teacher_hidden, teacher_head[:20])
    assert_close(real.values, sliced["values"], 1e-12)
    assert (whole.values - real.values).abs().max() > 1e-3
    real.total.backward()
    assert student_head.grad is not None
    assert student_head.grad[20:].abs().max() == 0


def test_triton_is_imported_only_where_it_runs() -> None:
    """The kernels are for a GPU: everything else works where Triton is not installed."""
    code = "import sys; sys.modules['triton'] = None; from distill.divergence import teacher_loss as loss, TeacherLoss"
    code += "; import torch; assert loss(torch.ones(1)) is TeacherLoss"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
