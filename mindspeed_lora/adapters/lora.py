"""LoRA over megatron-core's column- and row-parallel linears, one collective per sub-layer.

``y = x Wᵀ + Σ_p s_p · (x A_pᵀ) B_pᵀ`` (LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3), where the parts p
of an adapter each cover a block of W's rows; a fused matrix with one shared A is the case of one part.

Shapes, with t the TP size and T = s · b tokens:

=======  =========================  =======================  ==========================================
linear   A                          B                        collectives of the adapter
=======  =========================  =======================  ==========================================
column   ``[r, in]`` replicated     ``[out/t, r]`` sharded   no SP: all-reduce of ``g B`` in backward;
                                                             SP: all-gather of ``x Aᵀ``, reduce-scatter
                                                             of ``g B`` in backward
row      ``[r, in/t]`` sharded      ``[out, r]`` replicated  no SP: all-reduce of ``x Aᵀ``;
                                                             SP: reduce-scatter of ``x Aᵀ``, all-gather
                                                             in backward
=======  =========================  =======================  ==========================================

Under SP a replicated factor sees only this rank's part of the sequence: its gradient is a partial sum over TP
(``partial_over_tp``) and is summed once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowBlock:
    """Rows of this rank's shard of the base matrix that a part adds to: a block that may repeat.

    Rows ``[start + i · stride, stop + i · stride)`` for i < ``repeats``, in this order. Megatron interleaves q, k
    and v by query group, so that each of them is a block that repeats once per group of this rank; gate and up are
    one block each.
    """

    start: int
    stop: int
    repeats: int = 1
    stride: int = 0

    @property
    def count(self) -> int:
        """Number of rows in all."""
        return self.repeats * (self.stop - self.start)

    def of(self, output: Tensor) -> Tensor:
        """The view ``[…, repeats, stop − start]`` of these rows in ``output […, out]``."""
        width, stride = self.stop - self.start, max(self.stride, self.stop - self.start)
        reach = (self.repeats - 1) * stride + width
        return output.narrow(-1, self.start, reach).unfold(-1, width, stride)


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output of the linear with its adapter, and the bias that the base leaves to the caller.

        Args:
            x: ``[s, b, in]``, ``[s/t, b, in]`` (column, SP) or ``[s, b, in/t]`` (row).
        """
        output, bias = self.base_layer(x)
        dropped = self._drop(x)
        parts = [(part.rows, self._part_output(dropped, part)) for part in self._parts()]
        if len(parts) == 1 and parts[0][1].size(-1) == output.size(-1):
            return output + parts[0][1], bias
        return output + _assemble(parts, output), bias

    def _parts(self) -> list[LoraPart]:
        return [part for part in self.parts if isinstance(part, LoraPart)]

    def _drop(self, x: Tensor) -> Tensor:
        if self.dropout == 0.0 or not self.training:
            return x
        with self._dropout_stream():
            return F.dropout(x, self.dropout)

    def _part_output(self, x: Tensor, part: LoraPart) -> Tensor:
        raise AssertionError("a parallel linear is column- or row-parallel")

    def _dropout_stream(self) -> AbstractContextManager[None]:
        raise AssertionError("a parallel linear is column- or row-parallel")


def _assemble(parts: Sequence[tuple[RowBlock, Tensor]], like: Tensor) -> Tensor:
    """The parts' outputs ``[…, rows]`` at their rows of ``[…, out]``; zero where no part stands."""
    total = torch.zeros_like(like)
    for rows, output in parts:
        rows.of(total).add_(output.unflatten(-1, (rows.repeats, -1)))
    return total


class ColumnParallelLora(ParallelLoraLinear):
    """Adapter of ``linear_qkv`` and ``linear_fc1``: A replicated, B's rows sharded like W's."""

    def _part_output(self, x: Tensor, part: LoraPart) -> Tensor:
        """``[s/t or s, b, in]`` → ``[s, b, rows]``."""
        inner = F.linear(x, part.lora_a)
        if self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        return F.linear(inner * part.scaling, part.lora_b)

    def _dropout_stream(self) -> AbstractContextManager[None]:
        # Without SP every TP rank holds the same x and must drop the same elements; with SP the whole block
        # already runs in the stream that differs between TP ranks.
        return nullcontext()


class RowParallelLora(ParallelLoraLinear):
    """Adapter of ``linear_proj`` and ``linear_fc2``: A's columns sharded like W's, B replicated."""

    def _part_output(self, x: Tensor, part: LoraPart) -> Tensor:
        """``[s, b, in/t]`` → ``[s or s/t, b, rows]``."""
        inner = F.linear(x, part.lora_a)
        if self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
        return F.linear(inner * part.scaling, part.lora_b)

    def _dropout_stream(self) -> AbstractContextManager[None]:
        stream: AbstractContextManager[None] = (
            nullcontext() if self.sequence_parallel else get_cuda_rng_tracker().fork()
        )
        return stream
