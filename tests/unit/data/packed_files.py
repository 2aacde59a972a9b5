"""Prepared instruction data with given rows, for the tests of what reads them."""

from pathlib import Path

from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.sft_dataset import packed_prefix


def write_packed(prefix: Path, rows: list[tuple[list[int], list[int]]]) -> None:
    """Rows of tokens and unshifted labels."""
    builders = {key: IndexedDatasetBuilder(packed_prefix(prefix, key)) for key in ("input_ids", "labels")}
    for input_ids, labels in rows:
        builders["input_ids"].add_document(input_ids)
        builders["labels"].add_document(labels)
    for builder in builders.values():
        builder.publish()


def row(prompt: int, answer: int, first: int = 0) -> tuple[list[int], list[int]]:
    """A row of ``prompt`` tokens without loss and ``answer`` tokens with it; token values count up."""
    tokens = list(range(first, first + prompt + answer))
    return tokens, [-100] * prompt + tokens[prompt:]
