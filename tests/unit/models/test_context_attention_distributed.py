"""Attention over positions that are cut over ranks against one process: values and all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.models.attention import CoreAttention
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.parallel.context import ContextParallel
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from tests.support.pool import WorkerPool

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of attention inputs, the same on every rank."""

    s: int = 48
    n: int = 4
    g: int = 2
    sub_rows: tuple[tuple[int, ...], ...] | None = None
    window: int | None = None
    dtype: torch.dtype = torch.float64
    value_width: int = 8

    def make(self) -> list[Tensor]:
        """Query, key, value and the gradient of the result."""
        generator = torch.Generator().manual_seed(self.s)
        value = self.value_width
        sizes = ((self.n, 8), (self.g, 8), (self.g, value), (self.n, value))
        return [torch.randn(self.s, 2, *size, generator=generator).to(self.dtype) for size in sizes]


def attend(rows: Rows, inputs: Sequence[Tensor], context: ContextParallel | None) -> list[Tensor]:
    """Result and gradients of query, key and value."""
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8 * rows.n, num_attention_heads=rows.n, attention_dropout=0.0
    )
    attention = CoreAttention(config, 1, None, "self", sliding_window=rows.window, context_parallel=context)
    query, key, value = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    out = attention(query, key, value, packed_seq_params=ForwardContext(sub_rows=rows.sub_rows))
    grads = torch.autograd.grad(out, (query, key, value), inputs[3].flatten(2))
    return [out.detach(), *grads]


def attend_on_rank(algo: str, size: int, ulysses: int | None, several: Sequence[Rows]) -> list[list[Tensor]]:
    """For each of the rows the positions of this rank, then what it finds there."""
    parallel = ParallelConfig(
        context_parallel_size=size, context_parallel_algo=algo, ulysses_degree_in_cp=ulysses
    )
    groups, _ = initialize_groups(parallel, seed=1)
    try:
        found = []
        for rows in several:
            positions = groups.context.positions(rows.s)
            cut = [tensor[positions] for tensor in rows.make()]
            found.append([positions, *attend(rows, cut, groups.context)])
        return found
    finally:
        destroy_groups()


PACKED = (((5, 20, 1, 22), (48,)), ((24, 24), (3, 3, 42)), ((1, 47), (12, 12, 12, 12)))
ROWS = [
    Rows(),
    Rows(n=4, g=4),
    Rows(s=80),
    *(Rows(sub_rows=sub_rows) for sub_rows in PACKED),
    *(Rows(window=window) for window in (1, 5, 20, 47, 90)),
    Rows(sub_rows=PACKED[0], window=7),
    Rows(n=4, g=4, value_width=5),
    Rows(sub_rows=PACKED[1], value_width=11),
]
ONE_HEAD = [Rows(g=1), Rows(g=1, sub_rows=PACKED[0])]
ALGORITHMS = [
    pytest.param("ulysses_cp_algo", 2, None, id="ulysses"),
    pytest.param("ulysses_cp_algo", 4, None, id="ulysses of twice the heads"),
    pytest.param("megatron_cp_algo", 2, None, id="ring of two"),
    pytest.param("megatron_cp_algo", 3, None, id="ring of three"),
    pytest.param("megatron_cp_algo", 4, None, id="ring of four"),
    pytest.param("hybrid_cp_algo", 4, 2, id="hybrid"),
]


@pytest.mark.parametrize(("algo", "size", "ulysses"), ALGORITHMS)
def test_one_process_finds_the_same(algo: str, size: int, ulysses: int | None, workers: WorkerPool) -> None:
    several = [rows for rows in [*ROWS, *ONE_HEAD] if rows.s % (2 * size) == 0]
    ranks = workers.run(size, attend_on_rank, algo, size, ulysses, several)
    for index, rows in enumerate(several):
        expected = attend(rows, rows.make(), None)
        positions = torch.cat([rank[index][0] for rank in ranks])
        assert sorted(positions.tolist()) == list(range(rows.s))
        for part, want in enumerate(expected, start=1):
            found = torch.cat([rank[index][part] for rank in ranks])
            difference = float((found - want[positions]).abs().max())
            assert difference < 1e-11, f"{rows}: {('result', 'query', 'key', 'value')[part - 1]}"


def test_half_precision_is_merged_in_float32(workers: WorkerPool) -> None:
    rows = Rows(s=64, dtype=torch.bfloat16)
    ranks = workers.run(4, attend_on_rank, "megatron_cp_algo", 4, None, [rows])
    exact = attend(rows, [tensor.double() for tensor in rows.make()], None)
    positions = torch.cat([rank[0][0] for rank in ranks])
    for part, want in enumerate(exact, start=1):
        found = torch.cat([rank[0][part] for rank in ranks])
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.double(), want[positions], rtol=0.02, atol=0.02)
