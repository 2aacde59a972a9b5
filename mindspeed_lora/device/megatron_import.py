"""Importing megatron-core 0.16.1 without paying for what is not used.

Its modules decorate some 40 functions with ``torch.compile``, which imports torch's compiler with all of its
templates: more than a second on every start, of every rank. Here the decorator waits for the first call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch


def import_megatron() -> None:
    """Import ``megatron.core``; ``torch.compile`` is itself again afterwards."""
    compile_now = torch.compile
    torch.compile = functools.partial(_compile_at_first_call, compile_now)
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_now


def _compile_at_first_call(
    compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """What ``torch.compile`` returns, but nothing of the compiler is touched before it is called."""
    if function is None:
        return functools.partial(_compile_at_first_call, compile_now, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = compile_now(function, **options)
        return compiled(*args, **kwargs)

    return call
