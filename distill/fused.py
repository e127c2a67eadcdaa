"""The divergence to the teacher in Triton kernels, for GPUs: ``distill.divergence`` in fewer passes over memory.

A GPU's time here is its memory's. Op by op, a tile of logits would be read and written some twenty times; the kernels
read it twice: ``online_facts`` takes both log-sum-exps, both entropies and both KL divergences of a row in one pass,
rescaling its sums as it meets larger logits, and ``gradient`` overwrites the student's logits by the gradient to them.
The kinds that compare with a mixture need one more pass between the two (``mixture_sums``), because their gradient
holds a sum over the row that is only known when both log-sum-exps are. The products stay with cuBLAS.

Merged ids cost no pass: before it, the logit of the merged action is written to its first member's column and minus
infinity to the others', and behind it the members get their shares of its gradient. At another temperature than 1 the
sampled tokens' log-probabilities take one pass over the student's logits (``log_totals``).

Imports Triton, and is itself imported only where that is wanted.

Shapes: those of ``distill.divergence``; a tile has C rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from distill import kernels
from distill.divergence import TeacherLoss

BLOCK_V = 2048
"""Columns that a program holds at a time."""
NUM_WARPS = {kernels.log_totals: 4, kernels.online_facts: 4, kernels.mixture_sums: 8, kernels.gradient: 8}
"""The fastest of 4, 8 and 16 on an H200 (docs/benchmarks.md); not measured for ``log_totals``."""


class FusedTeacherLoss(TeacherLoss):
    """``TeacherLoss`` in kernels; a ``distill.tiles.FusedLoss``. Arithmetic in float32, as are the logits."""

    def form_tile_(self, rows: slice, logits: Sequence[Tensor], weights_C: Tensor, gradient_CV: Tensor) -> None:
        student_CV, teacher_CV = logits
        assert all(x_CV.is_contiguous() for x_CV in (student_CV, teacher_CV, gradient_CV))
        assert all(x_CV.dtype == torch.float32 for x_CV in logits)
        if self.sampled_logprob_N is not None:
            self._record_sampled(rows, student_CV, 0 if self.temperature == 1 else self._log_totals(student_CV))
        shares, _ = ([self._merge_(x_CV, ids_G) for ids_G in self.groups] for x_CV in logits)

        num_rows, num_vocab = student_CV.shape
        online_9C = self.facts_FN.new_empty(9, num_rows)
        sizes = num_rows, num_vocab, 1 / self.temperature
        _launch(kernels.online_facts, (num_rows,), student_CV, teacher_CV, online_9C, *sizes)
        if self.sampled_logprob_N is not None and self.temperature == 1:
            self.sampled_logprob_N[rows] -= online_9C[0] + online_9C[1]  # merging changes no sum
        values_C, total_C = self._values(student_CV, teacher_CV, online_9C)
        self.facts_FN[:, rows] = torch.stack([values_C, *online_9C[5:]])

        arguments = student_CV, teacher_CV, online_9C, total_C, weights_C / self.temperature, gradient_CV
        grid = num_rows, triton.cdiv(num_vocab, BLOCK_V)
        _launch(kernels.gradient, grid, *arguments, *sizes, self.beta, KIND=self.kind)
        for ids_G, share_CG in zip(self.groups, shares, strict=True):
            gradient_CV[:, ids_G] = (share_CG * gradient_CV[:, ids_G[:1]]).to(gradient_CV.dtype)

    def _log_totals(self, student_CV: Tensor) -> Tensor:
        num_rows, num_vocab = student_CV.shape
        totals_C = self.facts_FN.new_empty(num_rows)
        _launch(kernels.log_totals, (num_rows,), student_CV, totals_C, num_vocab)
        return totals_C

    def _merge_(self, logits_CV: Tensor, ids_G: Tensor) -> Tensor:
        """Adds the probabilities of a group into its first id, in place; returns each member's share of the sum [C, G].

        As ``distill.divergence`` does, but on logits. A group that left the kernels' sums behind them, by subtraction,
        would take most of them with it where it is a response's end.
        """
        members_CG = logits_CV[:, ids_G] / self.temperature
        merged_C1 = members_CG.logsumexp(-1, keepdim=True)
        logits_CV[:, ids_G] = -torch.inf
        logits_CV[:, ids_G[:1]] = merged_C1 * self.temperature
        return members_CG.sub_(merged_C1).exp_()

    def _values(self, student_CV: Tensor, teacher_CV: Tensor, online_9C: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the kind, and the slope's sum over each row, both [C]."""
        reverse_kl_C, forward_kl_C = online_9C[5:7]
        if self.kind == "reverse_kl":
            return reverse_kl_C, reverse_kl_C
        if self.kind == "forward_kl":
            return forward_kl_C, torch.zeros_like(forward_kl_C)
        num_rows, num_vocab = student_CV.shape
        sums_2C = self.facts_FN.new_empty(2, num_rows)
        arguments = student_CV, teacher_CV, online_9C, sums_2C, num_rows, num_vocab, 1 / self.temperature, self.beta
        _launch(kernels.mixture_sums, (num_rows,), *arguments, KIND=self.kind)
        values_C, total_C = sums_2C
        return values_C, total_C


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, which need not be the tensors'
        kernel[grid](*arguments, **constants, BLOCK=BLOCK_V, num_warps=NUM_WARPS[kernel])
