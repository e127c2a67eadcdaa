"""The fused kernels against the naive float64 reference: in Triton's interpreter, or on a GPU where there is one.

The interpreter runs a kernel's operations one by one in numpy: it shows that the mathematics is right, not that the
compiled kernel is. The compiler itself needs no GPU, so that every kernel is compiled for a Hopper GPU too.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from test_divergence import GROUPS, assert_close, gradients, naive
from torch import Tensor

from distill import divergence, logits, tiles
from distill.divergence import KINDS, TeacherLoss, linear_divergence

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)

from distill.fused import BLOCK_V, FusedTeacherLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D, E = 3, 5, 6
V = BLOCK_V + 77  # the last block is mostly empty


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "teacher_loss", lambda _: FusedTeacherLoss)


def make(vocab: int = V, rows: int = N, scale: float = 1.5) -> list[Tensor]:
    """Student hidden and head (which require gradients), teacher hidden and head; all float32."""
    torch.manual_seed(0)
    inputs = [scale * torch.randn(shape) for shape in ((rows, D), (vocab, D), (rows, E), (vocab, E))]
    return [x.to(DEVICE).requires_grad_(i < 2) for i, x in enumerate(inputs)]


def double(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


@pytest.mark.parametrize("vocab", [V, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_definition(kind: str, vocab: int) -> None:
    inputs, sampled_ids = make(vocab), torch.tensor([3, 49, 20], device=DEVICE)
    for (temperature, beta), weighted, merged_ids in itertools.product(
        ((1.0, 0.5), (0.6, 0.1), (1.7, 0.9)), (False, True), ((), GROUPS)
    ):
        weights = torch.tensor([0.5, 0.0, -2.0], device=DEVICE) if weighted else None
        options = {"kind": kind, "beta": beta, "temperature": temperature, "merged_ids": merged_ids}
        ours = linear_divergence(*inputs, **options, weights=weights, sampled_ids=sampled_ids, chunk_rows=2)
        exact = double(inputs)
        spec = naive(*exact, **options, weights=None if weights is None else weights.double(), sampled_ids=sampled_ids)
        for name in spec:
            assert_close(getattr(ours, name), spec[name], 2e-4)
        for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
            assert_close(mine, theirs, 2e-4)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind: str, scale: float) -> None:
    hidden, head = make(scale=scale)[:2]
    ours = linear_divergence(hidden, head, hidden.detach(), head.detach(), kind=kind, merged_ids=GROUPS)
    assert ours.values.abs().max() <= 1e-6
    for gradient in gradients(ours.total, [hidden, head]):
        assert gradient.abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("merged_ids", [(), GROUPS])
@pytest.mark.parametrize(("student_scale", "teacher_scale"), [(400.0, 1.0), (1.0, 400.0), (400.0, 400.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_underflow_is_not_nan(
    kind: str, student_scale: float, teacher_scale: float, merged_ids: tuple[tuple[int, ...], ...]
) -> None:
    scales = (student_scale, 1, teacher_scale, 1)
    inputs = [(x.detach() * scale).requires_grad_(x.requires_grad) for x, scale in zip(make(200), scales, strict=True)]
    ours = linear_divergence(*inputs, kind=kind, beta=0.2, merged_ids=merged_ids)
    exact = double(inputs)
    spec = linear_divergence_in_torch(exact, kind, merged_ids)
    for name in ("values", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"):
        assert_close(getattr(ours, name), getattr(spec, name), 2e-4)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec.total, exact), strict=True):
        assert_close(mine, theirs, 2e-4)


def linear_divergence_in_torch(
    inputs: list[Tensor], kind: str, merged_ids: tuple[tuple[int, ...], ...]
) -> divergence.Divergence:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "teacher_loss", lambda _: TeacherLoss)
        return linear_divergence(*inputs, kind=kind, beta=0.2, merged_ids=merged_ids)


@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("beta", [sys.float_info.epsilon, 1 - sys.float_info.epsilon])
def test_mixtures_that_float32_cannot_tell_from_one_side(kind: str, beta: float) -> None:
    inputs = make(50)
    ours, exact = linear_divergence(*inputs, kind=kind, beta=beta), double(inputs)
    spec = naive(*exact, kind=kind, beta=beta)
    assert_close(ours.values, spec["values"], 1e-5)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert_close(mine, theirs, 1e-5)


STOPS = (7, BLOCK_V + 9)
"""Stop ids, in different blocks."""


@pytest.mark.parametrize("sure_of_one", [True, False])
@pytest.mark.parametrize("margin", [0.0, 10.0, 20.0, 25.0, 40.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_response_is_felt_in_full(kind: str, margin: float, sure_of_one: bool) -> None:
    """Both are sure that the response ends, and hold different stop ids the likelier, or the same."""
    torch.manual_seed(0)
    rows, width = 4, 16
    models = [(torch.randn(rows, width), 0.5 * torch.randn(V, width)) for _ in range(2)]
    for (hidden, head), stops in zip(models, (STOPS, STOPS if sure_of_one else STOPS[::-1]), strict=True):
        for stop, logit in zip(stops, (margin, -margin / 2), strict=True):
            head[stop] = torch.linalg.lstsq(hidden, torch.full((rows, 1), logit)).solution[:, 0]
    inputs = [
        x.to(DEVICE).requires_grad_(of_student)
        for model, of_student in zip(models, (True, False), strict=True)
        for x in model
    ]
    sampled_ids = torch.tensor([7, 3, *STOPS], device=DEVICE)
    for temperature in (1.0, 1.3):
        options = {"kind": kind, "beta": 0.3, "temperature": temperature, "merged_ids": (STOPS,)}
        ours = linear_divergence(*inputs, **options, sampled_ids=sampled_ids)
        exact = double(inputs)
        spec = naive(*exact, **options, sampled_ids=sampled_ids)
        for name in spec:
            assert_close(getattr(ours, name), spec[name], 1e-5)
        if spec["values"].max() > 1e-6:
            for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
                assert (mine - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("first", [0, BLOCK_V])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_block_can_be_one_action(kind: str, first: int) -> None:
    """Its members beside the first, and all of another block, are nothing to the sums."""
    inputs = make()
    merged_ids = (tuple(range(first, min(first + BLOCK_V, V)))[::-1], (BLOCK_V - first,))
    ours, exact = linear_divergence(*inputs, kind=kind, merged_ids=merged_ids), double(inputs)
    spec = naive(*exact, kind=kind, merged_ids=merged_ids)
    assert_close(ours.values, spec["values"], 1e-5)
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_can_be_learnt_where_all_is_one_action(kind: str) -> None:
    inputs = make(50)
    ours = linear_divergence(*inputs, kind=kind, merged_ids=(tuple(range(50)),))
    for fact in (ours.values, ours.student_entropy, *gradients(ours.total, inputs)):
        assert fact.abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [2, 3])
def test_what_is_not_a_number_is_not_hidden(kind: str, place: int) -> None:
    """The step is to stop on it, also where it is that of a merged id."""
    inputs = make(60)
    with torch.no_grad():
        inputs[1][place, 0] = torch.nan
    ours = linear_divergence(*inputs, kind=kind, merged_ids=GROUPS)
    assert ours.values.isnan().all() and ours.total.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients(dtype: torch.dtype) -> None:
    """They have memory of their own, beside the student's logits."""
    student, student_head, teacher, teacher_head = (x.detach() for x in make())
    weights_N = torch.tensor([1.0, 0.5, 0.0], device=DEVICE)

    def form(gradient_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tiles = [student @ student_head.T, teacher @ teacher_head.T]
        gradient_NV = torch.empty_like(tiles[0], dtype=gradient_dtype) if gradient_dtype == dtype else tiles[0]
        groups = [torch.tensor(ids, device=DEVICE) for ids in GROUPS]
        loss = FusedTeacherLoss("jsd", 0.3, 1.0, groups=groups, sampled_ids_N=None, like_N=weights_N)
        loss.form_tile_(slice(0, N), tiles, weights_N, gradient_NV)
        return loss.facts_FN, gradient_NV

    facts_FN, gradient_NV = form(dtype)
    facts_in_place_FN, gradient_in_place_NV = form(torch.float32)
    assert torch.equal(facts_FN, facts_in_place_FN)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    torch.testing.assert_close(gradient_NV.float(), gradient_in_place_NV, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert gradient_in_place_NV[2].abs().max() == 0 < gradient_in_place_NV[1].abs().max()


@pytest.mark.parametrize("loss", [FusedTeacherLoss, TeacherLoss])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_products_of_16_bit_inputs_in_float32(
    monkeypatch: pytest.MonkeyPatch, loss: type[TeacherLoss], chunk_rows: int | None
) -> None:
    """The way of 16-bit inputs through a GPU, its products imitated where there is none."""

    def multiply(x: Tensor, y: Tensor, product: Tensor) -> None:
        assert (x.dtype, product.dtype) == (torch.bfloat16, torch.float32)
        torch.mm(x.float(), y.float(), out=product)

    if DEVICE == "cpu":
        for module in (logits, tiles):
            monkeypatch.setattr(module, "product_dtype", lambda x: torch.float32)
            monkeypatch.setattr(module, "multiply", multiply)
    monkeypatch.setattr(divergence, "teacher_loss", lambda _: loss)
    inputs = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in make(300)]
    exact = double(inputs)
    ours = linear_divergence(*inputs, kind="jsd", merged_ids=GROUPS, chunk_rows=chunk_rows)
    spec = naive(*exact, kind="jsd", merged_ids=GROUPS)
    assert_close(ours.values, spec["values"], 1e-5)  # nothing was rounded
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(spec["total"], exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 5e-3 * theirs.norm()


def test_every_kernel_compiles_for_a_hopper_gpu() -> None:
    """To machine code and without spilling registers to memory; needs Triton and its assembler, and no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert len(compiled) == 2 + 3 + 5
    assert {name: spills for name, spills in compiled.items() if spills} == {}


COMPILE = """
import json, pathlib, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill import fused, kernels
from distill.divergence import KINDS

SCALARS = {"num_rows": "i32", "num_vocab": "i32", "inverse_temperature": "fp32", "beta": "fp32"}
DISASSEMBLER = triton.knobs.nvidia.cuobjdump.path

def spilled_bytes(kernel, **constants):
    constants["BLOCK"] = fused.BLOCK_V
    types = {"gradient_ptr": "*bf16", **SCALARS, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused.NUM_WARPS[kernel]})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([DISASSEMBLER, "--dump-resource-usage", file.name], capture_output=True, text=True)
    return int(re.search(r"LOCAL:([0-9]+)", usage.stdout)[1]) + int(re.search(r"STACK:([0-9]+)", usage.stdout)[1])

calls = [(kernels.log_totals, {}), (kernels.online_facts, {})]
calls += [(kernels.mixture_sums, {"KIND": kind}) for kind in ("jsd", "skew_forward_kl", "skew_reverse_kl")]
calls += [(kernels.gradient, {"KIND": kind}) for kind in KINDS]
print(json.dumps({f"{kernel.__name__} {constants}": spilled_bytes(kernel, **constants) for kernel, constants in calls}))
"""
