"""LoRA over column- and row-parallel linears, and over those that are not cut.

``y = x Wᵀ + Σ_p s_p · (x A_pᵀ) B_pᵀ`` (LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3), where the parts p
of an adapter each cover a block of W's rows; a fused matrix with one shared A is the case of one part. The products
are in :mod:`mindspeed_lora.adapters.side_branch`, their order and the collectives between them in
:mod:`mindspeed_lora.adapters.schedules`.

Shapes, with t the TP size:

=======  =========================  ======================
linear   A                          B
=======  =========================  ======================
column   ``[r, in]`` replicated     ``[out/t, r]`` sharded
row      ``[r, in/t]`` sharded      ``[out, r]`` replicated
whole    ``[r, in]`` replicated     ``[out, r]`` replicated
=======  =========================  ======================

Linears that are not cut are the down projections of multi-latent attention. They have no collective, and only under SP
do their factors see a part of the tokens. A replicated factor of the others sees only this rank's rows of W, columns
of W or part of the sequence: unless the schedule sums on the way, its gradient is a partial sum over TP
(``partial_over_tp``) and is summed once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from mindspeed_lora.adapters.dropout import keep_mask, kept_share
from mindspeed_lora.adapters.schedules import Family, SchedulePlan, one_collective, overlapped, unfused
from mindspeed_lora.adapters.schedules.plan import UNFUSED
from mindspeed_lora.adapters.side_branch import Parts, RowBlock, SideBranch
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.parallel.overlap import TokenAxis
from mindspeed_lora.quantization.product import Frozen

Tensor = torch.Tensor
Schedule = Callable[[Tensor, Frozen, SideBranch, TokenAxis, bool], Callable[[], Tensor]]
"""Input, frozen weight, side branch, tokens, whether to merge: starts a linear, and returns what ends it."""


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
        plan: SchedulePlan = UNFUSED,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = torch.nn.ModuleList(parts)
        self.dropout = dropout
        self.tp_group, self.tp_rank = tp_group, dist.get_rank(tp_group)
        self.tp_size = dist.get_world_size(tp_group)
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.use(plan)

    def use(self, plan: SchedulePlan) -> None:
        """Runs this schedule from now on; not between the micro-batches of a step, whose gradients add up."""
        self.plan = plan
        self.axis = TokenAxis(self.tp_group, self.tp_size, self.tp_rank, self.sequence_parallel, plan.chunks)
        # On one rank no schedule has anything to order.
        self._begin = self._schedules[plan.family if self.tp_size > 1 else Family.ONE_COLLECTIVE]
        for part in self._parts():
            for replicated in self._replicated(part):
                replicated.partial_over_tp = self._is_partial(plan)  # type: ignore[attr-defined]

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> tuple[Tensor, Tensor | None]:
        """The output of the linear with its adapter, and the bias that the base leaves to the caller.

        Args:
            x: ``[s, b, in]``, ``[s/t, b, in]`` (column, SP) or ``[s, b, in/t]`` (row).
            context: of the micro-batch; without it, or without its token keys, nothing is dropped.
        """
        return self.begin(x, context)()

    def begin(
        self, x: Tensor, context: ForwardContext | None = None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Starts :meth:`forward`, which what is returned ends: other work may be done while tokens travel."""
        base: Any = self.base_layer
        parts = self._parts()
        masks = self._masks(x, context)
        branch = SideBranch(
            Parts(
                rows=tuple(part.rows for part in parts),
                scalings=tuple(part.scaling for part in parts),
                kept_share=kept_share(self.dropout),
            ),
            [factor for part in parts for factor in (part.lora_a, part.lora_b)],
            masks,
        )
        may_merge = masks is None and isinstance(base.weight, Tensor)
        merge = may_merge and self.plan.merges(self._num_tokens(x))
        finish = self._begin(x, base.weight, branch, self.axis, merge)

        def finish_with_bias() -> tuple[Tensor, Tensor | None]:
            output = finish()
            if base.bias is None or base.skip_bias_add:
                return output, base.bias
            return output + base.bias, None

        return finish_with_bias

    def extra_repr(self) -> str:
        """The schedule, for the printed module tree."""
        return f"schedule={self.plan}"

    def _masks(self, x: Tensor, context: ForwardContext | None) -> list[Tensor] | None:
        """Per part which elements of the input stay, bool ``[T, in]``; None where nothing is dropped."""
        if self.dropout == 0.0 or not self.training or context is None or context.token_keys is None:
            return None
        keys, features = self._token_keys(context.token_keys).reshape(-1), self._features(x.size(-1))
        return [keep_mask(keys, part.stream, features, self.dropout) for part in self._parts()]

    def _parts(self) -> list[LoraPart]:
        return [part for part in self.parts if isinstance(part, LoraPart)]

    _schedules: ClassVar[dict[Family, Schedule]]

    @staticmethod
    def _replicated(part: LoraPart) -> tuple[Tensor, ...]:
        """The factors that every TP rank holds whole."""
        raise AssertionError("a parallel linear is column- or row-parallel")

    def _is_partial(self, plan: SchedulePlan) -> bool:
        """Whether a replicated factor's gradient is a partial sum over TP."""
        return plan.is_partial(self.sequence_parallel)

    def _token_keys(self, keys: Tensor) -> Tensor:
        """Those of the tokens that this rank computes, out of the whole sequence's ``[s, b]``."""
        return keys

    def _num_tokens(self, x: Tensor) -> int:
        """Tokens of the whole sequence in the input."""
        raise AssertionError("a parallel linear is column- or row-parallel")

    def _features(self, width: int) -> tuple[int, int]:
        """First and end of the ``width`` input features of this rank in the whole matrix."""
        raise AssertionError("a parallel linear is column- or row-parallel")


class ColumnParallelLora(ParallelLoraLinear):
    """Adapter of ``linear_qkv`` and ``linear_fc1``: A replicated, B's rows sharded like W's."""

    _schedules: ClassVar[dict[Family, Schedule]] = {
        Family.UNFUSED: unfused.begin_column,
        Family.ONE_COLLECTIVE: one_collective.begin_column,
        Family.OVERLAPPED: overlapped.begin_column,
    }

    @staticmethod
    def _replicated(part: LoraPart) -> tuple[Tensor, ...]:
        return (part.lora_a,)

    def _num_tokens(self, x: Tensor) -> int:
        return x[..., 0].numel() * self.axis.cut

    def _features(self, width: int) -> tuple[int, int]:
        return 0, width


class RowParallelLora(ParallelLoraLinear):
    """Adapter of ``linear_proj`` and ``linear_fc2``: A's columns sharded like W's, B replicated."""

    _schedules: ClassVar[dict[Family, Schedule]] = {
        Family.UNFUSED: unfused.begin_row,
        Family.ONE_COLLECTIVE: one_collective.begin_row,
        Family.OVERLAPPED: overlapped.begin_row,
    }

    @staticmethod
    def _replicated(part: LoraPart) -> tuple[Tensor, ...]:
        return (part.lora_b,)

    def _num_tokens(self, x: Tensor) -> int:
        return x[..., 0].numel()

    def _features(self, width: int) -> tuple[int, int]:
        return self.tp_rank * width, (self.tp_rank + 1) * width


class ReplicatedLora(ParallelLoraLinear):
    """Adapter of a linear that is not cut: A and B whole on every rank, applied to this rank's tokens.

    The side branch and the base are one process's, whatever the plan says of the collectives that are not there.
    """

    _schedules: ClassVar[dict[Family, Schedule]] = dict.fromkeys(Family, one_collective.begin_column)

    def use(self, plan: SchedulePlan) -> None:
        """Runs the plan's products; nothing travels."""
        super().use(replace(plan, family=Family.ONE_COLLECTIVE))
        self.axis = TokenAxis(self.tp_group, 1, 0, False)

    @staticmethod
    def _replicated(part: LoraPart) -> tuple[Tensor, ...]:
        return part.lora_a, part.lora_b

    def _is_partial(self, plan: SchedulePlan) -> bool:
        return self.sequence_parallel

    def _token_keys(self, keys: Tensor) -> Tensor:
        return keys.chunk(self.tp_size)[self.tp_rank] if self.sequence_parallel else keys

    def _num_tokens(self, x: Tensor) -> int:
        return x[..., 0].numel() * (self.tp_size if self.sequence_parallel else 1)

    def _features(self, width: int) -> tuple[int, int]:
        return 0, width
