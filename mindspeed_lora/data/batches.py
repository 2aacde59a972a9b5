"""Samples put together to padded batches: those of a training step, and those of an evaluation.

Shapes: b samples of the micro-batch, s positions after padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mindspeed_lora.data.sample import IGNORE_INDEX, Sample
from mindspeed_lora.data.sampling import SampleOrder
from mindspeed_lora.errors import Failed


class Dataset(Protocol):
    """What batches are made of."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, on the CPU."""

    tokens: torch.Tensor
    """int64 ``[b, s]``, padded at the end."""
    labels: torch.Tensor
    """int64 ``[b, s]``, shifted: the target of each position, -100 where there is none."""
    position_ids: torch.Tensor
    """int64 ``[b, s]``."""
    sample_ids: torch.Tensor
    """int64 ``[b]``: number of each sample in the run (or evaluation), -1 for a row that only fills up."""
    num_tokens: int
    """Tokens that are not padding."""
    num_loss_tokens: int
    """Positions with a target."""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """To what length a micro-batch is padded."""

    pad_token_id: int
    seq_length: int | None = None
    """Pad to exactly this many positions; None: to the longest sample, rounded up to ``multiple_of``."""
    multiple_of: int = 8
    vocab_size: int | None = None
    """When given, a token outside of the vocabulary is an error instead of a wrong embedding."""

    def length(self, longest: int) -> int:
        """Number of positions s for a micro-batch whose longest sample has ``longest`` tokens."""
        if self.seq_length is None:
            return -(-max(longest, 1) // self.multiple_of) * self.multiple_of
        if longest > self.seq_length:
            raise ValueError(f"a sample of {longest} tokens does not fit into seq_length {self.seq_length}")
        return self.seq_length


def collate(
    samples: Sequence[Sample], padding: Padding, sample_ids: Sequence[int] | None = None, fill_to: int = 0
) -> Batch:
    """Pad samples to one batch; ``fill_to`` adds rows of padding until there are that many rows.

    Position i of a row predicts the label of position i + 1; padding predicts nothing.
    """
    rows = max(len(samples), fill_to, 1)
    length = padding.length(max((len(sample.input_ids) for sample in samples), default=1))
    tokens = torch.full((rows, length), padding.pad_token_id, dtype=torch.int64)
    labels = torch.full((rows, length), IGNORE_INDEX, dtype=torch.int64)
    for row, sample in enumerate(samples):
        targets = sample.labels[1:]
        tokens[row, : len(sample.input_ids)] = torch.from_numpy(sample.input_ids)
        labels[row, : len(targets)] = torch.from_numpy(targets)
    numbers = list(sample_ids) if sample_ids is not None else list(range(len(samples)))
    if padding.vocab_size is not None:
        _check_vocabulary(tokens, numbers, padding.vocab_size)
    return Batch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(length).expand(rows, length).contiguous(),
        sample_ids=torch.tensor(numbers + [-1] * (rows - len(numbers)), dtype=torch.int64),
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_loss_tokens=int((labels != IGNORE_INDEX).sum()),
    )


def _check_vocabulary(tokens: torch.Tensor, numbers: list[int], vocab_size: int) -> None:
    outside = (tokens < 0) | (tokens >= vocab_size)
    if bool(outside.any()):
        row = int(outside.any(dim=1).nonzero()[0])
        number = numbers[row] if row < len(numbers) else -1
        raise Failed(
            f"sample {number} holds the token id {int(tokens[outside][0])}, but the model's vocabulary has "
            f"{vocab_size} tokens; the data were prepared with another tokenizer"
        )


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How the samples of a step are dealt out: to data-parallel ranks, micro-batch by micro-batch."""

    micro_batch_size: int
    global_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise ValueError(
                f"global batch {self.global_batch_size} is not divisible by micro-batch "
                f"{self.micro_batch_size} × data-parallel size {self.dp_size}"
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)


class StepBatches:
    """The micro-batches of any training step, for one data-parallel rank.

    Sample j of a step goes to micro-batch ``j // (mbs · dp)`` of rank ``(j // mbs) % dp``: which samples make
    up a step depends on neither the micro-batch size nor the layout.
    """

    def __init__(self, dataset: Dataset, order: SampleOrder, shape: BatchShape, padding: Padding) -> None:
        self.dataset = dataset
        self.order = order
        self.shape = shape
        self.padding = padding

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of step ``step``, counted from 1."""
        shape = self.shape
        first = (step - 1) * shape.global_batch_size + shape.dp_rank * shape.micro_batch_size
        stride = shape.micro_batch_size * shape.dp_size
        return [
            self._micro_batch(first + micro_batch * stride) for micro_batch in range(shape.num_micro_batches)
        ]

    def _micro_batch(self, first: int) -> Batch:
        numbers = range(first, first + self.shape.micro_batch_size)
        return collate([self.dataset[self.order.order(number)] for number in numbers], self.padding, numbers)


class EvalBatches:
    """Each sample once, in file order, dealt out to the data-parallel ranks like those of a step.

    Every rank gets the same number of micro-batches; where samples run out, one of a single row of padding.
    Padding to a fixed length also keeps the number of rows fixed, so that all shapes are the same.
    """

    def __init__(
        self,
        dataset: Dataset,
        padding: Padding,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_samples: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.padding = padding
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.num_samples = len(dataset) if num_samples is None else min(num_samples, len(dataset))

    def __len__(self) -> int:
        """Micro-batches of one rank."""
        return -(-self.num_samples // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        fill_to = self.micro_batch_size if self.padding.seq_length is not None else 0
        for micro_batch in range(len(self)):
            first = (micro_batch * self.dp_size + self.dp_rank) * self.micro_batch_size
            numbers = range(
                min(first, self.num_samples), min(first + self.micro_batch_size, self.num_samples)
            )
            yield collate([self.dataset[number] for number in numbers], self.padding, numbers, fill_to)
