"""megatron-core's parallel linears, called with the context of the micro-batch like those that carry an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as MegatronColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as MegatronRowParallelLinear

from mindspeed_lora.models.forward_context import ForwardContext

Tensor = torch.Tensor


class _BegunWhole:
    """Lets a linear without an adapter be begun and ended like one with: all of it runs at the end."""

    def begin(
        self, x: Tensor, context: ForwardContext | None = None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """What is returned is the forward pass."""
        linear: Any = self
        return lambda: linear(x, context)


class ColumnParallelLinear(_BegunWhole, MegatronColumnParallelLinear):
    """``linear_qkv`` and ``linear_fc1``: rows of the weight are cut over TP."""

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> tuple[Tensor, Tensor | None]:
        """``[s, b, in]``, under SP ``[s/t, b, in]``, to ``[s, b, out/t]``, and the bias that is left to the caller."""
        output: tuple[Tensor, Tensor | None] = super().forward(x)
        return output


class RowParallelLinear(_BegunWhole, MegatronRowParallelLinear):
    """``linear_proj`` and ``linear_fc2``: columns of the weight are cut over TP."""

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> tuple[Tensor, Tensor | None]:
        """``[s, b, in/t]`` to ``[s, b, out]``, under SP ``[s/t, b, out]``, and the bias that is left to the caller."""
        output: tuple[Tensor, Tensor | None] = super().forward(x)
        return output


class UnbiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear without bias, whatever ``config.add_bias_linear`` says for the others."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class UnbiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear without bias, whatever ``config.add_bias_linear`` says for the others."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)
