"""Stand-ins that let megatron-core 0.16.1 run on a machine without CUDA.

megatron-core asks ``torch.cuda`` for the current device, streams and random state, and names the device
``"cuda"`` in some factory calls. Its modules get, in place of their global ``torch``, a module object that
answers those few names for the CPU and is the real torch in all else. torch itself stays untouched, so no
other library in the process notices, and calls through the stand-in cost no more than a dictionary look-up.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "tensor", "zeros", "zeros_like")
_MODULES = (
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory with ``device="cuda"`` read as the CPU, and without pinned memory, which needs a driver."""

    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and "cuda" in str(kwargs["device"]):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _Stream:
    """A stream of a device that runs everything in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, _other: _Stream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def _nothing(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    yield


def _cuda_stand_in() -> types.ModuleType:
    """``torch.cuda`` for the CPU: its names answered where a CPU has an answer, else torch's own."""
    stand_in = types.ModuleType("torch.cuda")
    stand_in.__dict__.update(torch.cuda.__dict__)
    cpu = torch.device("cpu")
    answers: dict[str, Any] = {
        "Stream": _Stream,
        "current_device": lambda: cpu,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "manual_seed": torch.manual_seed,
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "stream": _nothing,
        "synchronize": lambda device=None: None,
    }
    stand_in.__dict__.update(answers)
    return stand_in


def _torch_stand_in() -> types.ModuleType:
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.__dict__["cuda"] = _cuda_stand_in()
    for name in _FACTORIES:
        stand_in.__dict__[name] = _on_cpu(getattr(torch, name))
    # Names that torch resolves lazily are not in its dictionary yet.
    stand_in.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    return stand_in


def install_cpu_stand_ins() -> None:
    """Gives every loaded megatron-core module the CPU's answers; a second call does nothing."""
    for name in _MODULES:
        importlib.import_module(name)
    stand_in = _torch_stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.__dict__["torch"] = stand_in
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    # These two reach into torch._C, which has no generator of a device that is not there.
    random.__dict__["_get_cuda_rng_state"] = _get_rng_state
    random.__dict__["_set_cuda_rng_state"] = _set_rng_state


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)
