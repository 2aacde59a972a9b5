"""A run whose optimizer state does not fit under a limit of memory: paged it goes on, with the same numbers."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.training.main import train
from tests.support.pool import RankFailed, WorkerPool
from tests.support.rows import random_rows, write_rows

VOCABULARY, HIDDEN = 100_000, 256
WEIGHTS = 2 * VOCABULARY * HIDDEN * 4
"""Bytes of embedding and output layer, beside which the two layers are small; both moments take twice as much."""
SHAPE = [
    *(
        "--num-layers",
        "2",
        "--hidden-size",
        str(HIDDEN),
        "--num-attention-heads",
        "4",
        "--ffn-hidden-size",
        "256",
    ),
    *("--max-position-embeddings", "64", "--padded-vocab-size", str(VOCABULARY)),
    "--untie-embeddings-and-output-weights",
]


def held() -> int:
    """What this process has of the memory that the limit counts; freed blocks stay in its heap."""
    status = Path("/proc/self/status").read_text()
    [found] = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    return found


@contextlib.contextmanager
def memory_limit(size: int | None) -> Iterator[None]:
    """This process gets ``size`` more bytes of its own memory (setrlimit(2), RLIMIT_DATA; a shared file is none)."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (held() + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def run(words: list[str], limit: int | None) -> tuple[int, int]:
    """A training run on one rank: its status, and by how much memory grew."""
    before = held()
    with memory_limit(limit):
        status = train(parse("posttrain", words))
    return status, held() - before


def figures(save: Path) -> list[tuple[float, float]]:
    """Loss and norm of every step."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [(record["lm_loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def checkpoint(save: Path) -> dict[str, bytes]:
    """The bytes of the model and the optimizer's state after the last step."""
    files = [path for path in (save / "iter_0000003").rglob("*") if path.suffix in (".pt", ".safetensors")]
    return {str(path.relative_to(save)): path.read_bytes() for path in files if "optim" in str(path)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_does_not_fit_is_paged(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", random_rows(4, VOCABULARY))
    shared = [
        *(*SHAPE, "--data-path", tmp_path / "rows", "--seq-length", "48", "--global-batch-size", "2"),
        *("--lr", "1e-3", "--train-iters", "3", "--save-interval", "2", "--lr-warmup-iters", "0"),
    ]
    jobs = {name: [*map(str, shared), "--save", str(tmp_path / name)] for name in ("paged", "plain", "none")}
    jobs["paged"].append("--paged-optimizer")
    pools = [WorkerPool() for _ in range(4)]
    plain, failing, paged, resumed = pools
    try:
        [(status, grown)] = plain.run(1, run, jobs["plain"], None)
        assert status == 0
        # Less than that by three quarters of the moments. It may be 64 MiB too much, the step in which a heap grows.
        limit = grown - 3 * WEIGHTS // 2
        with pytest.raises(RankFailed, match=r"memory|alloc"):
            failing.run(1, run, jobs["none"], limit)
        [(status, _)] = paged.run(1, run, jobs["paged"], limit)
        assert status == 0
        assert figures(tmp_path / "paged") == figures(tmp_path / "plain")
        assert checkpoint(tmp_path / "paged") == checkpoint(tmp_path / "plain") != {}

        # And goes on from the second step under the same limit.
        words = [*jobs["paged"], "--load", str(tmp_path / "plain" / "iter_0000002")]
        words[words.index("--save") + 1] = str(tmp_path / "resumed")
        [(status, _)] = resumed.run(1, run, words, limit)
        assert status == 0
        assert figures(tmp_path / "resumed") == figures(tmp_path / "plain")[2:]
        assert checkpoint(tmp_path / "resumed") == checkpoint(tmp_path / "plain")
    finally:
        for pool in pools:
            pool.close()
