"""The device that this process computes on: binding, memory, random state, backend, compute dtype."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch


def has_accelerator() -> bool:
    """True where a CUDA device can be used."""
    return torch.cuda.is_available()


def current_device() -> torch.device:
    """The device that holds this rank's parameters and activations."""
    return torch.device("cuda", torch.cuda.current_device()) if has_accelerator() else torch.device("cpu")


def bind_device() -> torch.device:
    """Binds this process to its device: the GPU of its local rank, or the CPU.

    On the CPU megatron-core gets its stand-ins and freed memory stays in the process.
    """
    if has_accelerator():
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
        torch.cuda.set_device(rank % torch.cuda.device_count())
        return current_device()
    from mindspeed_lora.device.heap import keep_freed_memory
    from mindspeed_lora.device.megatron_cpu import install_cpu_stand_ins

    install_cpu_stand_ins()
    keep_freed_memory()
    return current_device()


def communication_backend(requested: str | None) -> tuple[str, str | None]:
    """The backend of torch.distributed, and a notice where it is not the one that was asked for."""
    if has_accelerator():
        return requested or "nccl", None
    if requested == "nccl":
        return "gloo", "no CUDA device here: --distributed-backend nccl becomes gloo"
    return requested or "gloo", None


def compute_dtype(bf16: bool, fp16: bool, on_cpu: bool | None = None) -> tuple[torch.dtype, str | None]:
    """The dtype of weights and activations, and a notice where it is not the one that was asked for.

    ``on_cpu`` left out: whether this machine computes on its CPU.

    A CPU without bf16 instructions multiplies bf16 matrices some 200 times slower than fp32 ones.
    """
    wanted = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    on_cpu = not has_accelerator() if on_cpu is None else on_cpu
    if not on_cpu or wanted is torch.float32:
        return wanted, None
    if wanted is torch.bfloat16 and _cpu_has_bf16():
        return wanted, None
    name = "--bf16" if bf16 else "--fp16"
    return torch.float32, f"this CPU has no fast {name[2:]} matrix product: {name} computes in fp32"


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def synchronize() -> None:
    """Waits until the device has done all work given to it."""
    if has_accelerator():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Largest allocation of the device so far; on the CPU the largest resident size of this process."""
    if has_accelerator():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory_bytes() -> int:
    """What this process holds in memory now, device memory not counted; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def random_states() -> dict[str, torch.Tensor]:
    """The generators' states of this process, as uint8 tensors by name."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state()}
    if has_accelerator():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.clone() for name, state in states.items()}


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Sets the generators to states that :func:`random_states` gave."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["cpu"])
    if has_accelerator() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    tracked = {n[len(prefix) :]: s for n, s in states.items() if n.startswith(prefix)}
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)
