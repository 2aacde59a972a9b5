"""Column- and row-parallel LoRA over TP ranks against the dense formula: output, every gradient, dropout."""

from __future__ import annotations

import os

import pytest
import torch

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from tests.support.pool import WorkerPool
from tests.unit.adapters.dense import PROBLEMS, Problem, Result, dense, sharded


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
        close(sum(rank.grad_a[part] for rank in ranks), want)
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
        close(sum(rank.grad_b[part] for rank in ranks), want)
        close(torch.cat([rank.grad_a[part] for rank in ranks], dim=1), expected.grad_a[part])


def dropped(problem: Problem, kind: str, sequence_parallel: bool) -> Result:
    groups = _join()
    result = sharded(problem, kind, groups, sequence_parallel, dropout=0.4)
    destroy_groups()
    return result


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_dropout_is_that_of_one_process(workers: WorkerPool, kind: str, sequence_parallel: bool) -> None:
    problem = PROBLEMS["shared"]
    (whole,) = workers.run(1, dropped, problem, kind, False)
    ranks = workers.run(2, dropped, problem, kind, sequence_parallel)
    cut = {"column": 2, "row": 0}[kind] if kind == "column" or sequence_parallel else None
    outputs = [rank.output for rank in ranks]
    close(outputs[0] if cut is None else torch.cat(outputs, dim=cut), whole.output)
    grads = [rank.grad_x for rank in ranks]
    if kind == "row":
        close(torch.cat(grads, dim=2), whole.grad_x)
        close(torch.cat([rank.grad_a[0] for rank in ranks], dim=1), whole.grad_a[0])
        close(sum(rank.grad_b[0] for rank in ranks), whole.grad_b[0])
    else:
        close(torch.cat(grads) if sequence_parallel else grads[0], whole.grad_x)
        close(sum(rank.grad_a[0] for rank in ranks), whole.grad_a[0])
        close(torch.cat([rank.grad_b[0] for rank in ranks]), whole.grad_b[0])
