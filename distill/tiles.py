"""The loop that takes a loss over a whole vocabulary tile by tile, without ever holding an [N, V] tensor.

A model ends in a linear head, so its logits need not exist all at once. For a tile of rows, every model's head is
projected once; the loss of each row and its gradient to the student's logits are formed, the gradient in the memory of
those logits; two more products carry it to the hidden states and the head. All of it happens in the forward pass
("gradient in forward"): ``backward`` only scales what is there. With one teacher that is 6*d_s*V + 2*d_t*V FLOPs a row.

The mathematics is done in float32 (float64 for float64 inputs), also where products are rounded: ``distill.logits``.

Shapes: N rows, V vocabulary rows of a head, D width of the student; a tile has C rows; a block, the part of a tile that
fits in the cache, has B.

Left out on purpose: second derivatives (a gradient is a constant), logit softcapping and head biases (no Qwen3 model
has them), and casting: a head and its hidden states have one dtype, and the caller chooses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.errors import UserError
from distill.logits import Logits, Model, is_16_bit, multiply, product_dtype
from distill.scratch import CPU_TILE_BYTES, Matrix, matrices

GPU_TILE_BYTES = 2 * 2**30
"""As ``CPU_TILE_BYTES``. Each tile reads and writes the head's gradient once, [V, D] in float32, so that small tiles
cost bandwidth."""

BLOCK_BYTES = 3 * 2**19
"""On a CPU, the mathematics of a tile is done in blocks of this size a thread, so that its handful of temporaries stay
in the last-level cache. On a GPU a block is the whole tile: there a launch costs more than a trip to memory."""

SLICE_ROWS = 8192
"""Rows of a 16-bit head's gradient that are computed at a time, before they are added in float32. On a CPU a product of
all rows at once takes a tenth longer, also where nothing is added."""


class TileLoss(Protocol):
    """A loss as the loop sees it."""

    values_N: Tensor
    """The unweighted loss of each row, filled block by block."""

    def form_(self, rows: slice, logits: Sequence[Tensor], weights_B1: Tensor, spare: Sequence[Tensor]) -> None:
        """Records the facts of these rows and overwrites the student's logits by their gradient.

        ``logits`` are one [B, V] a model, the student's first; all may be used as scratch. ``spare`` are like them, one
        more than there are models, for temporaries: these have been written to before, and fresh memory takes longer
        than what is done with it. The gradient is that of sum(weights * values).
        """


@runtime_checkable
class FusedLoss(TileLoss, Protocol):
    """A loss that takes a whole tile in kernels of its own."""

    def form_tile_(self, rows: slice, logits: Sequence[Tensor], weights_C: Tensor, gradient_CV: Tensor) -> None:
        """What ``form_`` does, for the rows of a tile and with the gradient written to ``gradient_CV``.

        The logits are as the products left them; the gradient may be the student's logits.
        """


def tiled_total(models: Sequence[Model], loss: TileLoss, weights_N: Tensor, chunk_rows: int | None) -> Tensor:
    """sum(weights * loss), differentiable in the hidden states and head of the first model, the student.

    The dtype of ``weights_N`` is that of the arithmetic. ``chunk_rows`` rows are in a tile; None fits them to the
    budget. An input that does not require a gradient costs no gradient work.
    """
    hidden_ND, head_VD = models[0]
    wants_hidden, wants_head = (torch.is_grad_enabled() and x.requires_grad for x in models[0])
    others = [(hidden.detach(), head.detach()) for hidden, head in models[1:]]
    job = _Job(others, loss, weights_N, _chunk_rows(chunk_rows, models), wants_hidden, wants_head)
    return cast(Tensor, _GradientInForward.apply(hidden_ND, head_VD, job))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Job:
    others: list[Model]
    loss: TileLoss
    weights_N: Tensor
    chunk_rows: int
    wants_hidden: bool
    wants_head: bool


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, job: _Job) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            ctx.save_for_backward(*_sweep(hidden_ND, head_VD, job))
            return job.weights_N.dot(job.loss.values_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # A caller that puts its denominator into the weights gets here with 1 and pays no second copy of [V, D].
        unit = bool(grad_total == 1)
        scaled = (grad if unit or grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None)


def _sweep(hidden_ND: Tensor, head_VD: Tensor, job: _Job) -> tuple[Tensor | None, Tensor | None]:
    """Fills the loss tile by tile; returns the gradients to the student's hidden states and head, None if unwanted."""
    num_rows, chunk_rows = len(hidden_ND), min(job.chunk_rows, len(hidden_ND))
    models = [(hidden_ND, head_VD), *job.others]
    grad_hidden_ND = torch.empty_like(hidden_ND) if job.wants_hidden else None
    grad_head_VD = None
    if job.wants_head:
        sum_dtype = head_VD.dtype if chunk_rows == num_rows else job.weights_N.dtype  # one tile is its own sum
        grad_head_VD = torch.empty_like(head_VD, dtype=sum_dtype)
        if num_rows == 0:
            grad_head_VD.zero_()

    kinds: list[Matrix] = [(chunk_rows, len(head), product_dtype(hidden)) for hidden, head in models]
    if product_dtype(hidden_ND) != hidden_ND.dtype:
        # Products do not take the type that logits come in: the gradient cannot overwrite the student's.
        kinds.append((chunk_rows, len(head_VD), hidden_ND.dtype))
    with matrices([*kinds, *_block_kinds(models, job, chunk_rows)], hidden_ND.device) as buffers:
        block = buffers[len(kinds) :]
        for tile in _slices(num_rows, chunk_rows):
            inputs = [(hidden[tile], head) for hidden, head in models]
            products = [buffer[: tile.stop - tile.start] for buffer in buffers[: len(kinds)]]
            gradient_CV = products.pop() if len(products) > len(models) else products[0]
            _form_tile_(inputs, products, tile, gradient_CV, block=block, job=job)
            if grad_hidden_ND is not None:
                torch.mm(gradient_CV, head_VD, out=grad_hidden_ND[tile])
            if grad_head_VD is not None:
                _add_product_(grad_head_VD, gradient_CV.t(), hidden_ND[tile], fresh=tile.start == 0)
    return grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype)


def _block_kinds(models: list[Model], job: _Job, chunk_rows: int) -> list[Matrix]:
    """The matrices that the mathematics of a block takes: spare ones, then its logits where products are narrower."""
    if isinstance(job.loss, FusedLoss):
        return []
    (hidden_ND, head_VD), calc = models[0], job.weights_N.dtype
    block_rows = chunk_rows
    if hidden_ND.device.type == "cpu":
        cached = torch.get_num_threads() * max(1, BLOCK_BYTES // (max(1, len(head_VD)) * calc.itemsize))
        block_rows = min(block_rows, cached)
    num_wide = len(models) if any(product_dtype(hidden) != calc for hidden, _ in models) else 0
    return [(block_rows, len(head_VD), calc)] * (len(models) + 1 + num_wide)


def _form_tile_(
    models: list[Model], products: list[Tensor], tile: slice, gradient_CV: Tensor, *, block: list[Tensor], job: _Job
) -> None:
    """Multiplies into ``products`` and has the loss formed on every row of the tile, in the memory of ``block``."""
    spare, wide = block[: len(models) + 1], block[len(models) + 1 :]
    logits = Logits.project(models, products, spare)
    if isinstance(job.loss, FusedLoss):
        job.loss.form_tile_(tile, products, job.weights_N[tile], gradient_CV)
        return
    for part in _slices(tile.stop - tile.start, len(spare[0])):
        rows = slice(tile.start + part.start, tile.start + part.stop)
        spare_BV = [x[: part.stop - part.start] for x in spare]
        logits_BV = logits.of(part, [x[: part.stop - part.start] for x in wide], spare_BV)
        job.loss.form_(rows, logits_BV, job.weights_N[rows, None], spare_BV)
        if gradient_CV.dtype != logits_BV[0].dtype:
            gradient_CV[part] = logits_BV[0]


def _add_product_(sum_VD: Tensor, gradient_VC: Tensor, hidden_CD: Tensor, *, fresh: bool) -> None:
    """sum += gradient @ hidden; where ``fresh``, what the sum holds is not read."""
    if sum_VD.dtype == hidden_CD.dtype:
        step = SLICE_ROWS if is_16_bit(sum_VD) and not sum_VD.is_cuda else len(sum_VD)
        for rows in _slices(len(sum_VD), step):
            sum_rows = sum_VD[rows]
            torch.addmm(sum_rows, gradient_VC[rows], hidden_CD, beta=0 if fresh else 1, out=sum_rows)
        return
    buffer = hidden_CD.new_empty(min(SLICE_ROWS, len(sum_VD)), hidden_CD.shape[1], dtype=product_dtype(hidden_CD))
    for rows in _slices(len(sum_VD), SLICE_ROWS):
        product = buffer[: rows.stop - rows.start]
        multiply(gradient_VC[rows], hidden_CD, product)
        if fresh:
            sum_VD[rows] = product
        else:
            sum_VD[rows] += product


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, max(1, step))]


def _chunk_rows(chunk_rows: int | None, models: Sequence[Model]) -> int:
    """The rows of a tile: as many as the budget holds, spread evenly over the tiles that are needed."""
    if chunk_rows is None:
        hidden_ND, head_VD = models[0]
        budget = CPU_TILE_BYTES if hidden_ND.device.type == "cpu" else GPU_TILE_BYTES
        entry_bytes = sum(product_dtype(hidden).itemsize for hidden, _ in models)
        if product_dtype(hidden_ND) != hidden_ND.dtype:
            entry_bytes += hidden_ND.dtype.itemsize  # the gradient has memory of its own
        most = max(1, budget // (len(head_VD) * entry_bytes))
        num_tiles = max(1, math.ceil(len(hidden_ND) / most))
        return max(1, math.ceil(len(hidden_ND) / num_tiles))
    if chunk_rows < 1:
        raise UserError(f"chunk_rows is {chunk_rows}; a tile has at least one row.")
    return chunk_rows
