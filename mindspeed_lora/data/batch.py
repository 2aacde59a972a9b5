"""A micro-batch: samples put one behind the other to rows, and rows padded to one length.

Shapes: b rows of the micro-batch, s positions after padding, n tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mindspeed_lora.data.sample import IGNORE_INDEX, Sample
from mindspeed_lora.errors import Failed


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, on the CPU."""

    tokens: torch.Tensor
    """int64 ``[b, s]``, padded at the end."""
    labels: torch.Tensor
    """int64 ``[b, s]``, shifted: the target of each position, -100 where there is none."""
    position_ids: torch.Tensor
    """int64 ``[s]`` where every row runs from 0 to s − 1, else ``[b, s]``."""
    sub_rows: tuple[tuple[int, ...], ...] | None
    """Of each row the lengths of the parts that attention does not cross, summing to s: padding at the end is one
    of its own. None: every row is one, with its padding."""
    sample_ids: torch.Tensor
    """int64 ``[b, s]``: the number in the run (or evaluation) of the sample that a token belongs to, -1 for
    padding."""
    sample_positions: torch.Tensor
    """int64 ``[b, s]``: which of its sample's tokens it is, from 0, whatever its position id; -1 for padding."""
    lengths: torch.Tensor
    """int64 ``[b, s]``: how many positions the document of a token has; 1 for padding. A document is a run of
    positions 0, 1, 2 …"""
    num_tokens: int
    """Tokens that are not padding."""
    num_loss_tokens: int
    """Positions with a target."""
    loss_weights: torch.Tensor | None = None
    """float32 ``[b, s]``: the weight of each position's loss in the mean; None: all are 1."""
    sum_of_weights: float = 0.0
    """The sum of the weights of all positions with a target; their number where there are no weights."""

    def at(self, positions: torch.Tensor) -> Batch:
        """Only these positions, int64 ``[n]``, of every row; sub-rows and counts stay those of the whole rows."""
        names = (
            *("tokens", "labels", "position_ids", "sample_ids", "sample_positions", "lengths"),
            "loss_weights",
        )
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor[..., positions] for name, tensor in tensors.items()})


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


@dataclass(frozen=True)
class NumberedSample:
    """A sample and its number in the run or evaluation."""

    number: int
    sample: Sample

    def __len__(self) -> int:
        return len(self.sample.input_ids)


def collate(rows: Sequence[Sequence[NumberedSample]], padding: Padding, fill_to: int = 0) -> Batch:
    """Put samples one behind the other to rows, and pad these to one batch.

    ``fill_to`` adds rows of padding until there are that many rows. Position i of a sample predicts the label of
    its position i + 1; neither padding nor the next sample of the row is ever predicted.
    """
    length = padding.length(max((sum(map(len, row)) for row in rows), default=0))
    num_rows = max(len(rows), fill_to, 1)
    tokens = torch.full((num_rows, length), padding.pad_token_id, dtype=torch.int64)
    labels, sample_ids, sample_positions = (
        torch.full((num_rows, length), value, dtype=torch.int64) for value in (IGNORE_INDEX, -1, -1)
    )
    for number, row in enumerate(rows):
        start = 0
        for entry in row:
            stop, targets = start + len(entry), entry.sample.labels[1:]
            tokens[number, start:stop] = torch.from_numpy(entry.sample.input_ids)
            labels[number, start : start + len(targets)] = torch.from_numpy(targets)
            sample_ids[number, start:stop] = entry.number
            sample_positions[number, start:stop] = torch.arange(len(entry))
            start = stop
    if padding.vocab_size is not None:
        _check_vocabulary(tokens, sample_ids, padding.vocab_size)
    with_loss = labels != IGNORE_INDEX
    num_loss_tokens, loss_weights = int(with_loss.sum()), _loss_weights(rows, num_rows, length)
    return Batch(
        tokens=tokens,
        labels=labels,
        position_ids=_position_ids(rows, num_rows, length),
        sub_rows=_sub_rows(rows, num_rows, length),
        sample_ids=sample_ids,
        sample_positions=sample_positions,
        lengths=_lengths(rows, num_rows, length),
        num_tokens=sum(len(entry) for row in rows for entry in row),
        num_loss_tokens=num_loss_tokens,
        loss_weights=loss_weights,
        sum_of_weights=float(
            num_loss_tokens if loss_weights is None else loss_weights[with_loss].sum(dtype=torch.float64)
        ),
    )


def _loss_weights(
    rows: Sequence[Sequence[NumberedSample]], num_rows: int, length: int
) -> torch.Tensor | None:
    """``[b, s]``, shifted as the labels are; None where no sample has weights."""
    if all(entry.sample.weights is None for row in rows for entry in row):
        return None
    weights = torch.ones((num_rows, length), dtype=torch.float32)
    for number, row in enumerate(rows):
        start = 0
        for entry in row:
            if entry.sample.weights is not None:
                own = entry.sample.weights[1:]
                weights[number, start : start + len(own)] = torch.from_numpy(own)
            start += len(entry)
    return weights


def _sub_rows(
    rows: Sequence[Sequence[NumberedSample]], num_rows: int, length: int
) -> tuple[tuple[int, ...], ...] | None:
    """Lengths of the sub-rows of each row; None where causal attention over padding at the end does."""
    per_row = [[part for entry in row for part in entry.sample.sub_rows or (len(entry),)] for row in rows] + [
        [] for _ in range(num_rows - len(rows))
    ]
    if all(len(parts) < 2 for parts in per_row):
        return None
    room = [length - sum(parts) for parts in per_row]
    return tuple((*parts, left) if left else tuple(parts) for parts, left in zip(per_row, room, strict=True))


def _position_ids(rows: Sequence[Sequence[NumberedSample]], num_rows: int, length: int) -> torch.Tensor:
    """``[s]`` or ``[b, s]``; they run on through padding."""
    if all(len(row) < 2 and _runs_through(row) for row in rows):
        return torch.arange(length)
    positions = torch.arange(length).repeat(num_rows, 1)
    for number, row in enumerate(rows):
        own = [entry.sample.positions() for entry in row]
        if own:
            positions[number, : sum(map(len, own))] = torch.from_numpy(np.concatenate(own))
    return positions


def _lengths(rows: Sequence[Sequence[NumberedSample]], num_rows: int, length: int) -> torch.Tensor:
    """``[b, s]``: positions start anew with each document."""
    lengths = torch.ones((num_rows, length), dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for entry in row:
            positions = entry.sample.positions()
            starts = np.flatnonzero(positions == 0)
            counts = np.diff(starts, append=len(positions))
            lengths[number, start : start + len(positions)] = torch.from_numpy(np.repeat(counts, counts))
            start += len(positions)
    return lengths


def _runs_through(row: Sequence[NumberedSample]) -> bool:
    return all(entry.sample.sub_rows is None and entry.sample.position_ids is None for entry in row)


def _check_vocabulary(tokens: torch.Tensor, sample_ids: torch.Tensor, vocab_size: int) -> None:
    outside = (tokens < 0) | (tokens >= vocab_size)
    if bool(outside.any()):
        raise Failed(
            f"sample {int(sample_ids[outside][0])} holds the token id {int(tokens[outside][0])}, but the model's "
            f"vocabulary has {vocab_size} tokens; the data were prepared with another tokenizer"
        )
