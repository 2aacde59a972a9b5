"""The device of a process without CUDA: what it answers, and that its random state can be kept."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.device import runtime
from mindspeed_lora.parallel.groups import ParallelGroups

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


def test_the_device_is_the_cpu() -> None:
    assert not runtime.has_accelerator()
    assert runtime.bind_device() == runtime.current_device() == torch.device("cpu")


def test_nccl_becomes_gloo_with_one_line() -> None:
    backend, notice = runtime.communication_backend("nccl")
    assert backend == "gloo"
    assert notice is not None and "nccl" in notice and "gloo" in notice and "\n" not in notice


@pytest.mark.parametrize("requested", [None, "gloo"])
def test_gloo_is_nothing_to_tell(requested: str | None) -> None:
    assert runtime.communication_backend(requested) == ("gloo", None)


def test_fp32_is_nothing_to_tell() -> None:
    assert runtime.compute_dtype(bf16=False, fp16=False) == (torch.float32, None)


def test_a_cpu_without_bf16_instructions_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: False)
    dtype, notice = runtime.compute_dtype(bf16=True, fp16=False)
    assert dtype is torch.float32
    assert notice is not None and "--bf16" in notice and "fp32" in notice


def test_a_cpu_with_bf16_instructions_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: True)
    assert runtime.compute_dtype(bf16=True, fp16=False) == (torch.bfloat16, None)


@pytest.mark.parametrize("cpu_has_bf16", [False, True])
def test_fp16_is_computed_in_fp32(monkeypatch: pytest.MonkeyPatch, cpu_has_bf16: bool) -> None:
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: cpu_has_bf16)
    dtype, notice = runtime.compute_dtype(bf16=False, fp16=True)
    assert dtype is torch.float32
    assert notice is not None and "--fp16" in notice


def test_peak_memory_is_the_kernel_s_high_water_mark_in_bytes() -> None:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    assert runtime.peak_memory_bytes() == pytest.approx(kibibytes * 1024, rel=0.05)


PAGE_FAULTS_OF_A_LARGE_BLOCK = """
import resource, torch
from mindspeed_lora.device import runtime
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
runtime.bind_device()
print(*(faults() for _ in range(6)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_freed_memory_stays_in_the_process() -> None:
    """Without that every large output would be paged in anew: some 24,000 faults for these 100 MB."""
    command = [sys.executable, "-c", PAGE_FAULTS_OF_A_LARGE_BLOCK]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts = [int(word) for word in printed.split()]
    assert counts[0] > 10_000
    assert sum(count > 1000 for count in counts) <= 3, (
        f"the heap may grow twice more, and no further: {counts}"
    )


def draw(groups: ParallelGroups) -> list[torch.Tensor]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(5)
    return [torch.rand(5), tracked, torch.randn(3)]


def test_random_states_go_through_a_file_and_back(groups: ParallelGroups, tmp_path: Path) -> None:
    draw(groups)
    states = runtime.random_states()
    assert {tensor.dtype for tensor in states.values()} == {torch.uint8}
    save_file(states, tmp_path / "random.safetensors")
    expected = draw(groups)
    assert not torch.equal(draw(groups)[0], expected[0])
    runtime.restore_random_states(load_file(tmp_path / "random.safetensors"))
    for found, wanted in zip(draw(groups), expected, strict=True):
        assert torch.equal(found, wanted)


def test_random_states_are_copies(groups: ParallelGroups) -> None:
    states = runtime.random_states()
    kept = {name: state.clone() for name, state in states.items()}
    draw(groups)
    assert all(torch.equal(states[name], kept[name]) for name in kept)
