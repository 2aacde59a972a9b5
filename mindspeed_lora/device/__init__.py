"""All that differs between CUDA and CPU; nowhere else in the package asks which of them it runs on."""

from mindspeed_lora.device.heap import release_freed_memory
from mindspeed_lora.device.runtime import (
    bind_device,
    communication_backend,
    compute_dtype,
    current_device,
    has_accelerator,
    peak_memory_bytes,
    random_states,
    resident_memory_bytes,
    restore_random_states,
    synchronize,
)

__all__ = [
    "bind_device",
    "communication_backend",
    "compute_dtype",
    "current_device",
    "has_accelerator",
    "peak_memory_bytes",
    "random_states",
    "release_freed_memory",
    "resident_memory_bytes",
    "restore_random_states",
    "synchronize",
]
