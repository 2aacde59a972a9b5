"""Parameter-efficient fine-tuning of large language models with Megatron-core parallelism."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed_lora.api import convert, job, load, merge, prepare, train, trainer
    from mindspeed_lora.errors import Failed, Refused

__version__ = "0.1.0"
__all__ = ["Failed", "Refused", "convert", "job", "load", "merge", "prepare", "train", "trainer"]

# Here, before any module of the package: megatron-core tells on import, once a rank, of every optional accelerator
# that is not installed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch 2.13 renames the collectives that megatron-core 0.16 calls.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def __getattr__(name: str) -> Any:
    """The Python API (``api.py``), imported when first asked for: the commands need none of it."""
    if name in ("Failed", "Refused"):
        from mindspeed_lora import errors

        return getattr(errors, name)
    if name in __all__:
        from mindspeed_lora import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, those that are not imported yet included."""
    return sorted({*globals(), *__all__})
