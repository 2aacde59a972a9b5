from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from comparison.profile_parts import (
    ADAPTERS,
    ATTENTION,
    ELEMENT_WISE,
    FROZEN,
    LOSS,
    OPTIMIZER,
    OPTIMIZER_RANGE,
    PARTS,
    REST,
    operations,
    parts_of,
    plain_products,
    slowest,
)
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile, record_function

from mindspeed_lora.models.attention_tiles import Tile, Visible
from mindspeed_lora.models.tiled_attention import tiled_attention


@dataclass
class MadeEvent:
    name: str
    self_cpu_time_total: float
    """Microseconds."""
    input_shapes: Sequence[Sequence[int]] = ()
    cpu_parent: MadeEvent | None = None


def test_each_event_belongs_to_one_part_and_the_rest_is_what_none_explains() -> None:
    optimizer = MadeEvent(OPTIMIZER_RANGE, 1000.0)
    loss = MadeEvent("_ChunkedCrossEntropy", 2000.0)
    node = MadeEvent("autograd::engine::evaluate_function: MmBackward0", 500.0)
    events = [
        optimizer,
        MadeEvent("aten::add_", 3000.0, cpu_parent=optimizer),
        loss,
        MadeEvent("aten::mm", 4000.0, [[10, 8], [8, 1000]], cpu_parent=loss),
        node,
        MadeEvent("aten::mm", 5000.0, [[50, 8], [8, 20]], cpu_parent=node),
        MadeEvent("aten::mm", 6000.0, [[50, 8], [8, 4]]),
        MadeEvent("aten::mul", 7000.0, [[50, 8], []]),
    ]
    parts = parts_of(events, wall_ms=40.0, rank=4)
    assert tuple(parts) == PARTS
    times = {name: part.ms for name, part in parts.items()}
    explained = {OPTIMIZER: 4.0, LOSS: 6.0, FROZEN: 5.0, ADAPTERS: 6.0, ELEMENT_WISE: 7.0, ATTENTION: 0.0}
    assert times == pytest.approx({**explained, REST: 12.0})
    assert parts[LOSS].gflop == pytest.approx(2 * 10 * 8 * 1000 / 1e9)
    assert parts[FROZEN].gflop == pytest.approx(2 * 50 * 8 * 20 / 1e9)
    assert parts[ADAPTERS].gflop == pytest.approx(2 * 50 * 8 * 4 / 1e9)
    assert parts[ELEMENT_WISE].gflop == 0


def test_the_work_of_products_and_of_causal_attention_is_counted() -> None:
    """Events of the profiler itself, so that a change of torch's names shows."""
    left, right, bias = torch.randn(6, 5), torch.randn(5, 7), torch.randn(7)
    query, key = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(2))
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
        record_function(OPTIMIZER_RANGE),
    ):
        torch.addmm(bias, left, right)
        left @ right
        torch.bmm(torch.randn(3, 6, 5), torch.randn(3, 5, 7))
        scaled_dot_product_attention(query, key, key, is_causal=True).sum().backward()
    events = profiler.events()
    work = [operations(event) for event in events if operations(event)]
    pairs = 16 * 17 / 2
    attention = 2 * 2 * 4 * 8 * pairs
    assert work == pytest.approx([2 * 210, 2 * 210, 3 * 2 * 210, 2 * attention, 5 * attention])
    assert plain_products(events) == {(6, 5, 7): 2}
    names = [name for name, _, _ in slowest(events, 3)]
    assert len(names) == 3


def test_the_slowest_operations_come_first() -> None:
    events = [MadeEvent("a", 1000.0), MadeEvent("b", 1500.0), MadeEvent("a", 1000.0), MadeEvent("c", 10.0)]
    assert slowest(events, 2) == [("a", 2, 2.0), ("b", 1, 1.5)]


def test_our_own_attention_is_attention() -> None:
    """Its products are plain batched ones."""
    query, key = (torch.randn(256, 1, 4, 8, requires_grad=True) for _ in range(2))
    tile = Tile(slice(0, 1), slice(0, 256), slice(0, 256), Visible.CAUSAL, own=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        tiled_attention(query, key, key, [tile], 1.0).sum().backward()
    parts = parts_of(profiler.events(), wall_ms=0.0, rank=4)
    assert parts[ATTENTION].gflop > 0
    assert parts[FROZEN].gflop == parts[ADAPTERS].gflop == 0
