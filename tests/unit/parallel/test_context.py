from __future__ import annotations

import itertools

import pytest
import torch

from mindspeed_lora.parallel.context import ContextParallel


def places(ulysses: int, ring: int) -> list[ContextParallel]:
    """Every rank's place, in the order of the ranks."""
    return [
        ContextParallel(ulysses_rank=u, ulysses_size=ulysses, ring_rank=r, ring_size=ring)
        for r, u in itertools.product(range(ring), range(ulysses))
    ]


@pytest.mark.parametrize(
    ("ulysses", "ring"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (2, 3), (4, 2)]
)
def test_every_position_is_held_once(ulysses: int, ring: int) -> None:
    length = 2 * ulysses * ring * 3
    parts = [place.positions(length) for place in places(ulysses, ring)]
    assert all(len(part) == length // (ulysses * ring) for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(length))


def test_ulysses_groups_hold_what_their_place_holds_in_order() -> None:
    for ring_rank in range(3):
        group = [place for place in places(2, 3) if place.ring_rank == ring_rank]
        together = torch.cat([place.positions(24) for place in group]).tolist()
        assert together == [p for first, n in group[0].chunks(24) for p in range(first, first + n)]


def test_every_place_of_the_ring_has_as_many_keys_to_see() -> None:
    seen = {int((place.positions(48) + 1).sum()) for place in places(1, 4)}
    assert len(seen) == 1


def test_chunks_of_the_ring() -> None:
    first, last = ContextParallel(ring_rank=0, ring_size=2), ContextParallel(ring_rank=1, ring_size=2)
    assert first.chunks(8) == ((0, 2), (6, 2))
    assert last.chunks(8) == first.chunks(8, ring_rank=1) == ((2, 2), (4, 2))
    assert last.positions(8).tolist() == [2, 3, 4, 5]


def test_without_context_parallelism_a_rank_holds_all() -> None:
    assert ContextParallel().positions(5).tolist() == [0, 1, 2, 3, 4]
    assert ContextParallel().multiple == 1
    assert ContextParallel(ring_size=2, ulysses_size=2).multiple == 8
