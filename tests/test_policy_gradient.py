"""The policy gradient against a naive float64 reference, against TRL, and the claims about stop tokens and memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_divergence import LargestTensor
from torch import Tensor

from benchmarks.policy_gradient import (
    CASES,
    CLIP_HIGH,
    CLIP_LOW,
    IMPORTANCE_CAP,
    LIMIT,
    NUM_PROMPT,
    NUM_RESPONSES,
    REWARDS,
    advantages,
    fingerprint,
    inputs,
    logprobs,
    model,
)
from distill.errors import UserError
from distill.policy_gradient import Clip, PolicyGradient, linear_policy_gradient
from distill.types import ActionLogprobs
from pipelines.rewards import group_advantages

N, V, D = 7, 23, 5
GROUPS = ((3, 17), (4, 20, 9))
TARGETS = torch.tensor([3, 17, 9, 0, 22, 4, 5])
"""Members of both groups, and tokens that are none."""


def naive(
    hidden: Tensor,
    head: Tensor,
    given: dict[str, Any],
    *,
    merged_ids: tuple[tuple[int, ...], ...] = (),
    cap: float = 2.0,
) -> dict[str, Tensor]:
    """The specification, over whole distributions, differentiated by autograd."""
    p = torch.softmax(hidden @ head.T, -1)
    token = p[torch.arange(len(p)), TARGETS]
    action = token.clone()
    for row, target in enumerate(TARGETS.tolist()):
        for group in merged_ids:
            if target in group:
                action[row] = p[row, list(group)].sum()
    old = given.get("old")
    ratio = action / (action.detach() if old is None else old.action_R.exp())
    advantage = given["advantages"]
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    importance = torch.ones_like(token)
    if "sampler_logprobs" in given:
        start = token.detach() if old is None else old.token_R.exp()
        importance = (start / given["sampler_logprobs"].exp()).clamp(max=cap)
    values = loss * importance
    return {
        "total": (given.get("weights", 1.0) * values).sum(),
        "values": values,
        "token_logprob": token.log(),
        "action_logprob": action.log(),
        "entropy": -(p * p.log()).sum(-1),
        "ratio": ratio,
        "importance": importance,
    }


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, head = (torch.randn(shape, dtype=torch.float64) for shape in ((N, D), (V, D)))
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()


def options(hidden: Tensor, head: Tensor, merged_ids: tuple[tuple[int, ...], ...]) -> list[dict[str, Any]]:
    """Every combination of an old policy on both sides of the clips, a sampler beyond the cap, and weights."""
    here = naive(hidden.detach().double(), head.detach().double(), {"advantages": torch.ones(N)}, merged_ids=merged_ids)
    torch.manual_seed(1)
    drift = torch.tensor([-0.5, 0.5, 0.4, -0.4, -0.3, 0.5, 0.05], dtype=torch.float64)
    old = ActionLogprobs(here["token_logprob"] + drift + 0.1, here["action_logprob"] + drift)
    sampler = here["token_logprob"] + torch.randn(N, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.25], dtype=torch.float64)
    advantage = torch.tensor([1.5, -0.7, 1.0, 0.0, 2.0, -2.0, -1.0], dtype=torch.float64)
    found = []
    for has_old, has_sampler, has_weights in itertools.product((False, True), repeat=3):
        given: dict[str, Any] = {"advantages": advantage}
        given |= {"old": old} if has_old else {}
        given |= {"sampler_logprobs": sampler} if has_sampler else {}
        given |= {"weights": weights} if has_weights else {}
        found.append(given)
    return found


@pytest.mark.parametrize("merged_ids", [(), GROUPS])
@pytest.mark.parametrize("chunk_rows", [None, 1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_agrees_with_the_definition(
    dtype: torch.dtype, tolerance: float, chunk_rows: int | None, merged_ids: tuple[tuple[int, ...], ...]
) -> None:
    hidden, head = make(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    num_clipped = 0
    for given in options(hidden, head, merged_ids):
        ours = linear_policy_gradient(
            hidden, head, TARGETS, **given, importance_cap=1.5, merged_ids=merged_ids, chunk_rows=chunk_rows
        )
        spec = naive(exact[0], exact[1], given, merged_ids=merged_ids, cap=1.5)
        for name, value in spec.items():
            torch.testing.assert_close(
                getattr(ours, name).detach().double(), value.detach(), atol=tolerance, rtol=tolerance, msg=name
            )
        theirs = torch.autograd.grad(spec["total"], exact)
        for mine, other in zip(torch.autograd.grad(ours.total, (hidden, head)), theirs, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine.double(), other, atol=tolerance, rtol=tolerance)
        num_clipped += int(ours.clipped.sum())
    assert num_clipped == 16  # two tokens above and two below, in each of the four cases with an old policy


@pytest.mark.parametrize("merged_ids", [(), GROUPS])
def test_gradcheck(merged_ids: tuple[tuple[int, ...], ...]) -> None:
    """Against finite differences, where the importance weights are constants of the caller."""
    hidden, head = make()
    given = next(x for x in options(hidden, head, merged_ids) if "old" in x and "weights" in x)

    def total(*models: Tensor) -> Tensor:
        return linear_policy_gradient(*models, TARGETS, **given, merged_ids=merged_ids, chunk_rows=3).total

    assert torch.autograd.gradcheck(total, (hidden, head))


def test_a_merged_stop_is_the_mean_of_the_stops_that_could_have_been_drawn() -> None:
    """The gradient of either stop token, weighted by how likely each is, is the merged action's gradient."""
    hidden, head = (x.detach()[:n].requires_grad_() for x, n in zip(make(), (1, V), strict=True))
    stops = (3, 17)
    p = torch.softmax(hidden @ head.T, -1)[0, list(stops)].detach()

    def gradient(target: int, merged_ids: tuple[tuple[int, ...], ...]) -> Tensor:
        felt = linear_policy_gradient(hidden, head, torch.tensor([target]), torch.ones(1), merged_ids=merged_ids)
        return torch.autograd.grad(felt.total, head)[0]

    mean = sum(share * gradient(stop, ()) for share, stop in zip(p / p.sum(), stops, strict=True))
    for stop in stops:
        torch.testing.assert_close(gradient(stop, (stops,)), mean)
    assert (gradient(3, ()) - mean).abs().max() > 0.01


def test_clipping_takes_the_gradient_where_a_token_has_moved_far_enough() -> None:
    """The four corners of PPO: only a move in the rewarded direction, past the bound, stops teaching."""
    hidden, head = make()
    targets, here = TARGETS[:1], naive(*make(), {"advantages": torch.ones(N)})["action_logprob"].detach()[:1]
    for factor, advantage, is_clipped in ((1.3, 1.0, True), (1.3, -1.0, False), (0.7, -1.0, True), (0.7, 1.0, False)):
        moved = here - torch.tensor(factor).log()
        old = ActionLogprobs(moved, moved)
        felt = linear_policy_gradient(hidden[:1], head, targets, torch.tensor([advantage]), old=old)
        gradient = torch.autograd.grad(felt.total, head)[0]
        assert bool(felt.clipped) == is_clipped == (gradient.abs().max() == 0)
        assert float(felt.ratio) == pytest.approx(factor)


# What `python -m benchmarks.policy_gradient` printed with TRL 1.16.0.
PINNED = {
    "first_step": {
        "loss": -0.1440582275390625,
        "head_norm": 0.8346101641654968,
        "layer_norm": 0.11409406363964081,
        "embedding_norm": 0.5874501466751099,
        "head_entry": 0.01473174523562193,
        "other_head_entry": -0.08473781496286392,
        "layer_entry": 0.00848760362714529,
    },
    "clipped": {
        "loss": -0.08911433070898056,
        "head_norm": 0.6808767318725586,
        "layer_norm": 0.07206331193447113,
        "embedding_norm": 0.28020623326301575,
        "head_entry": 0.010412488132715225,
        "other_head_entry": -0.05544951558113098,
        "layer_entry": 0.0029217859264463186,
    },
    "dr_grpo": {
        "loss": -0.023197485134005547,
        "head_norm": 0.17723999917507172,
        "layer_norm": 0.01875888742506504,
        "embedding_norm": 0.07294090837240219,
        "head_entry": 0.0027104897890239954,
        "other_head_entry": -0.014434142038226128,
        "layer_entry": 0.0007605734863318503,
    },
    "importance": {
        "loss": -0.049586743116378784,
        "head_norm": 0.7617398500442505,
        "layer_norm": 0.06281746923923492,
        "embedding_norm": 0.3679710924625397,
        "head_entry": 0.009857382625341415,
        "other_head_entry": -0.051768623292446136,
        "layer_entry": 0.002096964279189706,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_trl(name: str) -> None:
    case, made, given = CASES[name], model(), inputs()
    kept = given["completion_mask"].bool()
    now = logprobs(made, given)
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1)
    hidden_ND = made.model(ids).last_hidden_state[:, NUM_PROMPT - 1 : -1][kept]
    values = group_advantages(REWARDS, divide=not case.dr_grpo)
    assert values == pytest.approx(advantages(divide=not case.dr_grpo), rel=1e-6)
    moved = (now + given["old_difference"])[kept]
    felt = linear_policy_gradient(
        hidden_ND,
        made.lm_head.weight,
        given["completion_ids"][kept],
        torch.tensor(values)[:, None].expand_as(kept)[kept],
        old=ActionLogprobs(moved, moved) if case.old else None,
        sampler_logprobs=(now + given["sampler_difference"])[kept] if case.sampler else None,
        clip=Clip(CLIP_LOW, CLIP_HIGH),
        importance_cap=IMPORTANCE_CAP,
    )
    loss = felt.total / (NUM_RESPONSES * LIMIT if case.dr_grpo else int(kept.sum()))
    loss.backward()
    assert fingerprint(loss.detach(), made) == pytest.approx(PINNED[name], rel=1e-4, abs=1e-6)


def test_no_tensor_has_all_rows_times_the_vocabulary() -> None:
    torch.manual_seed(0)
    rows, vocab, chunk_rows = 256, 300, 8
    hidden, head = torch.randn(rows, D, requires_grad=True), torch.randn(vocab, D, requires_grad=True)
    targets = torch.arange(rows)
    with LargestTensor() as seen:
        felt = linear_policy_gradient(
            hidden, head, targets, torch.ones(rows), merged_ids=((1, 2),), chunk_rows=chunk_rows
        )
        felt.total.backward()
    tile = vocab * chunk_rows
    assert seen.fits(max(tile, vocab * D), tile=tile, models=1, dtype=torch.float32)


def test_only_the_total_carries_a_gradient_and_bad_input_is_a_sentence() -> None:
    hidden, head = make()
    ones = torch.ones(N)
    felt = linear_policy_gradient(hidden, head, TARGETS, ones)
    assert [name for name in PolicyGradient.__slots__ if getattr(felt, name).requires_grad] == ["total"]
    for change, sentence in (
        ({"advantages": ones[:3]}, "advantages has shape"),
        ({"sampler_logprobs": ones[:3]}, "sampler_logprobs has shape"),
        ({"old": ActionLogprobs(ones, ones[:2])}, "old has shape"),
        ({"clip": Clip(1.5, 0.2)}, "low must lie between 0 and 1"),
        ({"importance_cap": 0.5}, "at least 1"),
        ({"merged_ids": ((1, 1),)}, "merged_ids"),
    ):
        given: dict[str, Any] = {"advantages": ones, **change}
        with pytest.raises(UserError, match=sentence):
            linear_policy_gradient(hidden, head, TARGETS, **given)
