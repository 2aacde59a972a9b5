"""One linear with an adapter of several parts: dense by autograd, and as a TP rank has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.adapters.dropout import token_keys
from mindspeed_lora.adapters.lora import (
    ColumnParallelLora,
    LoraPart,
    ParallelLoraLinear,
    RowParallelLora,
)
from mindspeed_lora.adapters.schedules import SchedulePlan
from mindspeed_lora.adapters.schedules.plan import UNFUSED
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.parallel.collectives import all_reduce_sum
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.quantization.matrix import quantize
from mindspeed_lora.quantization.runs import Piece
from mindspeed_lora.quantization.shard import QuantizedWeight

Tensor = torch.Tensor


@dataclass(frozen=True)
class Problem:
    """``y = x Wᵀ + Σ_p s_p (x A_pᵀ) B_pᵀ`` with random values; ``x [s, b, in]``."""

    parts: tuple[tuple[int, int, int, float], ...]
    """First row, end, rank and scaling of each part, for a shard of all rows; of repeating blocks the first one."""
    repeats: int = 1
    """How often each block repeats, evenly over all rows."""
    in_features: int = 8
    out_features: int = 12
    s: int = 6
    b: int = 2
    bias: bool = False
    delta: float | None = None
    """Size of ``Σ s · B A`` beside W's, by norm; None: as drawn."""
    rounded_to: torch.dtype = torch.float64
    """Every value has a place in it."""

    @property
    def stride(self) -> int:
        """Rows from one repetition of a block to the next."""
        return self.out_features // self.repeats

    def values(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """x, W, the gradient of the output, and every A and B, in float64."""
        generator = torch.Generator().manual_seed(17)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        x, weight = draw(self.s, self.b, self.in_features), draw(self.out_features, self.in_features)
        grad = draw(self.s, self.b, self.out_features)
        a = [draw(rank, self.in_features) for _, _, rank, _ in self.parts]
        b = [draw(self.repeats * (stop - start), rank) for start, stop, rank, _ in self.parts]
        if self.delta is not None:
            factor = self.delta * weight.norm() / (self.parts[0][3] * b[0] @ a[0]).norm()
            b = [factor * lora_b for lora_b in b]

        def rounded(value: Tensor) -> Tensor:
            return value.to(self.rounded_to).double()

        return rounded(x), rounded(weight), rounded(grad), [*map(rounded, a)], [*map(rounded, b)]


PROBLEMS = {
    "shared": Problem(parts=((0, 12, 3, 2.0),)),
    "two parts": Problem(parts=((0, 6, 3, 2.0), (6, 12, 2, 0.5))),
    "rows without a part": Problem(parts=((0, 4, 1, 3.0), (8, 12, 2, 0.25))),
    "overlapping parts": Problem(parts=((0, 8, 2, 1.0), (4, 12, 2, 0.5))),
    "repeating parts": Problem(parts=((0, 3, 2, 1.0), (4, 5, 3, 0.5)), repeats=4, out_features=24),
}


@dataclass
class Result:
    """Output and gradients, whole or of one rank."""

    output: Tensor
    grad_x: Tensor
    grad_a: list[Tensor]
    grad_b: list[Tensor]


def dense(problem: Problem, blocks: int = 1) -> Result:
    """By autograd on whole matrices.

    With ``blocks`` the rows of a part are those of each of so many equal blocks of W: what the shards of a column
    linear make of it. Parts that repeat are cut between two repetitions and stay where they are.
    """
    x, weight, grad, a, b = problem.values()
    inputs = [tensor.requires_grad_() for tensor in (x, *a, *b)]
    output = x @ weight.t()
    for (start, stop, _, scaling), lora_a, lora_b in zip(problem.parts, a, b, strict=True):
        added = scaling * (x @ lora_a.t()) @ lora_b.t()
        if problem.repeats > 1:
            rows = [torch.arange(start, stop) + i * problem.stride for i in range(problem.repeats)]
        else:
            height = problem.out_features // blocks
            rows = [torch.arange(start // blocks, stop // blocks) + block * height for block in range(blocks)]
        output = output.index_add(-1, torch.cat(rows), added)
    grads = list(torch.autograd.grad((output * grad).sum(), inputs))
    return Result(output.detach(), grads[0], grads[1 : 1 + len(a)], grads[1 + len(a) :])


def linear(
    problem: Problem,
    kind: str,
    groups: ParallelGroups,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    plan: SchedulePlan = UNFUSED,
) -> tuple[ParallelLoraLinear, Tensor]:
    """This rank's layer and its share of x. Parts of a column linear are blocks of every rank's rows."""
    x, weight, _, a, b = (_to(value, dtype) for value in problem.values())
    tp, rank = groups.tp_size, groups.tp_rank
    config = TransformerConfig(
        num_layers=1,
        hidden_size=problem.in_features,
        num_attention_heads=4,
        params_dtype=dtype,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )
    column = kind == "column"
    sizes = problem.in_features, problem.out_features
    common = {
        "config": config,
        "init_method": torch.nn.init.zeros_,
        "bias": problem.bias,
        "skip_bias_add": True,
    }
    if column:
        base = ColumnParallelLinear(*sizes, gather_output=False, **common)
    else:
        base = RowParallelLinear(*sizes, input_is_parallel=True, **common)
    base.requires_grad_(False)
    base.weight.copy_(weight.chunk(tp, dim=0 if column else 1)[rank])
    parts = []
    for (start, stop, r, scaling), lora_a, lora_b in zip(problem.parts, a, b, strict=True):
        if problem.repeats > 1:
            rows = RowBlock(start, stop, problem.repeats // (tp if column else 1), problem.stride)
        else:
            rows = RowBlock(start // tp, stop // tp) if column else RowBlock(start, stop)
        lora_a = lora_a if column else lora_a.chunk(tp, dim=1)[rank]
        part = LoraPart(r, lora_a.size(1), rows, scaling, dtype, torch.device("cpu"))
        with torch.no_grad():
            part.lora_a.copy_(lora_a)
            part.lora_b.copy_(lora_b.chunk(tp, dim=0)[rank] if column else lora_b)
        parts.append(part)
    wrapper = ColumnParallelLora if column else RowParallelLora
    layer = wrapper(base, parts, dropout, sequence_parallel, groups.tp_group, plan)
    if column:
        share = x.chunk(tp, dim=0)[rank] if sequence_parallel else x
    else:
        share = x.chunk(tp, dim=2)[rank]
    return layer, share.contiguous()


def keys(problem: Problem) -> ForwardContext:
    """Each token of a problem by its place."""
    places = torch.arange(problem.s * problem.b).view(problem.s, problem.b)
    return ForwardContext(token_keys=token_keys(1234, 1, places, places))


def sharded(
    problem: Problem,
    kind: str,
    groups: ParallelGroups,
    sequence_parallel: bool = False,
    dropout: float = 0.0,
    plan: SchedulePlan = UNFUSED,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """Output and gradients of this rank, those that are partial sums summed over the ranks."""
    layer, x = linear(problem, kind, groups, sequence_parallel, dtype, dropout, plan)
    tp, rank = groups.tp_size, groups.tp_rank
    grad = problem.values()[2].to(dtype)
    if kind == "column":
        grad = grad.chunk(tp, dim=2)[rank]
    elif sequence_parallel:
        grad = grad.chunk(tp, dim=0)[rank]
    x.requires_grad_()
    output = layer(x, keys(problem))[0]
    (output * grad).sum().backward()
    parts = [part for part in layer.parts if isinstance(part, LoraPart)]
    for part in parts:
        for factor in (part.lora_a, part.lora_b):
            if getattr(factor, "partial_over_tp", False):
                all_reduce_sum(factor.grad, groups.tp_group)
    return Result(
        output.detach(), x.grad, [part.lora_a.grad for part in parts], [part.lora_b.grad for part in parts]
    )


def joined(ranks: list[Result], kind: str, sequence_parallel: bool) -> Result:
    """The whole of what the ranks hold; what each of them holds whole must be the same to the bit."""
    column = kind == "column"

    def whole(values: list[Tensor], dim: int | None) -> Tensor:
        if dim is not None:
            return torch.cat(values, dim=dim)
        assert all(torch.equal(value, values[0]) for value in values), "replicas differ"
        return values[0]

    sequence = 0 if sequence_parallel else None
    parts = range(len(ranks[0].grad_a))
    return Result(
        whole([rank.output for rank in ranks], 2 if column else sequence),
        whole([rank.grad_x for rank in ranks], sequence if column else 2),
        [whole([rank.grad_a[part] for rank in ranks], None if column else 1) for part in parts],
        [whole([rank.grad_b[part] for rank in ranks], 0 if column else None) for part in parts],
    )


def _to(value: Tensor | list[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    return [tensor.to(dtype) for tensor in value] if isinstance(value, list) else value.to(dtype)


def quantise_base(layer: ParallelLoraLinear) -> None:
    """Puts the quantised form of this rank's shard in place of the frozen weight, as if it were a whole matrix."""
    base = layer.base_layer
    weight: Tensor = base.weight  # type: ignore[assignment]
    matrix = quantize(weight.detach().float(), QuantSettings(), "a weight")
    piece = Piece(0, (0, weight.size(0)), (0, weight.size(1)))
    del base.weight
    base.add_module(
        "weight", QuantizedWeight.from_matrices([matrix], [piece], tuple(weight.shape), weight.dtype)
    )
