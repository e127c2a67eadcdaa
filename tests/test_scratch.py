"""The memory that a CPU's tiles leave to the next ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distill import scratch, tiles
from distill.cross_entropy import linear_cross_entropy
from distill.divergence import KINDS, linear_divergence
from distill.scratch import matrices
from distill.topk import linear_topk

CPU = torch.device("cpu")
N, V, D = 6, 40, 5


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    scratch._kept.clear()
    yield
    scratch._kept.clear()


def inputs(seed: int, rows: int = N) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape).requires_grad_() for shape in ((rows, D), (V, D))] + [
        torch.randn(shape) for shape in ((rows, D), (V, D))
    ]


def test_the_next_call_writes_where_the_last_one_wrote() -> None:
    linear_divergence(*inputs(0), kind="reverse_kl")
    (first,) = scratch._kept
    linear_divergence(*inputs(1, rows=N - 2), kind="reverse_kl")
    assert [memory.data_ptr() for memory in scratch._kept] == [first.data_ptr()]


def test_what_a_call_returned_is_its_own() -> None:
    """Nothing that is held of one call lies in the memory that the next one writes to."""
    one = inputs(0)
    held = linear_divergence(*one, kind="jsd", sampled_ids=torch.arange(N))
    entropy = linear_cross_entropy(one[0], one[1], torch.arange(N))
    ids, logprobs, rest = linear_topk(one[0].detach(), one[1].detach(), 3)
    outputs = [
        *(held.values, held.reverse_kl, held.forward_kl, held.student_entropy, held.teacher_entropy),
        *(held.sampled_logprob, entropy.values, ids, logprobs, rest),
    ]
    before = [x.clone() for x in outputs if x is not None]
    scratch._kept[0].fill_(255)
    linear_divergence(*inputs(1), kind="jsd")
    assert all(torch.equal(x, y) for x, y in zip((x for x in outputs if x is not None), before, strict=True))
    gradients = torch.autograd.grad(held.total, one[:2])
    fresh = torch.autograd.grad(linear_divergence(*one, kind="jsd").total, one[:2])
    assert all(torch.equal(x, y) for x, y in zip(gradients, fresh, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_neither_what_the_memory_holds_nor_how_it_is_divided_changes_a_number(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs(0)]

    def results() -> list[Tensor]:
        ours = linear_divergence(*one, kind=kind, merged_ids=((1, 2),), chunk_rows=5)
        return [ours.values, ours.student_entropy, ours.teacher_entropy, *torch.autograd.grad(ours.total, one[:2])]

    whole = results()
    scratch._kept[0].fill_(255)  # not a number in either type
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(tiles, "BLOCK_BYTES", 1)  # tiles of five rows and one, in blocks of three, two and one
    for mine, theirs in zip(results(), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_inference_leaves_memory_that_training_can_use() -> None:
    expected = linear_divergence(*inputs(0), kind="reverse_kl").total
    scratch._kept.clear()
    with torch.inference_mode():
        linear_topk(*(x.detach() for x in inputs(0)[:2]), 3)
    assert len(scratch._kept) == 1
    total = linear_divergence(*inputs(0), kind="reverse_kl").total
    total.backward()
    assert torch.equal(total, expected)


def test_a_call_within_a_call_has_memory_of_its_own() -> None:
    with matrices([(2, 3, torch.float32)], CPU) as (outer,):
        outer.fill_(1)
        with matrices([(2, 3, torch.float32)], CPU) as (inner,):
            inner.fill_(2)
        assert outer.eq(1).all()
    assert len(scratch._kept) == 1


def test_threads_do_not_write_to_each_others() -> None:
    both = threading.Barrier(2)
    found: dict[float, bool] = {}

    def work(value: float) -> None:
        with matrices([(50, 50, torch.float64)], CPU) as (matrix,):
            both.wait()
            matrix.fill_(value)
            both.wait()
            found[value] = bool(matrix.eq(value).all())

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1.0: True, 2.0: True}
    assert len(scratch._kept) == 1


def test_matrices_of_different_types_lie_side_by_side() -> None:
    with matrices([(3, 7, torch.bfloat16), (2, 5, torch.float64), (3, 0, torch.float32)], CPU) as (narrow, wide, empty):
        assert (narrow.shape, wide.shape, empty.shape) == ((3, 7), (2, 5), (3, 0))
        narrow.fill_(1)
        wide.fill_(2)
        assert narrow.eq(1).all() and wide.eq(2).all()
        assert all(x.data_ptr() % 64 == scratch._ALIGNMENT % 64 == 0 for x in (narrow, wide))


def test_more_than_the_budget_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "CPU_KEPT_BYTES", 1000)
    with matrices([(10, 100, torch.float32)], CPU):
        pass
    assert not scratch._kept
    with pytest.raises(RuntimeError), matrices([(1, 100, torch.float32)], CPU):
        raise RuntimeError
    assert len(scratch._kept) == 1
