"""Whole runs of a tiny model on the device against the same on the CPU: training, packing, resuming, generating.

Tolerances of fp32 are those between this package and PEFT (``tests/support/differences.py``): both sides are fp32
with sums in another order. bf16 keeps 8 bits, so that every product is off by up to 2⁻⁸ = 0.4%. The tiny models have
large weights, at which mistakes show, but roundings grow too: on a CPU in bf16 up to 0.6% of a loss, 4% of a gradient
norm and 15% of a gradient were seen. Attention across samples, a small mistake, is 2.4%, 8% and 54%; it must fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rank import cuda_device
from tests.support.differences import GRAD_NORM, GRADIENT, LOSS, largest_ratio
from tests.support.generation import Case, answers_on_rank
from tests.support.pool import WorkerPool
from tests.support.shards import assemble, largest_relative_difference
from tests.support.tiny import Tiny
from tests.support.training import RankRecord, train, train_recorded

LR = 1e-3
"""Small enough that four steps do not multiply the roundings of bf16."""
BF16_LOSS = 0.012
BF16_GRAD_NORM = 0.06
BF16_GRADIENT = 0.25


def record(pool: WorkerPool, words: list[str]) -> RankRecord:
    (found,) = pool.run(1, train_recorded, words)
    assert isinstance(found, RankRecord) and found.status == 0
    return found


def assert_same(found: RankRecord, expected: RankRecord, bf16: bool) -> None:
    loss, grad_norm, gradient = (
        (BF16_LOSS, BF16_GRAD_NORM, BF16_GRADIENT) if bf16 else (LOSS, GRAD_NORM, GRADIENT)
    )
    assert found.loss_tokens == expected.loss_tokens
    assert largest_ratio(found.losses, expected.losses) <= loss
    assert largest_ratio(found.grad_norms, expected.grad_norms) <= grad_norm
    ours, theirs = assemble([found.gradients]), assemble([expected.gradients])
    assert largest_relative_difference(ours, theirs) <= gradient


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ["one", "padded", "packed", "dropout", "recompute"])
def test_training(
    device_pool: WorkerPool, workers: WorkerPool, tiny: Tiny, adapter: Path, rows: str, bf16: bool
) -> None:
    """The reference is fp32 on the CPU in any case; the packed run's is row by row."""
    flags: dict[str, dict[str, Any]] = {
        "one": {},
        "padded": {"micro_batch_size": 2},
        "packed": {"packing": True, "global_batch_size": 4},
        "dropout": {"lora_dropout": 0.1},
        "recompute": {"recompute_granularity": "full", "recompute_method": "uniform"},
    }
    given = {"variable_seq_lengths": True, "lr": LR, "lora_r": None, "lora_load": adapter, **flags[rows]}
    reference = {**given, "packing": False, "micro_batch_size": 1}
    expected = record(workers, tiny.words(**reference))
    found = record(device_pool, tiny.words(**given, bf16=bf16))
    assert_same(found, expected, bf16)


def test_a_wrong_run_is_beyond_every_tolerance(workers: WorkerPool, tiny: Tiny, adapter: Path) -> None:
    """Attention across the samples of a row: what the limits of bf16 must still see."""
    words = tiny.words(variable_seq_lengths=True, lr=LR, lora_r=None, lora_load=adapter, global_batch_size=4)
    expected = record(workers, words)
    (found,) = workers.run(1, train_recorded, [*words, "--packing"], None, let_rows_see_each_other)
    with pytest.raises(AssertionError):
        assert_same(found, expected, bf16=True)


def let_rows_see_each_other(session: Any) -> None:
    """Takes the sub-rows out of every micro-batch."""
    from dataclasses import replace

    original = session.runner.pipeline.run
    session.runner.pipeline.run = lambda step, batches, *args, **options: original(
        step, [replace(batch, sub_rows=None) for batch in batches], *args, **options
    )


def test_a_run_taken_up_again_is_the_same_bits(device_pool: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """In fp32: there no kernel of the run adds in an order that changes from call to call."""
    job: dict[str, Any] = {"variable_seq_lengths": True, "lora_dropout": 0.1, "save_interval": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert device_pool.run(1, train, tiny.words(**job, save=whole)) == [0]
    # A constant learning rate: a run of two steps is the beginning of one of four.
    assert device_pool.run(1, train, tiny.words(**{**job, "train_iters": 2}, save=parts)) == [0]
    assert device_pool.run(1, train, tiny.words(**job, save=parts, resume="auto")) == [0]
    wanted = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert any("iter_0000004" in str(path) for path in wanted)
    for path in wanted:
        assert (parts / path).read_bytes() == (whole / path).read_bytes(), path


def test_generation(device_pool: WorkerPool, workers: WorkerPool, tiny: Tiny) -> None:
    """Greedy, and drawn: the draws come from the host."""
    prompts = ((1, 9, 4, 33, 7), (1, 5), (1, 90, 14, 3, 3, 8, 21, 60))
    cases = [
        Case(model=str(tiny.model), prompts=prompts, max_new_tokens=16, sampling=sampling)
        for sampling in (None, {"temperature": 0.8, "top_p": 0.9, "seed": 5})
    ]
    (found,), (expected,) = (pool.run(1, answers_on_rank, 1, 1, cases) for pool in (device_pool, workers))
    assert found == expected


def test_the_device_is_the_one_that_is_told(device_pool: WorkerPool) -> None:
    assert (device_pool.run(1, cuda_device)[0] is not None) == device_pool.cuda
