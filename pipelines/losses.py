"""How a teacher's signal is felt: one loss for each kind of signal, in a catalogue by its type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill.divergence import linear_divergence
from distill.sparse import linear_sampled_divergence, linear_topk_divergence
from distill.stage_config import DivergenceSettings
from distill.types import HiddenStates, SampledLogprobs, TopK
from students.loss import Felt, Rows

if TYPE_CHECKING:
    from pipelines.crew import Crew

SignalLoss = Callable[[Rows, DivergenceSettings, Tensor | None, Sequence[int]], Felt]
"""The rows with their signal, what is minimised, the teacher's head where hidden states need one, and the stop ids."""


def _exact(rows: Rows, settings: DivergenceSettings, head_VD: Tensor | None, stop_ids: Sequence[int]) -> Felt:
    batch = rows.batch
    assert isinstance(batch.signal, HiddenStates) and head_VD is not None
    divergence = linear_divergence(
        rows.hidden_ND,
        rows.head_VD,
        batch.signal.states_Rd,
        head_VD,
        kind=settings.kind,
        beta=settings.beta,
        temperature=settings.temperature,
        weights=batch.weight_N,
        merged_ids=(stop_ids,) if settings.merge_stop_ids else None,
        sampled_ids=batch.target_N,
    )
    assert divergence.sampled_logprob is not None
    facts = {
        "reverse_kl": divergence.reverse_kl,
        "forward_kl": divergence.forward_kl,
        "teacher_entropy": divergence.teacher_entropy,
    }
    return _felt(rows, divergence.total, divergence.student_entropy, divergence.sampled_logprob, facts)


def _top_k(rows: Rows, settings: DivergenceSettings, head_VD: Tensor | None, stop_ids: Sequence[int]) -> Felt:
    batch = rows.batch
    assert isinstance(batch.signal, TopK)
    divergence = linear_topk_divergence(
        rows.hidden_ND,
        rows.head_VD,
        batch.signal.ids_RK,
        batch.signal.logprobs_RK,
        batch.signal.tail_logprob_R,
        kind=settings.kind,
        beta=settings.beta,
        weights=batch.weight_N,
        merged_ids=(stop_ids,) if settings.merge_stop_ids else None,
        sampled_ids=batch.target_N,
    )
    assert divergence.sampled_logprob is not None
    # Names of their own: these are lower bounds of what the exact signal reports.
    facts = {
        "topk_reverse_kl": divergence.reverse_kl,
        "topk_forward_kl": divergence.forward_kl,
        "student_tail": divergence.student_tail,
        "teacher_tail": batch.signal.tail_logprob_R.exp(),
    }
    return _felt(rows, divergence.total, divergence.student_entropy, divergence.sampled_logprob, facts)


def _sampled(rows: Rows, settings: DivergenceSettings, head_VD: Tensor | None, stop_ids: Sequence[int]) -> Felt:
    batch = rows.batch
    assert isinstance(batch.signal, SampledLogprobs)
    divergence = linear_sampled_divergence(
        rows.hidden_ND,
        rows.head_VD,
        batch.target_N,
        batch.signal.logprobs_R,
        estimator=settings.estimator,
        weights=batch.weight_N,
    )
    facts = {"estimated_reverse_kl": divergence.values}
    return _felt(rows, divergence.total, divergence.student_entropy, divergence.sampled_logprob, facts)


def _felt(
    rows: Rows, total: Tensor, student_entropy: Tensor, sampled_logprob: Tensor, facts: dict[str, Tensor]
) -> Felt:
    return Felt(
        total,
        {
            **facts,
            "student_entropy": student_entropy,
            "sampled_logprob": sampled_logprob,
            # What the sampler said of its tokens against what the trainer says: rounding, unless weights are stale.
            "logprob_gap": (sampled_logprob - rows.batch.sampled_logprob_N).abs(),
        },
    )


LOSSES: dict[type[Any], SignalLoss] = {HiddenStates: _exact, TopK: _top_k, SampledLogprobs: _sampled}
"""Signal to loss."""


def feel(rows: Rows, settings: DivergenceSettings, crew: Crew) -> Felt:
    """The loss of whichever signal the rows carry."""
    signal = rows.batch.signal
    head_VD = crew.teachers.head_VD(signal.teacher) if isinstance(signal, HiddenStates) else None
    return LOSSES[type(signal)](rows, settings, head_VD, crew.encoder.stop_ids)
