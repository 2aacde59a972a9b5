"""Parameter-efficient fine-tuning of large language models with Megatron-core parallelism."""

__version__ = "0.1.0"

import warnings

# Here, before any module of the package: megatron-core tells on import, once a rank, of every optional accelerator
# that is not installed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch 2.13 renames the collectives that megatron-core 0.16 calls.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
