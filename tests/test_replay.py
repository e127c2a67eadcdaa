"""Passes that are replayed: round shapes, idle rows and what a captured pass may rely on.

The capture is a stand-in that does the work again with what was fixed at the time; the real one needs a GPU
(test_gpu.py).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_sampler import Endless, endless, model, request, sampler
from torch import Tensor
from transformers import Qwen3ForCausalLM

from distill.kv_cache import Group, SlotCache
from distill.replay import Replays, replays, rounded_rows
from distill.sampler import TransformersSampler

__all__ = ["model"]  # a fixture


def test_rows_are_filled_up_to_round_numbers() -> None:
    assert [rounded_rows(num) for num in (1, 2, 3, 5, 8, 9, 16, 17, 63, 64, 65, 100, 129, 256, 257)] == [
        *(1, 2, 4, 8, 8, 16, 16, 24, 64, 64, 72, 104, 144, 256, 288)
    ]
    assert all(num <= rounded_rows(num) <= max(num + 7, num * 9 / 8) for num in range(1, 2000))


class Captures:
    """Stand-ins for captured passes, which fail where a real one would read memory that is given up."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0
        self.shapes: set[tuple[int, tuple[Group, ...]]] = set()

    def replays(
        self, model: object, cache: SlotCache, forward: Callable[[Tensor, Tensor, Sequence[Group]], Tensor]
    ) -> Replays:
        def watched(id_B: Tensor, place_B: Tensor, groups: Sequence[Group]) -> Tensor:
            self.shapes.add((len(id_B), tuple(groups)))
            return forward(id_B, place_B, groups)

        def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
            self.num_captured += 1
            rooms = [room.data_ptr() for room in (*cache.keys, *cache.values)]
            found = torch.full_like(work(), torch.nan)

            def again() -> Tensor:
                self.num_replayed += 1
                assert rooms == [room.data_ptr() for room in (*cache.keys, *cache.values)]
                return found.copy_(work())

            return again

        return Replays(cache, watched, lambda: capture, torch.device("cpu"))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr("distill.sampler.replays", found.replays)
    return found


@pytest.mark.parametrize("batch", [5, 64])
@pytest.mark.parametrize("worth", [1.0, 1e9])
def test_replayed_passes_say_what_passes_say(
    model: Qwen3ForCausalLM, captures: Captures, monkeypatch: pytest.MonkeyPatch, batch: int, worth: float
) -> None:
    requests = [
        *(request(seed, length=3 + seed % 7, max_new_tokens=100 + seed) for seed in range(20)),
        *(request(seed, length=70, max_new_tokens=40, temperature=0.7, top_k=5) for seed in range(20, 24)),
    ]
    monkeypatch.setattr(SlotCache, "worth", lambda cache: worth)
    ours = [endless(model, batch).generate(requests), sampler(model, batch).generate(requests)]
    assert captures.num_replayed > 4 * captures.num_captured > 0
    assert worth > 1 or max(len(groups) for _, groups in captures.shapes) > 1
    monkeypatch.undo()
    plain = [endless(model, batch).generate(requests), sampler(model, batch).generate(requests)]
    for mine, theirs in zip(ours[0] + ours[1], plain[0] + plain[1], strict=True):
        assert mine.response_ids == theirs.response_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_shapes_come_again(model: Qwen3ForCausalLM, captures: Captures) -> None:
    """64 rows of 200 tokens: one shape for each 64 places, captured once where the cache does not move meanwhile."""
    endless(model).generate([request(seed, max_new_tokens=200) for seed in range(64)])
    assert {rows for rows, _ in captures.shapes} == {64}
    assert captures.num_captured <= 6
    assert captures.num_captured + captures.num_replayed >= 199 - 6


def test_idle_rows_count_against_the_cache(
    model: Qwen3ForCausalLM, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """17 tokens a row at its limit: twelve rows would fill 204 tokens, and are made sixteen."""
    rooms: list[int] = []
    reserve = SlotCache.reserve

    def watched(cache: SlotCache, num_slots: int, num_places: int, *, most_places: int) -> None:
        reserve(cache, num_slots, num_places, most_places=most_places)
        rooms.append(num_slots * cache.num_places)

    monkeypatch.setattr(SlotCache, "reserve", watched)
    requests = [request(seed, max_new_tokens=12) for seed in range(24)]
    ours = TransformersSampler(model, Endless(), speaker="student", cache_tokens=210)  # type: ignore[arg-type]
    assert len(ours.generate(requests)) == 24
    assert max(rooms) <= 210


def test_the_oldest_passes_are_given_up_where_they_are_many(
    model: Qwen3ForCausalLM, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.replay.MOST_CAPTURED", 1)
    monkeypatch.setattr("distill.kv_cache.ROOM", 2000)
    asked = [request(seed, max_new_tokens=300) for seed in range(4)]
    said = endless(model).generate(asked)
    assert captures.num_captured >= 4
    monkeypatch.setattr("distill.sampler.replays", lambda *arguments: None)
    assert [one.response_ids for one in said] == [one.response_ids for one in endless(model).generate(asked)]


def test_captured_passes_are_given_up_at_once(model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a sampler that is interrupted; nothing waits for the garbage collector."""
    held: list[weakref.ref[Any]] = []

    class Watched(Captures):
        def replays(self, *arguments: Any) -> Replays:
            held.append(weakref.ref(arguments[1]))  # the cache, whose memory the training step wants
            found = super().replays(*arguments)
            capture = found._capture

            def watched(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
                again = capture(work)
                held.append(weakref.ref(again))
                return again

            found._capture, found._new_capture = watched, lambda: watched
            return found

    def interrupted(rollout: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.sampler.replays", Watched().replays)
    asked = [request(seed, max_new_tokens=30) for seed in range(4)]
    gc.disable()
    try:
        endless(model).generate(asked)
        with pytest.raises(KeyboardInterrupt):
            endless(model).generate(asked, on_finished=interrupted)
        assert len(held) >= 4 and not any(one() for one in held)
    finally:
        gc.enable()


def test_none_without_a_gpu(model: Qwen3ForCausalLM) -> None:
    def never(*arguments: Any) -> Tensor:
        raise AssertionError

    assert replays(model, SlotCache(), never) is None
