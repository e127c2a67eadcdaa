"""Examples to tensors: sequences packed side by side, and which row of the hidden states predicts which token.

Legend: T tokens of all sequences together, N response tokens among them, d a teacher's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.attention import Packing
from distill.types import (
    ActionLogprobs,
    Advantage,
    Example,
    HiddenStates,
    SampledLogprobs,
    Signal,
    TopK,
)


@dataclass(frozen=True, slots=True)
class Advantages:
    """``Advantage`` of all sequences together: ``value_N`` a number a token, the rest concatenated."""

    value_N: Tensor
    old: ActionLogprobs | None
    anchor: HiddenStates | None


BatchSignal = HiddenStates | TopK | SampledLogprobs | Advantages | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples as one forward pass over one row, without padding.

    ``position_T`` starts again at 0 with every sequence, and ``packing`` keeps attention within it. ``row_N`` indexes
    the row: entry n is where response token ``target_N[n]`` is predicted, rows P-1 .. P+R-2 of its sequence.
    ``weight_N`` is 0 for forced tokens. ``last_N`` marks each response's last token. ``signal`` is what the judge said,
    concatenated over the sequences; None where nobody judged.
    """

    input_T: Tensor
    position_T: Tensor
    packing: Packing
    row_N: Tensor
    target_N: Tensor
    weight_N: Tensor
    think_N: Tensor
    last_N: Tensor
    sampled_logprob_N: Tensor
    signal: BatchSignal

    @property
    def num_weighted(self) -> float:
        """Tokens that carry loss."""
        return float(self.weight_N.sum())


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """One batch of all ``examples``, side by side."""
    rollouts = [example.rollout for example in examples]
    widths = [len(rollout.read_ids) for rollout in rollouts]
    rows: list[int] = []
    start = 0
    for rollout, width in zip(rollouts, widths, strict=True):
        rows.extend(range(start + len(rollout.prompt_ids) - 1, start + width))
        start += width

    def per_token(dtype: torch.dtype, values: list[float] | list[int] | list[bool]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return Batch(
        input_T=per_token(torch.long, [token for rollout in rollouts for token in rollout.read_ids]),
        position_T=per_token(torch.long, [place for width in widths for place in range(width)]),
        packing=Packing.of(widths, device),
        row_N=per_token(torch.long, rows),
        target_N=per_token(torch.long, [token for rollout in rollouts for token in rollout.response_ids]),
        weight_N=per_token(torch.float32, [float(kept) for rollout in rollouts for kept in rollout.loss_mask]),
        think_N=per_token(
            torch.bool,
            [rollout.mode == "think" for rollout, r in zip(rollouts, lengths, strict=True) for _ in range(r)],
        ),
        last_N=per_token(torch.bool, [i == r - 1 for r in lengths for i in range(r)]),
        sampled_logprob_N=per_token(torch.float32, [value for rollout in rollouts for value in rollout.logprobs]),
        signal=_join(examples, device),
    )


def judged(batch: Batch, examples: Sequence[Example], device: torch.device) -> Batch:
    """``batch``, which was collated before anybody had judged, with what was said of its ``examples`` since."""
    return replace(batch, signal=_join(examples, device))


def _join(examples: Sequence[Example], device: torch.device) -> BatchSignal:
    """All examples' signals as one; every example of a batch was judged in the same way."""
    signals = [example.signal for example in examples]
    kinds = {type(signal) for signal in signals}
    assert len(kinds) == 1, f"a batch mixes signals: {sorted(kind.__name__ for kind in kinds)}"
    match signals[0]:
        case None:
            return None
        case HiddenStates():
            return _join_states(examples, [signal for signal in signals if isinstance(signal, HiddenStates)], device)
        case TopK():
            top = [signal for signal in signals if isinstance(signal, TopK)]
            return TopK(
                torch.cat([signal.ids_RK for signal in top]).to(device),
                torch.cat([signal.logprobs_RK for signal in top]).to(device),
                torch.cat([signal.tail_logprob_R for signal in top]).to(device),
            )
        case SampledLogprobs():
            sampled = [signal.logprobs_R for signal in signals if isinstance(signal, SampledLogprobs)]
            return SampledLogprobs(torch.cat(sampled).to(device))
        case Advantage():
            return _join_advantages(examples, [x for x in signals if isinstance(x, Advantage)], device)


def _join_states(examples: Sequence[Example], signals: Sequence[HiddenStates], device: torch.device) -> HiddenStates:
    teachers = {signal.teacher for signal in signals}
    assert len(teachers) == 1, f"a batch mixes teachers: {sorted(teachers)}"
    for example, signal in zip(examples, signals, strict=True):
        assert len(signal.states_Rd) == len(example.rollout.response_ids)
    return HiddenStates(torch.cat([signal.states_Rd for signal in signals]).to(device), teachers.pop())


def _join_advantages(examples: Sequence[Example], signals: Sequence[Advantage], device: torch.device) -> Advantages:
    values = [
        signal.value for example, signal in zip(examples, signals, strict=True) for _ in example.rollout.response_ids
    ]
    old = [signal.old for signal in signals if signal.old is not None]
    anchors = [signal.anchor for signal in signals if signal.anchor is not None]
    assert len(old) in (0, len(signals)) and len(anchors) in (0, len(signals)), "a batch mixes kinds of advantages"
    return Advantages(
        torch.tensor(values, dtype=torch.float32, device=device),
        ActionLogprobs(
            torch.cat([policy.token_R for policy in old]).to(device),
            torch.cat([policy.action_R for policy in old]).to(device),
        )
        if old
        else None,
        _join_states(examples, anchors, device) if anchors else None,
    )


def micro_batches(examples: Sequence[Example], max_tokens: int | None) -> list[list[Example]]:
    """``examples`` in groups of at most ``max_tokens`` tokens, as few as the longest-first rule finds.

    Short sequences fill the room that long ones leave. A single longer sequence is a group of its own. None sets no
    bound. A group holds states of one teacher only: one LM head makes its logits.
    """
    by_teacher: dict[str | None, list[Example]] = {}
    for example in examples:
        by_teacher.setdefault(_teacher_of(example.signal), []).append(example)
    return [group for judged in by_teacher.values() for group in _filled(judged, max_tokens)]


def _teacher_of(signal: Signal | None) -> str | None:
    """Whose head the signal needs."""
    states = signal.anchor if isinstance(signal, Advantage) else signal
    return states.teacher if isinstance(states, HiddenStates) else None


def _filled(examples: Sequence[Example], max_tokens: int | None) -> list[list[Example]]:
    if max_tokens is None:
        return [list(examples)]
    groups: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.rollout.read_ids)):
        length = len(example.rollout.read_ids)
        place = next((place for place, left in enumerate(room) if length <= left), None)
        if place is None:
            groups.append([example])
            room.append(max_tokens - length)
        else:
            groups[place].append(example)
            room[place] -= length
    return groups
