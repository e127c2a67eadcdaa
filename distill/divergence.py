"""The divergence between student and teacher over the whole vocabulary, exact, from hidden states and heads.

Reading order: the mathematics of a row (``KINDS``), the loss that applies it to a block of logits (``TeacherLoss``),
and ``linear_divergence``. The loop over tiles is ``distill.tiles``; the same mathematics as kernels for a GPU is
``distill.fused``.

Shapes: N rows (response tokens), V vocabulary rows, D student width, E teacher width; a block has B rows; G ids count
as one action; F facts (``FACTS``). p is the student's distribution, q the teacher's.

The vocabulary rule: student and teacher heads have the same number of rows and every row takes part, also the padded
rows behind the tokenizer's last id, because the models' own softmax covers them and the sampler can draw them. Whoever
wants them out slices both heads (``head[:num_real]``); that is the same rule on a smaller vocabulary.

Sources: the directions and the generalised Jensen-Shannon divergence are those of GKD (arXiv 2306.13649, section 2 and
equation 1), the skewed ones those of DistiLLM (arXiv 2402.03898, section 3.1). No T^2 factor is applied.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from distill.errors import UserError
from distill.loss_arguments import check_groups, check_ids, check_linear, weights_of
from distill.tiles import tiled_total
from distill.types import COLDEST

LOG_ZERO = -1e4
"""The log-probability of what has no probability: finite, so that 0 * LOG_ZERO is 0, and exp(LOG_ZERO) is 0."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Divergence:
    """What ``linear_divergence`` returns: one differentiable number, and detached per-token facts of shape [N] in nats.

    ``values`` are the divergences of the requested kind, unweighted, also where the weight is 0. ``reverse_kl``,
    ``forward_kl`` and the entropies are of the tempered and merged distributions, whatever the kind.
    ``sampled_logprob`` is the student's log-probability of the sampled ids at temperature 1, unmerged (None without
    ``sampled_ids``).
    """

    total: Tensor
    values: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    sampled_logprob: Tensor | None


# --- The mathematics of a row -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """Student p and teacher q of a block of rows, and ratio = log p - log q, which every divergence is made of.

    Log-ratios of finite logits are finite, so p * ratio is 0, not 0 * inf, where p underflows. ``spare_BV`` is memory
    for a temporary.
    """

    p_BV: Tensor
    q_BV: Tensor
    ratio_BV: Tensor
    forward_kl_B: Tensor
    spare_BV: Tensor


def _reverse_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    slope_BV = pair.ratio_BV.mul_(pair.p_BV)
    return slope_BV.sum(-1), slope_BV


def _forward_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    return pair.forward_kl_B, torch.sub(pair.p_BV, pair.q_BV, out=pair.ratio_BV)


def _jsd(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    teacher_BV = _log_share_(torch.neg(pair.ratio_BV, out=pair.spare_BV), beta)
    teacher_B = teacher_BV.mul_(pair.q_BV).sum(-1)
    student_BV = _log_share_(pair.ratio_BV, 1 - beta)
    slope_BV = student_BV.mul_(pair.p_BV).mul_(1 - beta)
    return beta * teacher_B + slope_BV.sum(-1), slope_BV


def _skew_forward_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    teacher_BV = _log_share_(pair.ratio_BV.neg_(), beta)
    values_B = row_dot(pair.q_BV, teacher_BV, pair.spare_BV)
    return values_B, teacher_BV.expm1_().mul_(pair.p_BV).mul_(beta - 1)


def _skew_reverse_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    student_BV = _log_share_(pair.ratio_BV, beta)
    values_B = row_dot(pair.p_BV, student_BV, pair.spare_BV)
    excess_BV = torch.expm1(student_BV, out=pair.spare_BV)  # exp less 1 would lose all of it near the teacher
    return values_B, student_BV.sub_(excess_BV, alpha=beta).mul_(pair.p_BV)


def _log_share_(ratio_BV: Tensor, alpha: float) -> Tensor:
    """log x - log(alpha x + (1 - alpha) y) in the memory of the ratio log x - log y.

    0 where x = y, never above -log alpha, and exact where either underflows: only the ratio is exponentiated.
    """
    ratio_BV.neg_().add_(math.log1p(-alpha))
    return torch.logaddexp(ratio_BV, ratio_BV.new_tensor(math.log(alpha)), out=ratio_BV).neg_()


KINDS: dict[str, Callable[[Pair, float], tuple[Tensor, Tensor]]] = {
    "reverse_kl": _reverse_kl,  # KL(p || q)
    "forward_kl": _forward_kl,  # KL(q || p)
    "jsd": _jsd,  # beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    "skew_forward_kl": _skew_forward_kl,  # KL(q || beta q + (1 - beta) p)
    "skew_reverse_kl": _skew_reverse_kl,  # KL(p || beta p + (1 - beta) q)
}
"""The catalogue. Each returns the values D [B] and the slope p * dD/dp [B, V], the latter up to a multiple of p: the
gradient to the logits, slope - p * sum(slope), cancels it. The multiple is the one that makes the slope 0 where p = q:
where both are sure of one token, the gradient to it would be the difference of two numbers near 1 with any other. The
slope may take the ratio's memory."""


FACTS = ("values", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")


def measure_(
    pair_BV: tuple[Tensor, Tensor], log_pair_BV: tuple[Tensor, Tensor], spare_BV: Tensor, kind: str, beta: float
) -> tuple[Tensor, Tensor]:
    """``FACTS`` of (p, q), given with its logarithms, as [F, B], and the slope [B, V] of ``kind``.

    Uses the memory of log q. The columns need not be all of a distribution: every fact is a sum over them.
    """
    (p_BV, q_BV), (log_p_BV, log_q_BV) = pair_BV, log_pair_BV
    entropies = -row_dot(p_BV, log_p_BV, spare_BV), -row_dot(q_BV, log_q_BV, spare_BV)
    ratio_BV = torch.sub(log_p_BV, log_q_BV, out=log_q_BV)
    forward_kl_B = -row_dot(q_BV, ratio_BV, spare_BV)
    reverse_kl_B = None if kind == "reverse_kl" else row_dot(p_BV, ratio_BV, spare_BV)
    values_B, slope_BV = KINDS[kind](Pair(p_BV, q_BV, ratio_BV, forward_kl_B, spare_BV), beta)
    reverse_kl_B = values_B if reverse_kl_B is None else reverse_kl_B
    return torch.stack([values_B, reverse_kl_B, forward_kl_B, *entropies]), slope_BV


def row_dot(x_BV: Tensor, y_BV: Tensor, spare_BV: Tensor) -> Tensor:
    return torch.mul(x_BV, y_BV, out=spare_BV).sum(-1)


def _merge_(log_p_BV: Tensor, p_BV: Tensor, group_G: Tensor) -> Tensor:
    """Adds the probabilities of a group into its first id, in place; returns each member's share of the sum [B, G].

    The logsumexp of the members acts as the logit of the merged action, and its gradient flows to a member by that
    member's share.
    """
    members_BG = log_p_BV[:, group_G]
    merged_B1 = members_BG.logsumexp(-1, keepdim=True)
    for x_BV, nothing, merged in ((log_p_BV, LOG_ZERO, merged_B1), (p_BV, 0.0, merged_B1.exp())):
        x_BV[:, group_G] = nothing
        x_BV[:, group_G[:1]] = merged
    return members_BG.sub_(merged_B1).exp_()


# --- The loss on a block of rows --------------------------------------------------------------------------------------


class TeacherLoss:
    """Divergence to the teacher's distribution; a ``distill.tiles.TileLoss``."""

    def __init__(
        self,
        kind: str,
        beta: float,
        temperature: float,
        *,
        groups: list[Tensor],
        sampled_ids_N: Tensor | None,
        like_N: Tensor,
    ) -> None:
        self.kind, self.beta, self.temperature = kind, beta, temperature
        self.groups, self.sampled_ids_N = groups, sampled_ids_N
        self.facts_FN = like_N.new_empty(len(FACTS), len(like_N))
        self.values_N = self.facts_FN[0]
        self.sampled_logprob_N = None if sampled_ids_N is None else torch.empty_like(like_N)

    def form_(self, rows: slice, logits: Sequence[Tensor], weights_B1: Tensor, spare: Sequence[Tensor]) -> None:
        (logits_BV, teacher_BV), (p_BV, q_BV, spare_BV) = logits, spare
        if self.temperature != 1:
            self._record_sampled(rows, logits_BV, logits_BV.logsumexp(-1))
        log_softmax_(logits_BV, self.temperature, p_BV)
        log_softmax_(teacher_BV, self.temperature, q_BV)
        if self.temperature == 1:
            self._record_sampled(rows, logits_BV, 0)
        shares = [_merge_(logits_BV, p_BV, group_G) for group_G in self.groups]
        for group_G in self.groups:
            _merge_(teacher_BV, q_BV, group_G)

        pair, log_pair = (p_BV, q_BV), (logits_BV, teacher_BV)
        self.facts_FN[:, rows], slope_BV = measure_(pair, log_pair, spare_BV, self.kind, self.beta)
        total_B = self.values_N[rows] if self.kind == "reverse_kl" else slope_BV.sum(-1)
        torch.addcmul(slope_BV, p_BV, total_B[:, None], value=-1, out=logits_BV)
        logits_BV.mul_(weights_B1 / self.temperature)
        for group_G, share_BG in zip(self.groups, shares, strict=True):
            logits_BV[:, group_G] = share_BG * logits_BV[:, group_G[:1]]

    def _record_sampled(self, rows: slice, logits_BV: Tensor, log_total_B: Tensor | float) -> None:
        if self.sampled_ids_N is not None and self.sampled_logprob_N is not None:
            self.sampled_logprob_N[rows] = pick(logits_BV, self.sampled_ids_N[rows]) - log_total_B


def teacher_loss(weights_N: Tensor) -> type[TeacherLoss]:
    """The fused kernels where there is a GPU, Triton and arithmetic in float32; both give the same numbers."""
    if not weights_N.is_cuda or weights_N.dtype != torch.float32 or importlib.util.find_spec("triton") is None:
        return TeacherLoss
    from distill.fused import FusedTeacherLoss

    return FusedTeacherLoss


def log_softmax_(logits_BV: Tensor, temperature: float, p_BV: Tensor) -> None:
    """Overwrites the logits by the log-probabilities at this temperature, and ``p_BV`` by the probabilities.

    One exponential an entry, to base 2: on a CPU torch's exp2 takes a third of the time of its exp.
    """
    if temperature != 1:
        logits_BV.div_(temperature)
    logits_BV.sub_(logits_BV.amax(-1, keepdim=True))
    torch.mul(logits_BV, LOG2_E, out=p_BV).exp2_()
    total_B1 = p_BV.sum(-1, keepdim=True)
    logits_BV.sub_(total_B1.log())
    p_BV.mul_(total_B1.reciprocal())


def pick(x_BV: Tensor, ids_B: Tensor) -> Tensor:
    return x_BV.gather(-1, ids_B[:, None]).squeeze(-1)


def check_choices(kind: str, beta: float, temperature: float) -> None:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0)[0]
        raise UserError(f"There is no divergence kind {kind!r}; did you mean {near!r}? There are: {', '.join(KINDS)}.")
    if not 0 < beta < 1 or 1 - beta == 1:
        raise UserError(
            f"beta is {beta} and must lie between 0 and 1, and not so near 0 that 1 - beta is 1; its limits are the"
            " kinds forward and reverse_kl."
        )
    if not COLDEST <= temperature < math.inf:
        raise UserError(
            f"temperature is {temperature} and must be finite and at least {COLDEST}; 1 is the model's own."
        )


# --- The public function ----------------------------------------------------------------------------------------------

Params = ParamSpec("Params")
Returns = TypeVar("Returns")


def eager(call: Callable[Params, Returns]) -> Callable[Params, Returns]:
    """Keeps torch.compile out: the loop has as many rounds as a batch has tiles, and would compile anew for each."""
    disable: Callable[..., Any] = torch.compiler.disable
    return cast(Callable[Params, Returns], disable(call))


@eager
def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    merged_ids: Sequence[Sequence[int]] | None = None,
    sampled_ids: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Divergence:
    """Weighted sum over tokens of the divergence between softmax(student / T) and softmax(teacher / T), in nats.

    ``student_hidden`` [N, d_s] and ``teacher_hidden`` [N, d_t] are the states after the final norm that predict the
    same N tokens; ``student_head`` [V, d_s] and ``teacher_head`` [V, d_t] are the models' ``lm_head`` weights. Only the
    student's two can receive gradients, and an input that does not require one costs no gradient work.

    ``kind`` is a key of ``KINDS``; ``beta`` in (0, 1) is the weight of the mixture in the jsd and skewed kinds.
    ``weights`` [N] (default ones) are constants: put the mask and the division by the number of tokens there.
    ``merged_ids`` are groups of ids that count as one action, such as two stop ids: their probabilities are added
    before the divergence is taken. ``sampled_ids`` [N] asks for the student's log-probabilities of these tokens.
    ``chunk_rows`` rows are projected at a time (default: what fits a memory budget); results do not depend on it.

    Arithmetic is in float32, in float64 for float64 inputs; gradients are summed so and come in the inputs' dtype.
    In float16 small ones underflow: keep weights near 1 there, and divide in ``scaler.scale(total / num_tokens)``.
    A head sharded by FSDP2 is gathered once by the caller; a ``DTensor`` is refused.

    Raises ``UserError`` for an unknown kind, a parameter out of range or shapes that do not fit together.
    """
    check_linear("student", student_hidden, student_head)
    check_linear("teacher", teacher_hidden, teacher_head)
    check_choices(kind, beta, temperature)
    num_rows, num_vocab = len(student_hidden), len(student_head)
    if len(teacher_head) != num_vocab:
        raise UserError(
            f"student_head has {num_vocab} vocabulary rows and teacher_head {len(teacher_head)}; the distributions"
            " must cover the same ids. Slice both heads to the tokenizer's number of ids if only the padding differs."
        )
    if len(teacher_hidden) != num_rows:
        raise UserError(f"student_hidden has {num_rows} rows and teacher_hidden {len(teacher_hidden)}; give one each.")
    weights_N = weights_of(weights, student_hidden)
    groups = [torch.tensor(ids, device=student_hidden.device) for ids in check_groups(merged_ids or (), num_vocab)]
    if sampled_ids is not None:
        check_ids("sampled_ids", sampled_ids, num_rows, num_vocab)
    loss = teacher_loss(weights_N)(kind, beta, temperature, groups=groups, sampled_ids_N=sampled_ids, like_N=weights_N)
    models = [(student_hidden, student_head), (teacher_hidden, teacher_head)]
    return Divergence(
        total=tiled_total(models, loss, weights_N, chunk_rows),
        **dict(zip(FACTS, loss.facts_FN, strict=True)),
        sampled_logprob=loss.sampled_logprob_N,
    )
