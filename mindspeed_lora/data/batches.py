"""The global batches of a run and of an evaluation: which samples they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from mindspeed_lora.data.batch import Batch
from mindspeed_lora.data.dealing import Dealing
from mindspeed_lora.data.sample import Sample


class Dataset(Protocol):
    """What batches are made of."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Order(Protocol):
    """Which sample of a data set is the one of a number in the run."""

    def order(self, sample: int) -> int:
        """The index in the data set."""
        ...


class StepBatches:
    """The micro-batches of any training step, for one data-parallel rank.

    Step k takes the samples ``(k − 1) · gbs`` to ``k · gbs − 1`` of the run, however they are dealt out.
    """

    def __init__(self, dataset: Dataset, order: Order, dealing: Dealing) -> None:
        self.dataset = dataset
        self.order = order
        self.dealing = dealing

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of step ``step``, counted from 1."""
        size = self.dealing.shape.global_batch_size
        numbers = range((step - 1) * size, step * size)
        return self.dealing.micro_batches(numbers, lambda number: self.dataset[self.order.order(number)])


class EvalBatches:
    """The first samples: the micro-batches of one data-parallel rank, global batch by global batch.

    Without ``num_samples`` each sample once; ``order`` says which one is the i-th, left out: file order.
    Every rank gets as many micro-batches; where samples run out, some of a row of padding. Can be gone through
    again and again.
    """

    def __init__(
        self,
        dataset: Dataset,
        dealing: Dealing,
        num_samples: int | None = None,
        order: Callable[[int], int] | None = None,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.dealing = dealing
        self.num_samples = len(dataset) if num_samples is None else min(num_samples, len(dataset))

    def __iter__(self) -> Iterator[list[Batch]]:
        size = self.dealing.shape.global_batch_size
        for first in range(0, self.num_samples, size):
            numbers = range(first, min(first + size, self.num_samples))
            yield self.dealing.micro_batches(numbers, self._fetch)

    def _fetch(self, number: int) -> Sample:
        return self.dataset[number if self.order is None else self.order(number)]
