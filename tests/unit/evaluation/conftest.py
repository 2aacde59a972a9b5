"""A model to judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.benchmark_files import write_model


@pytest.fixture(scope="session")
def judged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer is byte-level and has a ChatML template."""
    return write_model(tmp_path_factory.mktemp("judged") / "model")
