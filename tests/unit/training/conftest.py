"""A tiny model and rows for the jobs of these tests."""

from __future__ import annotations

import pytest

from tests.support.models import VOCAB_SIZE, make_model
from tests.support.rows import random_rows, write_rows
from tests.unit.training.tiny import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A Llama of four layers and 12 rows."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = random_rows(12, VOCAB_SIZE, longest=40)
    return Tiny(make_model("llama", folder / "model"), write_rows(folder / "rows", rows))


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Tiny:
    """The same with tied embeddings."""
    return Tiny(make_model("llama-tied", tmp_path_factory.mktemp("tied")), tiny.data)
