"""Slots of a cache: which are read together, which change places, and that each holds its own row's tokens."""

from __future__ import annotations

import pytest
import torch

from distill import kv_cache
from distill.kv_cache import Decoding, Group, SlotCache, arranged, groups_of


def test_slots_are_read_in_groups_where_that_saves_enough() -> None:
    lengths = [100, 90, 50, 45, 10]
    assert groups_of(lengths, worth=1) == [Group(0, 2, 100), Group(2, 4, 50), Group(4, 5, 10)]
    assert groups_of(lengths, worth=100) == [Group(0, 2, 100), Group(2, 5, 50)]
    assert groups_of(lengths, worth=1000) == [Group(0, 5, 100)]
    # A long row behind a short one: the short one is read as far.
    assert groups_of([10, 10, 100], worth=1) == [Group(0, 3, 100)]
    assert groups_of([], worth=1) == []


def test_rows_are_sorted_into_groups_and_stay_where_they_belong_already() -> None:
    lengths = [90, 10, 100, 50, 12, 45]
    order = arranged(lengths, worth=1)
    assert sorted(order) == list(range(6))
    assert groups_of([lengths[slot] for slot in order], worth=1) == [Group(0, 2, 100), Group(2, 4, 50), Group(4, 6, 12)]
    # Slots 0, 3 and 4 are within their groups' slots.
    assert [order[slot] for slot in (0, 3, 4)] == [0, 3, 4]


def test_a_slot_holds_its_own_row_through_growth_moves_and_shared_prompts() -> None:
    torch.manual_seed(0)
    cache, heads, width = SlotCache(), 2, 4

    def write(slots: list[int], places: list[int], sources: list[int]) -> torch.Tensor:
        states = torch.randn(max(sources) + 1, heads, 1, width)
        cache.reserve(3, max(places) + 1, most_places=500)
        cache.expect(torch.tensor(slots), torch.tensor(places), torch.tensor(sources))
        cache.update(states, -states, 0)
        return states[:, :, 0]

    # One prompt of two tokens for slots 0 and 1, another of three for slot 2.
    read = write([0, 0, 1, 1, 2, 2, 2], [0, 1, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4])
    rows = [list(read[:2]), list(read[:2]), list(read[2:])]
    for _ in range(200):
        new = write([0, 1, 2], [len(row) for row in rows], [0, 1, 2])
        for row, token in zip(rows, new, strict=True):
            row.append(token)
    cache.move([2, 1], [203, 202])
    for slot, row in enumerate([rows[2], rows[1]]):
        expected = torch.stack(row, dim=1)
        assert torch.equal(cache.keys[0][slot, :, : len(row)], expected)
        assert torch.equal(cache.values[0][slot, :, : len(row)], -expected)


@pytest.mark.parametrize(
    ("dtype", "many_rows"), [(torch.float32, 1), (torch.float32, 3), (torch.float32, 99), (torch.float64, 1)]
)
def test_a_token_attends_to_its_own_places_alone(
    dtype: torch.dtype, many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against attention in float64, row by row; what lies behind a row's length is another row's."""
    monkeypatch.setattr(kv_cache, "MANY_ROWS", many_rows)
    torch.manual_seed(1)
    cache, lengths = SlotCache(), [9, 8, 3, 3]
    cache.reserve(4, 9, most_places=9)
    cache.keys, cache.values = [torch.randn(4, 2, 9, 8, dtype=dtype)], [torch.randn(4, 2, 9, 8, dtype=dtype)]
    query = torch.randn(4, 6, 1, 8, dtype=dtype)
    decoding = Decoding.of(cache, groups_of(lengths, cache.worth()), torch.tensor(lengths) - 1, dtype)
    assert decoding.groups == [Group(0, 4, 9)]  # too small a cache for groups
    apart = Decoding(cache, 4, groups_of(lengths, worth=1), decoding.bias_BC)
    assert len(apart.groups) == 2
    for found in (decoding.attend(query, 0, 0.5), apart.attend(query, 0, 0.5)):
        assert found.shape == (4, 1, 6, 8)
        for row, length in enumerate(lengths):
            for head in range(6):
                keys, values = (rooms[0][row, head // 3, :length].double() for rooms in (cache.keys, cache.values))
                weights = (0.5 * keys @ query[row, head, 0].double()).softmax(dim=0)
                torch.testing.assert_close(found[row, 0, head].double(), weights @ values, atol=1e-6, rtol=1e-5)
