"""The logits of a tile: each model's hidden states times its head, in the precision that the arithmetic wants.

A GPU's products of 16-bit inputs come in float32. A CPU's are rounded to 16 bits: near 24, a bfloat16 logit is off by
up to 1/16. When the student is close to the teacher that noise is larger than the signal: at a KL of 0.004 nats, 47 %
of the gradient. Two things bring the 47 % to 1.2 %, at 6 % of the products' time.

- The teacher's product is accumulated onto the student's rounded logits, negated, before it is rounded itself
  (``addmm``). What is rounded is then the difference of the two, which is small where they agree, and its sum with the
  student's rounded logits is the teacher's logit.
- The student's product is taken a second time for the columns that carry probability, less the first result: what
  rounding took from them.

Shapes: those of ``distill.tiles``; K columns are taken a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Model = tuple[Tensor, Tensor]
"""Hidden states [N, d] and head [V, d]."""

CORRECTED_SHARE, CORRECTED_AT_LEAST = 8, 4096
"""One in so many columns is taken a second time, but so many at least."""

SLICE_COLUMNS = 4096
"""So many of them at a time: what is gathered for these stays in the cache."""

OFFSET_COLUMNS = 256
"""Of so many probable columns the mean difference of two models' logits is taken out: a softmax ignores it, and it
would be rounded with the rest."""


def is_16_bit(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def product_dtype(x: Tensor) -> torch.dtype:
    """The number type in which products of ``x`` are to be had."""
    return torch.float32 if is_16_bit(x) and x.is_cuda else x.dtype


def multiply(x: Tensor, y: Tensor, product: Tensor) -> None:
    if product.dtype == x.dtype:
        torch.mm(x, y, out=product)
    else:
        torch.mm(x, y, out_dtype=product.dtype, out=product)


@dataclass(frozen=True, slots=True)
class Logits:
    """What was multiplied, and what turns it into logits."""

    products: list[Tensor]
    """[C, V] a model, the student's first."""
    offsets: list[Tensor | None]
    """[C, 1] a model whose product holds its difference to the student's plus this; None for one that holds logits."""
    columns_K: Tensor | None = None
    lost_CK: Tensor | None = None
    """What rounding took from the student's logits in these columns; None where nothing was rounded."""

    @classmethod
    def project(cls, models: list[Model], products: list[Tensor], spare: list[Tensor]) -> Logits:
        """Multiplies into ``products``. ``spare`` are matrices [B, V] of the arithmetic's type to write to."""
        (hidden_CD, head_VD), student_CV = models[0], products[0]
        multiply(hidden_CD, head_VD.t(), student_CV)
        offsets: list[Tensor | None] = [None] * len(models)
        if not any(map(is_16_bit, products)):
            for (hidden, head), product_CV in zip(models[1:], products[1:], strict=True):
                multiply(hidden, head.t(), product_CV)
            return cls(products, offsets)

        columns_K = _probable_columns(student_CV, spare)
        lost_CK = _lost(models[0], student_CV, columns_K) if is_16_bit(student_CV) else None
        few = columns_K[:: max(1, len(columns_K) // OFFSET_COLUMNS)]
        for i, ((hidden, head), product_CV) in enumerate(zip(models[1:], products[1:], strict=True), start=1):
            if not is_16_bit(product_CV):
                multiply(hidden, head.t(), product_CV)
                continue
            difference_CK = (hidden @ head[few].t()).float() - student_CV[:, few].float()
            offsets[i] = offset_C1 = difference_CK.mean(-1, keepdim=True).to(product_CV.dtype)
            torch.add(student_CV, offset_C1, out=product_CV)
            torch.addmm(product_CV, hidden, head.t(), beta=-1, out=product_CV)
        return cls(products, offsets, columns_K, lost_CK)

    def of(self, block: slice, wide: list[Tensor], spare: list[Tensor]) -> list[Tensor]:
        """The logits of some rows, one [B, V] a model, in the type of ``spare``.

        In the product's own memory if it has this type, else in that of ``wide``, which has a matrix for each model.
        """
        calc, logits = spare[0].dtype, []
        for i, (product_CV, offset_C1) in enumerate(zip(self.products, self.offsets, strict=True)):
            product_BV = product_CV[block]
            if product_BV.dtype == calc:
                logits.append(product_BV)
            elif offset_C1 is None:
                logits.append(wide[i].copy_(product_BV))
            else:
                base_BV = _base(self.products[0][block], offset_C1[block], spare[0], product_BV.dtype)
                logits.append(wide[i].copy_(base_BV).add_(spare[1].copy_(product_BV)))
        if self.columns_K is not None and self.lost_CK is not None:
            logits[0].index_add_(-1, self.columns_K, self.lost_CK[block].to(calc))
        return logits


def _base(student_BV: Tensor, offset_B1: Tensor, spare_BV: Tensor, dtype: torch.dtype) -> Tensor:
    """What a difference was taken to: the same operation on the same numbers gives the same roundings again."""
    narrow_BV = spare_BV.view(dtype)[:, : student_BV.shape[1]]
    return torch.add(student_BV, offset_B1, out=narrow_BV)


def _lost(student: Model, student_CV: Tensor, columns_K: Tensor) -> Tensor:
    """What rounding took from the student's logits in these columns [C, K]."""
    hidden_CD, head_VD = student
    lost_CK = student_CV.new_empty(len(student_CV), len(columns_K))
    head_SD = head_VD.new_empty(min(SLICE_COLUMNS, len(columns_K)), head_VD.shape[1])
    for columns_S, lost_CS in zip(columns_K.split(SLICE_COLUMNS), lost_CK.split(SLICE_COLUMNS, -1), strict=True):
        rows_SD = torch.index_select(head_VD, 0, columns_S, out=head_SD[: len(columns_S)])
        torch.addmm(student_CV[:, columns_S], hidden_CD, rows_SD.t(), beta=-1, out=lost_CS)
    return lost_CK


def _probable_columns(logits_CV: Tensor, spare: list[Tensor]) -> Tensor:
    """The columns [K] of the best standing in any row, relative to the row's most probable token."""
    best_BV = spare[0].fill_(-torch.inf)
    for block_CV in logits_CV.split(len(best_BV)):
        best_rows_BV, standing_BV = (x[: len(block_CV)] for x in spare[:2])
        standing_BV.copy_(block_CV)
        torch.maximum(best_rows_BV, standing_BV.sub_(standing_BV.amax(-1, keepdim=True)), out=best_rows_BV)
    num_columns = min(logits_CV.shape[1], max(logits_CV.shape[1] // CORRECTED_SHARE, CORRECTED_AT_LEAST))
    return best_BV.amax(0).topk(num_columns, sorted=False).indices.sort().values
