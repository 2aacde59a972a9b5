"""``pretrain_gpt.py``: the next-token loss over plain text is that of transformers on the same windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from tests.support.differences import LOSS, largest_ratio
from tests.support.layouts import Layout
from tests.support.models import VOCAB_SIZE
from tests.support.parity import ALPHA, RANK, Case, ParityBench
from tests.support.reference import Reference
from tests.support.rows import Row

WINDOW = 24
CASE = Case(model="qwen2")


def write_text(prefix: Path) -> list[int]:
    """Documents of random lengths; returns their tokens one after another."""
    generator = np.random.RandomState(5)
    builder = IndexedDatasetBuilder(prefix)
    tokens: list[int] = []
    while len(tokens) < 30 * WINDOW:
        document = generator.randint(3, VOCAB_SIZE, size=generator.randint(5, 90)).tolist()
        builder.add_document(document)
        tokens += document
    builder.publish()
    return tokens


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2, pp=2, sequence_parallel=True), Layout(cp=2, attention="ring")], ids=str
)
def test_windows_over_plain_text(layout: Layout, bench: ParityBench, tmp_path: Path) -> None:
    """Window i holds the tokens i·s to (i + 1)·s and predicts each from those before it."""
    tokens = write_text(tmp_path / "text")
    windows = [tokens[first : first + WINDOW + 1] for first in range(0, len(tokens) - WINDOW, WINDOW)]
    reference = Reference(bench.model(CASE.model))
    reference.add_adapter(RANK, ALPHA)
    start = reference.save_adapter(tmp_path / "start")
    record = reference.train([Row(window, window) for window in windows], CASE.recipe)
    argv = [
        *(
            "--stage",
            "pretrain",
            "--load",
            str(bench.model(CASE.model)),
            "--data-path",
            str(tmp_path / "text"),
        ),
        *("--seq-length", str(WINDOW), "--no-shuffle", "--lora-load", str(start), "--micro-batch-size", "2"),
        *CASE.recipe.flags,
        *layout.flags,
    ]
    outcome = bench.run(argv, layout)
    assert outcome.ranks[0].loss_tokens == [4 * WINDOW] * CASE.recipe.steps
    assert largest_ratio(outcome.losses, record.losses) <= LOSS
