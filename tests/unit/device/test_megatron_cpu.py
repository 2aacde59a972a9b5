"""What megatron-core sees of torch on a machine without CUDA, and that nobody else sees it."""

from __future__ import annotations

import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the stand-ins are for machines without CUDA"
)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    from mindspeed_lora.device.megatron_cpu import install_cpu_stand_ins

    install_cpu_stand_ins()


def megatron_torch() -> torch:  # type: ignore[valid-type]
    import megatron.core.tensor_parallel.layers as layers

    return layers.torch


def test_torch_itself_stays_as_it_was() -> None:
    assert sys.modules["torch"].cuda is sys.modules["torch.cuda"]
    assert megatron_torch() is not torch
    assert megatron_torch().cuda is not torch.cuda
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda"), torch.device("cuda", 1)])
def test_factories_make_on_the_cpu_what_is_asked_of_cuda(device: str | torch.device) -> None:
    seen = megatron_torch()
    assert seen.empty(2, 3, device=device).device.type == "cpu"
    assert seen.zeros(2, dtype=torch.int64, device=device, pin_memory=True).dtype is torch.int64
    assert seen.arange(3, device=device).tolist() == [0, 1, 2]
    assert seen.tensor([1.5], device=device).tolist() == [1.5]
    assert seen.full((2,), 7.0, device=device).tolist() == [7.0, 7.0]


def test_other_devices_are_respected() -> None:
    seen = megatron_torch()
    assert seen.empty(2, device="meta").is_meta
    with torch.device("meta"):
        assert seen.zeros(2).is_meta


def test_all_else_is_torch_s_own() -> None:
    seen = megatron_torch()
    assert seen.Tensor is torch.Tensor
    assert seen.nn is torch.nn
    assert seen.cuda.is_available() is False
    assert seen.onnx is torch.onnx, "resolved lazily, so not in torch's dictionary at first"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = seen.no_such_name


def test_streams_and_waiting_are_answered() -> None:
    cuda = megatron_torch().cuda
    assert cuda.current_device() == torch.device("cpu")
    cuda.current_stream().wait_stream(cuda.Stream())
    cuda.synchronize()
    with cuda.stream(cuda.Stream()):
        cuda.default_stream().synchronize()


def test_every_loaded_module_of_megatron_core_sees_it() -> None:
    left = [
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch
    ]
    # What was imported since by somebody else gets its stand-in with the next call.
    from mindspeed_lora.device.megatron_cpu import install_cpu_stand_ins

    install_cpu_stand_ins()
    assert all(sys.modules[name].torch is not torch for name in left)
    assert "megatron.core.pipeline_parallel.schedules" in sys.modules


def test_a_forked_random_stream_is_its_own() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(5)
    expected = torch.rand(4)

    torch.manual_seed(5)
    tracker.add("mine", 99)
    with tracker.fork("mine"):
        forked = torch.rand(4)
    assert torch.equal(torch.rand(4), expected), "the default stream went on as if nothing had been drawn"
    with tracker.fork("mine"):
        again = torch.rand(4)
    assert torch.equal(torch.cat([forked, again]), torch.rand(8, generator=torch.Generator().manual_seed(99)))
