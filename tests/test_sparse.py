"""The smaller signals' losses against naive float64 references, and their gradients' means against the exact one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_divergence import LargestTensor, assert_close, gradients, make, relative_error, weights_like
from torch import Tensor

from distill.cross_entropy import linear_logprobs
from distill.divergence import KINDS, linear_divergence
from distill.errors import UserError
from distill.sparse import linear_sampled_divergence, linear_topk_divergence
from distill.topk import TAIL_FLOOR, linear_logprobs_at, linear_topk, tail_of

N, V, D = 7, 23, 5
GROUPS = ((3, 17), (4, 20, 9))


def naive(
    student_hidden: Tensor,
    student_head: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail_logprob: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    merged_ids: tuple[tuple[int, ...], ...] = (),
    tail: bool = True,
) -> Tensor:
    """The specification, row by row: the probabilities of the actions written down, then the definition; values [N]."""
    values = []
    p_NV = torch.softmax(student_hidden @ student_head.T, -1)
    for p_V, row, q_K, q_tail in zip(p_NV, ids.tolist(), logprobs.exp(), tail_logprob.exp(), strict=True):
        groups = [[token for token in group if token in row] for group in merged_ids]
        actions = [group for group in groups if group]
        actions += [[token] for token in row if all(token not in group for group in groups)]
        p = torch.stack([p_V[action].sum() for action in actions])
        q = torch.stack([q_K[[row.index(token) for token in action]].sum() for action in actions])
        if tail:
            others = [token for token in range(len(p_V)) if token not in row]
            p, q = torch.cat([p, p_V[others].sum()[None]]), torch.cat([q, q_tail[None]])

        def kl(x: Tensor, y: Tensor) -> Tensor:
            return (x * (x.log() - y.log())).sum()

        m = beta * q + (1 - beta) * p
        formulas = {
            "reverse_kl": lambda p=p, q=q: kl(p, q),
            "forward_kl": lambda p=p, q=q: kl(q, p),
            "jsd": lambda p=p, q=q, m=m: beta * kl(q, m) + (1 - beta) * kl(p, m),
            "skew_forward_kl": lambda q=q, m=m: kl(q, m),
            "skew_reverse_kl": lambda p=p, q=q: kl(p, beta * p + (1 - beta) * q),
        }
        values.append(formulas[kind]())
    return torch.stack(values)


def with_signal(k: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Student hidden and head (which require gradients), and the teacher's ids, log-probabilities and tail."""
    *student, teacher_hidden, teacher_head = make(dtype)
    return student, list(linear_topk(teacher_hidden, teacher_head, k))


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("merged_ids", [(), GROUPS])
@pytest.mark.parametrize("k", [1, 6, V - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_agrees_with_the_definition(
    kind: str, k: int, merged_ids: tuple[tuple[int, ...], ...], tail: bool
) -> None:
    student, signal = with_signal(k)
    for weights, chunk_rows, beta in ((None, None, 0.5), (weights_like(torch.float64), 3, 0.2)):
        ours = linear_topk_divergence(
            *student,
            *signal,
            kind=kind,
            beta=beta,
            weights=weights,
            merged_ids=merged_ids,
            tail=tail,
            chunk_rows=chunk_rows,
        )
        spec = naive(*student, *signal, kind=kind, beta=beta, merged_ids=merged_ids, tail=tail)
        assert_close(ours.values, spec, 1e-10)
        total = spec.sum() if weights is None else (weights * spec).sum()
        assert_close(ours.total, total, 1e-10)
        for mine, theirs in zip(gradients(ours.total, student), gradients(total, student), strict=True):
            assert_close(mine, theirs, 1e-10)
        for name in ("reverse_kl", "forward_kl"):
            assert_close(
                getattr(ours, name), naive(*student, *signal, kind=name, merged_ids=merged_ids, tail=tail), 1e-10
            )


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("merged_ids", [(), GROUPS])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_gradcheck(kind: str, merged_ids: tuple[tuple[int, ...], ...], tail: bool) -> None:
    student, signal = with_signal(4)
    few = [x[2:5] for x in signal]

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        options: dict[str, Any] = {"kind": kind, "beta": 0.3, "merged_ids": merged_ids, "tail": tail, "chunk_rows": 2}
        return linear_topk_divergence(hidden, head, *few, weights=weights_like(torch.float64)[2:5], **options).total

    hidden, head = (x.detach().clone().requires_grad_() for x in (student[0][2:5], student[1]))
    assert torch.autograd.gradcheck(total, (hidden, head))


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_one_id_is_the_whole_distribution(kind: str) -> None:
    """The tail then is one token, so nothing is lost; with fewer ids the divergence is smaller, never larger."""
    inputs = make()
    exact = linear_divergence(*inputs, kind=kind)
    last = torch.zeros(N, dtype=torch.float64)
    for k in (1, 4, 12, V - 1):
        values = linear_topk_divergence(*inputs[:2], *linear_topk(*inputs[2:], k), kind=kind).values
        assert (values <= exact.values + 1e-12).all()
        assert values.mean() > last.mean()
        last = values
    assert_close(last, exact.values, 1e-12)


def test_without_its_tail_the_sum_is_no_divergence() -> None:
    """It goes below zero and rewards a student for leaving the teacher's tokens, which is why no run can ask for it."""
    one, teacher = torch.ones(1, 1), torch.tensor([[2.0], [1.0], [0.0]])
    students = [torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([[1.0], [1.0], [0.0]])]
    cut = [
        linear_topk_divergence(one, head, *linear_topk(one, teacher, 1), kind="reverse_kl", tail=False).values.item()
        for head in students
    ]
    whole = [
        linear_topk_divergence(one, head, *linear_topk(one, teacher, 1), kind="reverse_kl").values.item()
        for head in students
    ]
    assert cut[1] < -0.1 < cut[0] == pytest.approx(0, abs=1e-6)
    assert whole[1] > 0.05 > whole[0] == pytest.approx(0, abs=1e-6)


def test_a_stop_id_outside_the_top_k_belongs_to_the_tail_on_both_sides() -> None:
    """p = (.5, .2, .2, .1), q = (.6, .3, .08, .02); stop ids 0 and 3; k = 2 holds 0 only, k = 4 - 1 still not 3."""
    one = torch.ones(1, 1, dtype=torch.float64)
    p, q = (torch.tensor(x, dtype=torch.float64).log()[:, None] for x in ((0.5, 0.2, 0.2, 0.1), (0.6, 0.3, 0.08, 0.02)))
    merged = linear_topk_divergence(one, p, *linear_topk(one, q, 2), kind="forward_kl", merged_ids=((0, 3),))
    apart = linear_topk_divergence(one, p, *linear_topk(one, q, 2), kind="forward_kl")
    assert (
        merged.values.item()
        == apart.values.item()
        == pytest.approx(0.6 * 0.1823216 + 0.3 * 0.4054651 - 0.1 * 1.0986123)
    )
    together = linear_topk_divergence(one, p, *linear_topk(one, q, 2), kind="forward_kl", merged_ids=((0, 1),))
    assert together.values.item() == pytest.approx(0.9 * 0.2513144 - 0.1 * 1.0986123, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_topk_does_not_break_where_probabilities_underflow(kind: str) -> None:
    for student_scale in (1.0, 400.0):
        *student, hidden, head = (x.detach() for x in make(torch.float32))
        student[0] = (student[0] * student_scale).requires_grad_()
        signal = linear_topk(hidden * 400, head, 4)
        ours = linear_topk_divergence(*student, *signal, kind=kind, beta=0.2, merged_ids=GROUPS)
        exact = linear_topk_divergence(
            *(x.double() for x in student),
            signal[0],
            *(x.double() for x in signal[1:]),
            kind=kind,
            beta=0.2,
            merged_ids=GROUPS,
        )
        assert_close(ours.values, exact.values, 2e-4)
        (mine,), (theirs,) = (torch.autograd.grad(x.total, student[0]) for x in (ours, exact))
        assert_close(mine, theirs, 2e-4)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_of_an_estimator_and_of_its_gradient_are_exact(estimator: str) -> None:
    """Every token of the vocabulary in turn, weighed by how often the student draws it; exactly the reverse KL."""
    inputs = make()
    exact = linear_divergence(*inputs, kind="reverse_kl")
    log_p_NV, log_q_NV = (torch.log_softmax(inputs[i] @ inputs[i + 1].T, -1).detach() for i in (0, 2))
    mean_N, means = torch.zeros(N, dtype=torch.float64), [torch.zeros_like(x) for x in inputs[:2]]
    for token in range(V):
        drawn = torch.full((N,), token)
        weights = log_p_NV[:, token].exp()
        ours = linear_sampled_divergence(
            *inputs[:2], drawn, log_q_NV[:, token], estimator=estimator, weights=weights, chunk_rows=3
        )
        mean_N += weights * ours.values
        for mean, part in zip(means, gradients(ours.total, inputs), strict=True):
            mean += part
        assert_close(ours.sampled_logprob, log_p_NV[:, token], 1e-12)
        assert_close(ours.student_entropy, exact.student_entropy, 1e-12)
    assert_close(mean_N, exact.values, 1e-12)
    for mean, gradient in zip(means, gradients(exact.total, inputs), strict=True):
        assert_close(mean, gradient, 1e-12)


def test_differentiating_an_estimate_would_miss_the_gradient() -> None:
    """The reason for the policy gradient: the mean derivative of k1 is zero, of k3 the *forward* KL's gradient."""
    inputs = make()
    log_p_NV = torch.log_softmax(inputs[0] @ inputs[1].T, -1)
    ratio_NV = log_p_NV - torch.log_softmax(inputs[2] @ inputs[3].T, -1)
    p_NV = log_p_NV.detach().exp()
    k1, k3 = (p_NV * ratio_NV).sum(), (p_NV * ((-ratio_NV).exp() - 1 + ratio_NV)).sum()
    assert torch.autograd.grad(k1, inputs[0], retain_graph=True)[0].abs().max() < 1e-12
    forward = gradients(linear_divergence(*inputs, kind="forward_kl").total, inputs)[0]
    assert_close(gradients(k3, inputs)[0], forward, 1e-12)


def test_one_sample_s_gradient_is_that_of_its_policy_gradient() -> None:
    inputs, drawn = make(), torch.arange(N) * 3
    teacher_logprobs = linear_logprobs(inputs[2], inputs[3], drawn)
    ours = linear_sampled_divergence(*inputs[:2], drawn, teacher_logprobs, weights=weights_like(torch.float64))
    log_p_N = torch.log_softmax(inputs[0] @ inputs[1].T, -1).gather(-1, drawn[:, None]).squeeze(-1)
    surrogate = (weights_like(torch.float64) * (log_p_N - teacher_logprobs).detach() * log_p_N).sum()
    for mine, theirs in zip(gradients(ours.total, inputs), gradients(surrogate, inputs), strict=True):
        assert_close(mine, theirs, 1e-12)


def test_pinned_estimates() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): for the first token r = 1/2, so k1 = ln 2 and k3 = ln 2 - 1/2."""
    one, zero = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    log_q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    pinned = {"k1": (0.6931471806, -0.4054651081), "k3": (0.1931471806, 0.0945348919)}
    for estimator, values in pinned.items():
        ours = linear_sampled_divergence(one, zero, torch.arange(2), log_q, estimator=estimator)
        assert ours.values.tolist() == pytest.approx(values, abs=1e-10)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_forced_token_that_the_student_would_never_say_breaks_no_sum(estimator: str) -> None:
    hidden, head = torch.ones(2, 1, requires_grad=True), torch.tensor([[0.0], [-200.0], [1.0]])
    forced, log_q = torch.tensor([1, 0]), torch.tensor([-1.0, -0.5])
    ours = linear_sampled_divergence(
        hidden, head, forced, log_q, estimator=estimator, weights=torch.tensor([0.0, 1.0]), chunk_rows=1
    )
    (gradient,) = torch.autograd.grad(ours.total, hidden)
    assert ours.total.isfinite() and ours.values.isfinite().all() and gradient.isfinite().all()
    assert torch.equal(ours.total, ours.values[1]) and gradient[0] == 0


def test_topk_is_the_teacher_s_own() -> None:
    hidden, head = (x.detach() for x in make()[2:])
    log_q_NV = torch.log_softmax(hidden @ head.T, -1)
    ids, logprobs, tail = linear_topk(hidden, head, 5, chunk_rows=2)
    assert torch.equal(ids, log_q_NV.topk(5).indices)
    assert_close(logprobs, log_q_NV.topk(5).values, 1e-12)
    assert_close(tail, (1 - log_q_NV.topk(5).values.exp().sum(-1)).log(), 1e-10)
    assert_close(tail_of(logprobs), tail, 1e-6)
    chosen = torch.stack([torch.randperm(V)[:5] for _ in range(N)])
    same, at, rest = linear_logprobs_at(hidden, head, chosen, chunk_rows=3)
    assert torch.equal(same, chosen)
    assert_close(at, log_q_NV.gather(-1, chosen), 1e-12)
    assert_close(rest, (1 - at.exp().sum(-1)).log(), 1e-10)


def test_a_tail_smaller_than_rounding_is_the_floor() -> None:
    assert tail_of(torch.tensor([[0.0, -80.0], [1e-6, -80.0]])).tolist() == pytest.approx([-24 * 0.6931472] * 2)
    assert TAIL_FLOOR.hex() == "0x1.0000000000000p-24"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_all_rows_times_the_vocabulary(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, vocab, chunk_rows = 256, 300, 8
    hidden, head = torch.randn(rows, D).to(dtype).requires_grad_(), torch.randn(vocab, D).to(dtype).requires_grad_()
    drawn = torch.arange(rows)
    with LargestTensor() as seen:
        signal = linear_topk(hidden.detach(), head.detach(), 4, chunk_rows=chunk_rows)
        linear_topk_divergence(
            hidden, head, *signal, kind="jsd", merged_ids=((1, 2),), chunk_rows=chunk_rows
        ).total.backward()
        linear_sampled_divergence(hidden, head, drawn, signal[2], chunk_rows=chunk_rows).total.backward()
    tile = vocab * chunk_rows
    assert seen.fits(max(tile, vocab * D), tile=tile, models=1, dtype=dtype)


def test_16_bit_inputs() -> None:
    student, signal = with_signal(4, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in student]
    ours = linear_topk_divergence(*student, *signal, kind="reverse_kl")
    spec = naive(*exact, signal[0], *(x.double() for x in signal[1:]), kind="reverse_kl")
    assert_close(ours.values, spec, 2e-4)
    for mine, theirs in zip(gradients(ours.total, student), gradients(spec.sum(), exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative_error(mine, theirs) < 5e-3


def test_what_does_not_fit_together_is_refused() -> None:
    student, (ids, logprobs, tail) = with_signal(4)
    refused: list[tuple[list[Tensor], dict[str, Any], str]] = [
        ([ids, logprobs, tail], {"kind": "kl"}, "no divergence kind 'kl'"),
        ([ids, logprobs[:, 1:], tail], {"kind": "jsd"}, "one each for every id"),
        ([ids, logprobs, tail[1:]], {"kind": "jsd"}, "one tail for every row"),
        ([ids.float(), logprobs, tail], {"kind": "jsd"}, "must be int64"),
        ([ids + V, logprobs, tail], {"kind": "jsd"}, "the head has 23 rows"),
        ([ids[:, [0, 0, 1, 2]], logprobs, tail], {"kind": "jsd"}, "twice in a row"),
    ]
    for signal, options, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            linear_topk_divergence(*student, *signal, **options)
    with pytest.raises(UserError, match="no estimator 'k2'"):
        linear_sampled_divergence(*student, ids[:, 0], tail, estimator="k2")
    with pytest.raises(UserError, match="there are 7 sampled ids"):
        linear_sampled_divergence(*student, ids[:, 0], tail[1:])
    with pytest.raises(UserError, match="k is 23"):
        linear_topk(student[0].detach(), student[1].detach(), V)
