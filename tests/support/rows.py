"""Prepared instruction rows of random tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.sft_dataset import WEIGHTS_KEY, packed_prefix

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One instruction row."""

    input_ids: list[int]
    labels: list[int]
    """As long as the tokens, not shifted; −100 on what carries no loss."""
    weights: tuple[float, ...] | None = None
    """As long as the labels: their weights in the mean; None: all are 1."""

    @property
    def num_loss_tokens(self) -> int:
        """Positions that predict a token with loss."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def loss_weight(self) -> float:
        """The sum of the weights of these positions."""
        if self.weights is None:
            return self.num_loss_tokens
        pairs = zip(self.labels[1:], self.weights[1:], strict=True)
        return sum(weight for label, weight in pairs if label != IGNORED)


def random_rows(
    count: int, vocab_size: int, longest: int = 40, silent: Collection[int] = (), seed: int = 3
) -> list[Row]:
    """Rows of 6 to ``longest`` tokens, the first quarter or so of each without loss, the ``silent`` ones wholly."""
    generator = np.random.RandomState(seed)
    rows: list[Row] = []
    for _ in range(count):
        length = int(generator.randint(6, longest + 1))
        prompt = int(generator.randint(1, length // 2))
        tokens = generator.randint(3, vocab_size, size=length).tolist()
        prompt = length if len(rows) in silent else prompt
        rows.append(Row(tokens, [IGNORED] * prompt + tokens[prompt:]))
    return rows


def write_rows(prefix: Path, rows: list[Row]) -> Path:
    """Writes the indexed datasets that ``--data-path PREFIX`` means; returns the prefix."""
    contents: dict[str, list[Any]] = {
        "input_ids": [row.input_ids for row in rows],
        "attention_mask": [[1] * len(row.input_ids) for row in rows],
        "labels": [row.labels for row in rows],
    }
    if any(row.weights is not None for row in rows):
        contents[WEIGHTS_KEY] = [row.weights or [1.0] * len(row.labels) for row in rows]
    for key, documents in contents.items():
        dtype = np.float32 if key == WEIGHTS_KEY else np.int32
        builder = IndexedDatasetBuilder(packed_prefix(prefix, key), dtype)
        for document in documents:
            builder.add_document(document)
        builder.publish()
    return prefix
