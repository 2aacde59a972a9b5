"""LoRA over megatron-core's column- and row-parallel linears.

``y = x Wᵀ + Σ_p s_p · (x A_pᵀ) B_pᵀ`` (LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3), where the parts p
of an adapter each cover a block of W's rows; a fused matrix with one shared A is the case of one part. The products
and their collectives are in :mod:`mindspeed_lora.adapters.products`.

Shapes, with t the TP size:

=======  =========================  ======================
linear   A                          B
=======  =========================  ======================
column   ``[r, in]`` replicated     ``[out/t, r]`` sharded
row      ``[r, in/t]`` sharded      ``[out, r]`` replicated
=======  =========================  ======================

A replicated factor sees only this rank's rows of W, columns of W or part of the sequence: its gradient is a partial
sum over TP (``partial_over_tp``) and is summed once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.adapters.dropout import keep_mask, kept_share
from mindspeed_lora.adapters.products import Layout, RowBlock, column_products, row_products
from mindspeed_lora.models.forward_context import ForwardContext

Tensor = torch.Tensor


class LoraPart(torch.nn.Module):
    """One pair of factors: ``lora_a [r, in]`` and ``lora_b [rows.count, r]``, local shards, and their scaling."""

    def __init__(
        self,
        rank: int,
        in_features: int,
        rows: RowBlock,
        scaling: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.scaling = scaling
        self.stream = 0
        """Sets the dropout mask of this A apart from all others; from its canonical name."""
        self.lora_a = torch.nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.lora_b = torch.nn.Parameter(torch.zeros(rows.count, rank, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        """Rank, rows and scaling, for the printed module tree."""
        rows = f"{self.rows.start}:{self.rows.stop}"
        if self.rows.repeats > 1:
            rows += f" ×{self.rows.repeats} every {self.rows.stride}"
        return f"rank={self.lora_a.size(0)}, rows={rows}, scaling={self.scaling:g}"


class ParallelLoraLinear(torch.nn.Module):
    """A frozen parallel linear and its adapter; called like the linear that it replaces."""

    def __init__(
        self,
        base_layer: torch.nn.Module,
        parts: Sequence[LoraPart],
        dropout: float,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = torch.nn.ModuleList(parts)
        self.dropout = dropout
        self.sequence_parallel = sequence_parallel
        self.tp_group = tp_group
        self.tp_rank, self.tp_size = dist.get_rank(tp_group), dist.get_world_size(tp_group)

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> tuple[Tensor, Tensor | None]:
        """The output of the linear with its adapter, and the bias that the base leaves to the caller.

        Args:
            x: ``[s, b, in]``, ``[s/t, b, in]`` (column, SP) or ``[s, b, in/t]`` (row).
            context: of the micro-batch; without it, or without its token keys, nothing is dropped.
        """
        base: Any = self.base_layer
        masks = self._masks(x, context)
        factors = [factor for part in self._parts() for factor in (part.lora_a, part.lora_b)]
        output = self._products(x, base.weight, self._layout(), masks, factors)
        if base.bias is None or base.skip_bias_add:
            return output, base.bias
        return output + base.bias, None

    def _layout(self) -> Layout:
        parts = self._parts()
        return Layout(
            tp_group=self.tp_group,
            tp_size=self.tp_size,
            tp_rank=self.tp_rank,
            sequence_parallel=self.sequence_parallel,
            rows=tuple(part.rows for part in parts),
            scalings=tuple(part.scaling for part in parts),
            kept_share=kept_share(self.dropout),
        )

    def _masks(self, x: Tensor, context: ForwardContext | None) -> list[Tensor] | None:
        """Per part which elements of the input stay, bool ``[T, in]``; None where nothing is dropped."""
        if self.dropout == 0.0 or not self.training or context is None or context.token_keys is None:
            return None
        keys, features = context.token_keys.reshape(-1), self._features(x.size(-1))
        return [keep_mask(keys, part.stream, features, self.dropout) for part in self._parts()]

    def _parts(self) -> list[LoraPart]:
        return [part for part in self.parts if isinstance(part, LoraPart)]

    _products: Callable[[Tensor, Tensor, Layout, list[Tensor] | None, Sequence[Tensor]], Tensor]

    def _features(self, width: int) -> tuple[int, int]:
        """First and end of the ``width`` input features of this rank in the whole matrix."""
        raise AssertionError("a parallel linear is column- or row-parallel")


class ColumnParallelLora(ParallelLoraLinear):
    """Adapter of ``linear_qkv`` and ``linear_fc1``: A replicated, B's rows sharded like W's."""

    _products = staticmethod(column_products)

    def _features(self, width: int) -> tuple[int, int]:
        return 0, width


class RowParallelLora(ParallelLoraLinear):
    """Adapter of ``linear_proj`` and ``linear_fc2``: A's columns sharded like W's, B replicated."""

    _products = staticmethod(row_products)

    def _features(self, width: int) -> tuple[int, int]:
        return self.tp_rank * width, (self.tp_rank + 1) * width
