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
    def project(cls, models: list[Model], products: list[Tensor], block_rows: int) -> Logits:
        """Multiplies into ``products``. ``block_rows`` rows in float32 fit in the cache."""
        (hidden_CD, head_VD), student_CV = models[0], products[0]
        multiply(hidden_CD, head_VD.t(), student_CV)
        offsets: list[Tensor | None] = [None] * len(models)
        if not any(map(is_16_bit, products)):
            for (hidden, head), product_CV in zip(models[1:], products[1:], strict=True):
                multiply(hidden, head.t(), product_CV)
            return cls(products, offsets)

        columns_K = _probable_columns(student_CV, block_rows)
        lost_CK = None
        if is_16_bit(student_CV):
            lost_CK = torch.addmm(student_CV[:, columns_K], hidden_CD, head_VD.index_select(0, columns_K).t(), beta=-1)
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

    def of(self, block: slice, dtype: torch.dtype) -> list[Tensor]:
        """The logits of some rows, one [B, V] a model; in the product's own memory if it has this number type."""
        student_BV = self.products[0][block]
        logits = [
            product_CV[block].to(dtype)
            if offset_C1 is None
            else _base(student_BV, offset_C1[block], product_CV[block]).to(dtype).add_(product_CV[block])
            for product_CV, offset_C1 in zip(self.products, self.offsets, strict=True)
        ]
        if self.columns_K is not None and self.lost_CK is not None:
            logits[0].index_add_(-1, self.columns_K, self.lost_CK[block].to(dtype))
        return logits


def _base(student_CV: Tensor, offset_C1: Tensor, like_CV: Tensor) -> Tensor:
    """What a difference was taken to: the same operation on the same numbers gives the same roundings again."""
    return (student_CV + offset_C1).to(like_CV.dtype)


def _probable_columns(logits_CV: Tensor, block_rows: int) -> Tensor:
    """The columns [K] of the best standing in any row, relative to the row's most probable token."""
    best_BV = torch.full((block_rows, logits_CV.shape[1]), -torch.inf, device=logits_CV.device)
    for block_BV in logits_CV.split(block_rows):
        standing_BV = block_BV.to(torch.float32, copy=True)
        best_rows_BV = best_BV[: len(standing_BV)]
        torch.maximum(best_rows_BV, standing_BV.sub_(standing_BV.amax(-1, keepdim=True)), out=best_rows_BV)
    num_columns = min(logits_CV.shape[1], max(logits_CV.shape[1] // CORRECTED_SHARE, CORRECTED_AT_LEAST))
    return best_BV.amax(0).topk(num_columns, sorted=False).indices.sort().values
