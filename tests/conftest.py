"""Fixtures of all tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.models import VOCAB_SIZE, make_model
from tests.support.pool import WorkerPool
from tests.support.rows import random_rows, write_rows
from tests.support.tiny import Tiny

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Assets:
    """The real model and rows that the project's tools fetch."""

    model: Path
    """SmolLM2-135M-Instruct, fp32."""
    padded_model: Path
    """The same function with 12 query and 4 key/value heads, which TP 2 and 4 divide."""
    data: Path


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Processes that form any world of ranks, started when first used."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def smollm2() -> Assets:
    """The real model and rows; fetched by the first run on a machine, cached outside of the tree."""
    command = [sys.executable, str(ROOT / "tools/fetch_assets.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    return Assets(Path(paths["MODEL"]), Path(paths["PADDED_MODEL"]), Path(paths["DATA"]))


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
