"""The cross entropy over a vocabulary cut by TP against torch's over the whole one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.models.vocab_loss import IGNORED_LABEL, vocab_parallel_loss
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from tests.support.pool import WorkerPool

HIDDEN = 10


@dataclass(frozen=True)
class Case:
    """A vocabulary of ``vocabulary`` words in ``padded`` rows."""

    vocabulary: int
    padded: int
    all_ignored: bool = False

    def make(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.vocabulary)
        hidden = torch.randn(14, HIDDEN, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.padded, HIDDEN, generator=generator, dtype=torch.float64)
        weight[self.vocabulary :] = 1e3
        labels = torch.randint(0, self.vocabulary, (14,), generator=generator)
        labels[3], labels[4] = 0, self.vocabulary - 1
        labels[::5] = IGNORED_LABEL
        if self.all_ignored:
            labels[:] = IGNORED_LABEL
        return hidden, weight, labels


def shard_loss(case: Case) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """Loss, this rank's part of the hidden states' gradient, and the gradient of its rows."""
    import os

    tp = int(os.environ["WORLD_SIZE"])
    groups, _ = initialize_groups(ParallelConfig(tensor_model_parallel_size=tp), seed=1)
    hidden, whole, labels = case.make()
    rows = case.padded // tp
    first = groups.tp_rank * rows
    end = max(first, min(first + rows, case.vocabulary))
    weight = whole[first : first + rows].clone().requires_grad_()
    hidden.requires_grad_()
    loss = vocab_parallel_loss(hidden, weight, labels, (first, end), groups.tp_group)
    loss.backward()
    destroy_groups()
    assert hidden.grad is not None
    return loss.item(), hidden.grad, weight.grad


CASES = {
    "even": (2, Case(vocabulary=24, padded=24)),
    "padded": (2, Case(vocabulary=23, padded=32)),
    "four ranks": (4, Case(vocabulary=30, padded=32)),
    "a rank of padding alone": (4, Case(vocabulary=5, padded=8)),
    "three ranks of padding alone": (4, Case(vocabulary=2, padded=8)),
}


@pytest.mark.parametrize("name", CASES)
def test_shards_give_what_the_whole_gives(workers: WorkerPool, name: str) -> None:
    tp, case = CASES[name]
    found = workers.run(tp, shard_loss, case)
    hidden, weight, labels = case.make()
    hidden, weight = hidden.requires_grad_(), weight[: case.vocabulary].requires_grad_()
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    expected.backward()
    assert len({loss for loss, _, _ in found}) == 1, "the same on every rank"
    assert found[0][0] == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(sum(part for _, part, _ in found), hidden.grad, rtol=1e-5, atol=1e-6)
    grad_weight = torch.cat([rows for _, _, rows in found])
    torch.testing.assert_close(grad_weight[: case.vocabulary], weight.grad, rtol=1e-5, atol=1e-6)
    assert not grad_weight[case.vocabulary :].any()


def test_all_ignored(workers: WorkerPool) -> None:
    for loss, grad_hidden, _ in workers.run(2, shard_loss, Case(vocabulary=23, padded=32, all_ignored=True)):
        assert loss == 0.0
        assert not grad_hidden.any()
