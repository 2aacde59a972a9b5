"""Blends take their samples as megatron-core's do, whatever layout asks for them."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from mindspeed_lora.data.blend import BlendedDataset, BlendOrder
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.data.sampling import SampleOrder


class Numbers:
    """Sample i of part p is the token ``1000 p + i``."""

    longest = 1

    def __init__(self, part: int, size: int) -> None:
        self.part, self.size = part, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        assert 0 <= index < self.size
        tokens = np.array([1000 * self.part + index])
        return Sample(tokens, tokens)


def blend(sizes: list[int], weights: list[float] | None = None) -> BlendedDataset[Numbers]:
    return BlendedDataset([Numbers(part, size) for part, size in enumerate(sizes)], weights)


def order(sizes: list[int], weights: list[float] | None = None, **options: bool | int) -> BlendOrder:
    return BlendOrder(blend(sizes, weights), **options)  # type: ignore[arg-type]


def test_samples_of_the_parts() -> None:
    whole = blend([2, 3])
    assert [int(whole[i].input_ids[0]) for i in range(len(whole))] == [0, 1, 1000, 1001, 1002]


@pytest.mark.parametrize("weights", [[0.3, 0.7], [3, 1], [1, 1, 1], [0.123, 5, 0.5, 2.25], [7]], ids=str)
def test_weights_are_megatrons(weights: list[float]) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    count = 10_000
    parts, numbers = np.zeros(count, np.int16), np.zeros(count, np.int64)
    shares = np.array(weights, dtype=np.float64)
    helpers.build_blending_indices(parts, numbers, shares / shares.sum(), len(weights), count, False)
    found = order([5] * len(weights), weights)
    assert [found.part_and_number(i) for i in range(count)] == list(
        zip(parts.tolist(), numbers.tolist(), strict=True)
    )


@pytest.mark.parametrize("sizes", [[3, 7], [5000, 1, 4321], [10, 10, 10], [1, 2, 3, 4, 5]], ids=str)
def test_sizes_are_megatrons_epoch_after_epoch(sizes: list[int]) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    total = sum(sizes)
    parts, numbers = np.zeros(total, np.int16), np.zeros(total, np.int64)
    helpers.build_exhaustive_blending_indices(parts, numbers, np.array(sizes, np.int64), len(sizes))
    found = order(sizes)
    for epoch in (0, 1, 5):
        expected = [(p, n + epoch * sizes[p]) for p, n in zip(parts.tolist(), numbers.tolist(), strict=True)]
        assert [found.part_and_number(epoch * total + i) for i in range(total)] == expected


def test_an_epoch_without_weights_has_each_sample_once() -> None:
    sizes = [3, 7, 4]
    found = order(sizes, shuffle=True, seed=3)
    epochs = [[found.order(14 * epoch + i) for i in range(14)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert epochs[0] != epochs[1], "the parts are shuffled anew"


def test_a_part_goes_on_in_its_own_order() -> None:
    """With weights a small part comes round again, in the order that it has alone."""
    sizes = [4, 100]
    found = order(sizes, [0.5, 0.5], seed=9)
    of_first = [index for i in range(40) if (index := found.order(i)) < 4]
    alone = SampleOrder(4, seed=9)
    assert of_first == [alone.order(i) for i in range(20)]
    counts = collections.Counter(order(sizes, [3, 1]).part_and_number(i)[0] for i in range(400))
    assert counts == {0: 300, 1: 100}


def test_any_sample_can_be_asked_for() -> None:
    """A resumed run asks for a late one first."""
    found, again = order([50, 9000, 77], [0.2, 0.5, 0.3]), order([50, 9000, 77], [0.2, 0.5, 0.3])
    late = [found.order(i) for i in range(9000, 9100)]
    for i in range(9100):
        expected = again.order(i)
        assert i < 9000 or late[i - 9000] == expected
