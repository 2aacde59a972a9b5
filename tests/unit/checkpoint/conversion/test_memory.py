"""Peak memory of a conversion: some tensors, never the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.peak import peak

CHILD = "benchmarks/comparison/convert_child.py"
LARGEST_BYTES = 2 * 128256 * 3072
WORKERS = 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are more than the bound, and an adapter for it."""
    folder = tmp_path_factory.mktemp("made")
    peak(CHILD, "make", str(folder), "2.4")
    return folder


@pytest.fixture(scope="module")
def imports() -> int:
    """What the imports take."""
    return peak("-c", "import torch, mindspeed_lora.checkpoint.conversion.convert")


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["mg", "hf", "merge", "torch_dist"])
def test_a_conversion_takes_a_few_tensors(made: Path, imports: int, tmp_path: Path, operation: str):
    bound = 2 * LARGEST_BYTES * WORKERS + 300_000_000
    size = sum(path.stat().st_size for path in (made / "base").iterdir())
    assert size > 1.2 * bound
    flags = ["--load-dir", str(made / "base"), "--save-dir", str(tmp_path / "out"), "--workers", str(WORKERS)]
    target = "hf" if operation == "merge" else operation
    flags += ["--save-model-type", target]
    if operation == "merge":
        flags += ["--lora-load", str(made / "adapter")]
    elif operation != "hf":
        flags += ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    taken = peak("convert_ckpt.py", *flags) - imports
    print(f"{operation}: {taken / 1e6:.0f} MB of {bound / 1e6:.0f}, model {size / 1e6:.0f} MB")
    assert taken <= bound
