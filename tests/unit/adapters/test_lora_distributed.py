"""Column- and row-parallel LoRA over TP ranks against the dense formula: output, every gradient, dropout."""

from __future__ import annotations

import os

import pytest
import torch

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from tests.support.pool import WorkerPool
from tests.unit.adapters.dense import PROBLEMS, Problem, Result, dense, linear, sharded


def _join() -> ParallelGroups:
    tp = int(os.environ["WORLD_SIZE"])
    return initialize_groups(ParallelConfig(tensor_model_parallel_size=tp), seed=1)[0]


def on_rank(problem: Problem, kind: str, sequence_parallel: bool) -> Result:
    groups = _join()
    result = sharded(problem, kind, groups, sequence_parallel)
    destroy_groups()
    return result


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_column(workers: WorkerPool, name: str, sequence_parallel: bool) -> None:
    ranks = workers.run(2, on_rank, PROBLEMS[name], "column", sequence_parallel)
    expected = dense(PROBLEMS[name], blocks=2)
    close(torch.cat([rank.output for rank in ranks], dim=2), expected.output)
    if sequence_parallel:
        close(torch.cat([rank.grad_x for rank in ranks]), expected.grad_x)
    for part, want in enumerate(expected.grad_a):
        shares = [rank.grad_a[part] for rank in ranks]
        if sequence_parallel:
            close(sum(shares), want)
        for share in [] if sequence_parallel else shares:
            close(share, want)
        close(torch.cat([rank.grad_b[part] for rank in ranks]), expected.grad_b[part])
    for rank in [] if sequence_parallel else ranks:
        close(rank.grad_x, expected.grad_x)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_row(workers: WorkerPool, name: str, sequence_parallel: bool) -> None:
    ranks = workers.run(2, on_rank, PROBLEMS[name], "row", sequence_parallel)
    expected = dense(PROBLEMS[name])
    if sequence_parallel:
        close(torch.cat([rank.output for rank in ranks]), expected.output)
    for rank in [] if sequence_parallel else ranks:
        close(rank.output, expected.output)
    close(torch.cat([rank.grad_x for rank in ranks], dim=2), expected.grad_x)
    for part, want in enumerate(expected.grad_b):
        shares = [rank.grad_b[part] for rank in ranks]
        if sequence_parallel:
            close(sum(shares), want)
        for share in [] if sequence_parallel else shares:
            close(share, want)
        close(torch.cat([rank.grad_a[part] for rank in ranks], dim=1), expected.grad_a[part])


def dropped(kind: str) -> torch.Tensor:
    """What is left of ones ``[40, 2, 8]`` behind dropout, through a zero base and factors that are the identity."""
    groups = _join()
    rank, tp = groups.tp_rank, groups.tp_size
    rows = 8 * tp if kind == "column" else 8
    layer, x = linear(Problem(parts=((0, rows, 8, 1.0),), s=40, out_features=rows), kind, groups)
    layer.dropout = 0.5
    eye = torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.parts[0].lora_a.copy_(eye if kind == "column" else eye.chunk(tp, dim=1)[rank])
        layer.parts[0].lora_b.copy_(eye)
    out = layer.train()(torch.ones_like(x))[0].detach()
    destroy_groups()
    return out


def test_ranks_that_hold_the_same_input_drop_the_same(workers: WorkerPool) -> None:
    first, second = workers.run(2, dropped, "column")
    assert torch.equal(first, second)
    assert (first == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_ranks_that_hold_other_features_drop_others(workers: WorkerPool) -> None:
    first, second = workers.run(2, dropped, "row")
    assert torch.equal(first, second), "one sum over both ranks"
    assert not torch.equal(first[..., :4], first[..., 4:])
    assert (first == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
