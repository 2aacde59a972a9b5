"""Prepared instruction data with given rows, for the tests of what reads them."""

from pathlib import Path

from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.sft_dataset import packed_prefix


def write_packed(
    prefix: Path, rows: list[tuple[list[int], list[int]]], masks: list[list[int]] | None = None
) -> None:
    """Rows of tokens and unshifted labels, with or without attention masks."""
    contents = {"input_ids": [row[0] for row in rows], "labels": [row[1] for row in rows]}
    if masks is not None:
        contents["attention_mask"] = masks
    for key, documents in contents.items():
        builder = IndexedDatasetBuilder(packed_prefix(prefix, key))
        for document in documents:
            builder.add_document(document)
        builder.publish()


def row(prompt: int, answer: int, first: int = 0) -> tuple[list[int], list[int]]:
    """A row of ``prompt`` tokens without loss and ``answer`` tokens with it; token values count up."""
    tokens = list(range(first, first + prompt + answer))
    return tokens, [-100] * prompt + tokens[prompt:]
