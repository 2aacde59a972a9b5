"""All that differs between CUDA and CPU; nowhere else in the package asks which of them it runs on."""

import warnings

# megatron-core tells on import, once a rank, of every optional accelerator that is not installed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch 2.13 renames the collectives that megatron-core 0.16 calls.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

from mindspeed_lora.device.runtime import (  # noqa: E402
    bind_device,
    communication_backend,
    compute_dtype,
    current_device,
    has_accelerator,
    peak_memory_bytes,
    random_states,
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
    "restore_random_states",
    "synchronize",
]
