"""Whole tensors put together from what the ranks hold, and how far two tensors are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shard:
    """Elements ``positions`` of a flattened canonical tensor, as one rank has them."""

    name: str
    shape: tuple[int, ...]
    positions: torch.Tensor
    """``[n]`` int64."""
    values: torch.Tensor
    """``[n]`` float32."""


def assemble(shards_of_ranks: Iterable[Iterable[Shard]]) -> Tensors:
    """The whole tensors of all ranks' shards.

    Raises:
        AssertionError: two ranks hold different bits of the same element, or an element is held by none.
    """
    whole: Tensors = {}
    held: Tensors = {}
    for rank, shards in enumerate(shards_of_ranks):
        for shard in shards:
            tensor = whole.setdefault(shard.name, torch.zeros(shard.shape)).view(-1)
            known = held.setdefault(shard.name, torch.zeros(shard.shape, dtype=torch.bool)).view(-1)
            assert known.numel() == torch.Size(shard.shape).numel(), (
                f"{shard.name}: ranks disagree on its shape"
            )
            again = known[shard.positions]
            same = tensor[shard.positions][again].view(torch.int32) == shard.values[again].view(torch.int32)
            assert bool(same.all()), f"{shard.name}: rank {rank} holds other bits than a rank before it"
            tensor[shard.positions] = shard.values
            known[shard.positions] = True
    for name, known in held.items():
        assert bool(known.all()), f"{name}: {int((~known).sum())} elements are held by no rank"
    return whole


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of the expected tensor, in float64; 0 where both are zero."""
    difference = (found.double() - expected.double()).norm()
    size = expected.double().norm()
    return float(difference / size) if size > 0 else float(difference)


def largest_relative_difference(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> float:
    """Of all tensors, which must bear the same names in both."""
    assert set(found) == set(expected), f"differing names: {sorted(set(found) ^ set(expected))[:4]}"
    return max(relative_difference(found[name], expected[name]) for name in expected)
