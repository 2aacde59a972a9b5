"""Parallel linears, called with the context of the micro-batch like those that carry an adapter: megatron-core's own,
and one that is not cut.

Their weight may be quantised, a module in place of the parameter; megatron-core's own forward pass does not know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as MegatronColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as MegatronRowParallelLinear
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.frozen_linear import frozen_column, frozen_row
from mindspeed_lora.parallel.overlap import TokenAxis
from mindspeed_lora.quantization.shard import QuantizedWeight

Tensor = torch.Tensor


def _axis(linear: MegatronColumnParallelLinear | MegatronRowParallelLinear) -> TokenAxis:
    group = linear.tp_group
    return TokenAxis(group, dist.get_world_size(group), dist.get_rank(group), linear.sequence_parallel)


def _with_bias(linear: Any, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output and the bias that is left to the caller."""
    if linear.bias is None or linear.skip_bias_add:
        return output, linear.bias
    return output + linear.bias, None


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
        if isinstance(self.weight, QuantizedWeight):
            return _with_bias(self, frozen_column(x, self.weight, _axis(self)))
        output: tuple[Tensor, Tensor | None] = super().forward(x)
        return output


class RowParallelLinear(_BegunWhole, MegatronRowParallelLinear):
    """``linear_proj`` and ``linear_fc2``: columns of the weight are cut over TP."""

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> tuple[Tensor, Tensor | None]:
        """``[s, b, in/t]`` to ``[s, b, out]``, under SP ``[s/t, b, out]``, and the bias that is left to the caller."""
        if isinstance(self.weight, QuantizedWeight):
            return _with_bias(self, frozen_row(x, self.weight, _axis(self)))
        output: tuple[Tensor, Tensor | None] = super().forward(x)
        return output


class ReplicatedLinear(_BegunWhole, torch.nn.Module):
    """A linear without bias that every TP rank holds whole: nothing travels.

    Under SP each rank applies it to its own part of the sequence, and its gradient is a partial sum over TP.
    """

    bias = None
    skip_bias_add = False

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> tuple[Tensor, None]:
        """``[…, in]`` to ``[…, out]``."""
        if isinstance(self.weight, QuantizedWeight):
            return frozen_column(x, self.weight, TokenAxis(dist.group.WORLD, 1, 0, False)), None
        return F.linear(x, self.weight), None


class UnbiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear without bias, whatever ``config.add_bias_linear`` says for the others."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class UnbiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear without bias, whatever ``config.add_bias_linear`` says for the others."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)
