"""The divergence to the teacher in Triton kernels, for GPUs: ``distill.divergence`` in fewer passes over memory.

A GPU's time here is its memory's. Op by op, a tile of logits would be read and written some twenty times; the kernels
read it twice: ``online_facts`` takes both log-sum-exps, both entropies and both KL divergences of a row in one pass,
rescaling its sums as it meets larger logits, and ``gradient`` overwrites the student's logits by the gradient to them.
The kinds that compare with a mixture need one more pass between the two (``mixture_sums``), because their gradient
holds a sum over the row that is only known when both log-sum-exps are. The products stay with cuBLAS.

Merged ids cost no pass: the kernels treat the members of a group as ids like any other, and what that changes in the
facts and the gradient is put right on those few columns with the mathematics of ``distill.divergence``.

Imports Triton, and is itself imported only where that is wanted.

Shapes: those of ``distill.divergence``; a tile has C rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from distill import kernels
from distill.divergence import TeacherLoss, measure_

BLOCK_V = 2048
"""Columns that a program holds at a time."""
NUM_WARPS = {kernels.online_facts: 4, kernels.mixture_sums: 8, kernels.gradient: 8}
"""The fastest of 4, 8 and 16 on an H200 (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The members of a group of merged ids, and the action they become."""

    ids_G: Tensor
    share_CG: Tensor
    """Of each member in the group's probability."""
    p_C1: Tensor
    slope_C1: Tensor


class FusedTeacherLoss(TeacherLoss):
    """``TeacherLoss`` in kernels; a ``distill.tiles.FusedLoss``. Arithmetic in float32."""

    def form_tile_(self, rows: slice, logits: Sequence[Tensor], weights_C: Tensor, gradient_CV: Tensor) -> None:
        student_CV, teacher_CV = logits
        assert all(x_CV.is_contiguous() for x_CV in (student_CV, teacher_CV, gradient_CV))
        online_8C = self._online(rows, student_CV, teacher_CV)
        facts_FC, total_C = self._facts(student_CV, teacher_CV, online_8C)
        groups = [self._merge_(logits, online_8C, ids_G, facts_FC, total_C) for ids_G in self.groups]
        self.facts_FN[:, rows] = facts_FC

        scale_C = weights_C / self.temperature
        num_rows, num_vocab = student_CV.shape
        grid = num_rows, triton.cdiv(num_vocab, BLOCK_V)
        arguments = student_CV, teacher_CV, online_8C, total_C, scale_C, gradient_CV, num_rows, num_vocab
        _launch(kernels.gradient, grid, *arguments, 1 / self.temperature, self.beta, KIND=self.kind)
        for group in groups:
            slope_C1 = group.slope_C1 - group.p_C1 * total_C[:, None]
            gradient_CV[:, group.ids_G] = (group.share_CG * slope_C1 * scale_C[:, None]).to(gradient_CV.dtype)

    def _online(self, rows: slice, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        """What ``online_facts`` finds, [8, C]; records the sampled log-probabilities."""
        num_rows, num_vocab = student_CV.shape
        online_8C, plain_C = self.facts_FN.new_empty(8, num_rows), self.facts_FN.new_empty(num_rows)
        wants_plain = self.sampled_ids_N is not None and self.temperature != 1
        arguments = student_CV, teacher_CV, online_8C, plain_C, num_rows, num_vocab, 1 / self.temperature
        _launch(kernels.online_facts, (num_rows,), *arguments, WANTS_PLAIN=wants_plain)
        self._record_sampled(rows, student_CV, plain_C if wants_plain else online_8C[0] + online_8C[1])
        return online_8C

    def _facts(self, student_CV: Tensor, teacher_CV: Tensor, online_8C: Tensor) -> tuple[Tensor, Tensor]:
        """``FACTS`` [F, C] and the slope's sum over each row [C], both before any ids are merged."""
        reverse_kl_C, forward_kl_C, *entropies = online_8C[4:]
        if self.kind == "reverse_kl":
            values_C, total_C = reverse_kl_C, reverse_kl_C.clone()
        elif self.kind == "forward_kl":
            values_C, total_C = forward_kl_C, torch.full_like(forward_kl_C, -1)
        else:
            num_rows, num_vocab = student_CV.shape
            values_C, total_C = sums_2C = self.facts_FN.new_empty(2, num_rows)
            arguments = student_CV, teacher_CV, online_8C, sums_2C, num_rows, num_vocab, 1 / self.temperature, self.beta
            _launch(kernels.mixture_sums, (num_rows,), *arguments, KIND=self.kind)
        return torch.stack([values_C, reverse_kl_C, forward_kl_C, *entropies]), total_C

    def _merge_(
        self, logits: Sequence[Tensor], online_8C: Tensor, ids_G: Tensor, facts_FC: Tensor, total_C: Tensor
    ) -> _Group:
        """Corrects the facts and the slope's sum for a group: its members leave the sums, the merged action enters."""
        log_p_CG, log_q_CG = (
            logits_CV[:, ids_G].float() / self.temperature - max_C1 - log_total_C1
            for logits_CV, (max_C1, log_total_C1) in zip(logits, online_8C[:4].view(2, 2, -1, 1), strict=True)
        )
        log_p_C1, log_q_C1 = (x_CG.logsumexp(-1, keepdim=True) for x_CG in (log_p_CG, log_q_CG))
        p_C1, share_CG = log_p_C1.exp(), (log_p_CG - log_p_C1).exp()
        left_FC, left_CG = measure_((log_p_CG.exp(), log_q_CG.exp()), (log_p_CG, log_q_CG), self.kind, self.beta)
        entered_FC, slope_C1 = measure_((p_C1, log_q_C1.exp()), (log_p_C1, log_q_C1), self.kind, self.beta)
        facts_FC += entered_FC - left_FC
        total_C += slope_C1.squeeze(-1) - left_CG.sum(-1)
        return _Group(ids_G, share_CG, p_C1, slope_C1)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, which need not be the tensors'
        kernel[grid](*arguments, **constants, BLOCK=BLOCK_V, num_warps=NUM_WARPS[kernel])
