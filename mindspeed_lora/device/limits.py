"""How much memory this process may have."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from mindspeed_lora.device.runtime import has_accelerator, resident_memory_bytes

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free_memory_bytes() -> int:
    """What this process may still take: of its device; on the CPU of the machine, its container, or its ``ulimit -v``.

    Ranks of one machine share it: where they are several, each counts the memory of all as its own.
    """
    if has_accelerator():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    resident = resident_memory_bytes()
    limits = [_of_machine() - resident]
    limits += [limit - resident for path in _CGROUP_LIMITS if (limit := _number(path)) is not None]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - _mapped_bytes())
    return max(0, min(limits))


def _of_machine() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()


def _number(path: str) -> int | None:
    """A limit in a file; None where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
