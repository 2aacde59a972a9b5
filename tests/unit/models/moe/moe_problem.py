"""A layer of experts with adapters and random values: by a plain formula, and as a rank of any layout has it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.adapters.grouped import GroupedLora, GroupedLoraPart
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.moe.layer import MoELayer
from mindspeed_lora.models.moe.routing import route, within_capacity
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.models.turns import by_turns
from mindspeed_lora.parallel.collectives import all_reduce_sum
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups

Tensor = torch.Tensor
Values = dict[str, Tensor]

HIDDEN, INNER, SHARED = 12, 8, 8
LOSS_SCALE = 40.0
SCALING = {"": 2.0, "gate": 0.5, "up": 1.5}
MOE = MoEShape(num_experts=8, topk=2, ffn_hidden_size=INNER, shared_ffn_hidden_size=SHARED)


@dataclass(frozen=True)
class Problem:
    """One micro-batch ``[s, b, h]`` for each of ``replicas`` data-parallel ranks, which differ."""

    moe: MoEShape = MOE
    s: int = 8
    b: int = 2
    replicas: int = 1
    split_gate_up: bool = False
    """Gate and up have separate factors of other ranks."""
    shared_pair: bool = False
    """One pair for all experts."""
    settings: MoESettings = MoESettings()
    """Of auxiliary losses each replica adds :data:`LOSS_SCALE` times its own."""
    seed: int = 3

    @property
    def parts(self) -> dict[str, tuple[str, int, int, int]]:
        """Linear, rank, input width and rows of each pair of factors."""
        fc1 = {"fc1": ("", 3, HIDDEN, 2 * INNER)}
        if self.split_gate_up:
            fc1 = {"fc1.gate": ("gate", 3, HIDDEN, INNER), "fc1.up": ("up", 2, HIDDEN, INNER)}
        return {**fc1, "fc2": ("", 3, INNER, HIDDEN)}

    def values(self) -> Values:
        """Every tensor of the layer, whole, in float64, and the input and output gradient of every replica."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        count = self.moe.num_experts
        values = {
            "router": draw(count, HIDDEN),
            "fc1": draw(count, 2 * INNER, HIDDEN) / 3,
            "fc2": draw(count, HIDDEN, INNER) / 3,
            "shared_fc1": draw(2 * SHARED, HIDDEN) / 3,
            "shared_fc2": draw(HIDDEN, SHARED) / 3,
            "shared_gate": draw(1, HIDDEN),
            "x": draw(self.replicas, self.s, self.b, HIDDEN),
            "grad": draw(self.replicas, self.s, self.b, HIDDEN),
        }
        experts = () if self.shared_pair else (count,)
        for name, (_, rank, width, rows) in self.parts.items():
            values[f"{name}.a"] = draw(*experts, rank, width) / 3
            values[f"{name}.b"] = draw(*experts, rows, rank) / 3
        return values


@dataclass
class Result:
    """Outputs and input gradients of the replicas, and the summed gradients of factors and router, all whole."""

    output: Tensor
    grad_x: Tensor
    factors: Values = field(default_factory=dict)


def plain(problem: Problem, routed: Callable[[Problem, Values, Tensor], Tensor] | None = None) -> Result:
    """By autograd, one expert and one token's choice after the other, or ``routed`` of a replica's tokens."""
    values = problem.values()
    names = [f"{name}.{factor}" for name in problem.parts for factor in "ab"]
    leaves = {name: values[name].requires_grad_() for name in ["x", "router", *names]}
    outputs = torch.stack([_plain_replica(problem, values, x, routed or _routed) for x in values["x"]])
    total = (outputs * values["grad"]).sum()
    for x in values["x"]:
        logits = x @ values["router"].t()
        total = total + LOSS_SCALE * plain_losses(logits, problem.settings, problem.moe.topk)
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = dict(zip(leaves, grads, strict=True))
    return Result(outputs.detach(), found.pop("x"), found)


def plain_losses(logits: Tensor, settings: MoESettings, topk: int) -> Tensor:
    """All losses of ``logits [s, b, E]``, by softmax, as their papers write them."""
    count = logits.size(-1)
    loss = settings.z_loss_coeff * torch.logsumexp(logits, -1).pow(2).mean()
    scores = logits.softmax(-1)
    chosen = F.one_hot(scores.topk(topk).indices, count).sum(dim=2).double()
    loss = loss + settings.aux_loss_coeff * count * (chosen.mean((0, 1)) / topk * scores.mean((0, 1))).sum()
    by_rows = (chosen.mean(0) / topk * scores.mean(0)).sum(-1)
    return loss + settings.seq_aux_loss_coeff * count * by_rows.mean()


def _routed(problem: Problem, values: Values, tokens: Tensor) -> Tensor:
    """``[T, h]``, what the experts make of the tokens."""
    routing = route(tokens @ values["router"].t(), problem.moe)
    routing = within_capacity(routing, problem.moe.num_experts, problem.settings)
    output = torch.zeros_like(tokens)
    for expert in range(problem.moe.num_experts):
        weight = (routing.weights * (routing.experts == expert)).sum(dim=1, keepdim=True)
        output = output + weight * expert_output(problem, values, expert, tokens)
    return output


def expert_output(problem: Problem, values: Values, expert: int, tokens: Tensor) -> Tensor:
    """``[T, h]``, what one expert with its adapters makes of the tokens."""
    fc1, fc2 = (_adapted(problem, values, linear, expert) for linear in ("fc1", "fc2"))
    gate, up = (tokens @ fc1.t()).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ fc2.t()


def _plain_replica(
    problem: Problem, values: Values, x: Tensor, routed: Callable[[Problem, Values, Tensor], Tensor]
) -> Tensor:
    tokens = x.reshape(-1, HIDDEN)
    output = routed(problem, values, tokens)
    if problem.moe.shared_ffn_hidden_size:
        gate, up = (tokens @ values["shared_fc1"].t()).chunk(2, dim=-1)
        shared = (F.silu(gate) * up) @ values["shared_fc2"].t()
        if problem.moe.shared_expert_gate:
            shared = shared * (tokens @ values["shared_gate"].t()).sigmoid()
        output = output + shared
    return output.view_as(x)


def _adapted(problem: Problem, values: Values, linear: str, expert: int) -> Tensor:
    """``W + Σ s · B A`` of one expert."""
    weight = values[linear][expert]
    for name, (label, *_) in problem.parts.items():
        if name.partition(".")[0] == linear:
            a, b = values[f"{name}.a"], values[f"{name}.b"]
            delta = SCALING[label] * (b @ a if problem.shared_pair else b[expert] @ a[expert])
            first = INNER if label == "up" else 0
            weight = weight.index_add(0, torch.arange(first, first + delta.size(0)), delta)
    return weight


@dataclass(frozen=True)
class Layout:
    """How the ranks share the layer."""

    tp: int = 1
    sp: bool = False
    ep: int = 1
    etp: int = 1
    world: int = 1
    cp: int = 1

    @property
    def replicas(self) -> int:
        return self.world // (self.tp * self.cp)

    def share(self, whole: Tensor, tp_rank: int, cp_rank: int) -> Tensor:
        """Of ``[s, b, h]``, what a rank holds."""
        share = whole.chunk(self.cp)[cp_rank]
        return share.chunk(self.tp)[tp_rank] if self.sp else share

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            context_parallel_size=self.cp,
            sequence_parallel=self.sp,
        )

    def __str__(self) -> str:
        cp = f" cp{self.cp}" if self.cp > 1 else ""
        return f"tp{self.tp}{'sp' if self.sp else ''}{cp} ep{self.ep} etp{self.etp} of {self.world}"


def build(problem: Problem, layout: Layout, groups: ParallelGroups, dropout: float = 0.0) -> MoELayer:
    """This rank's layer with its adapters, filled."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        params_dtype=torch.float64,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        use_cpu_initialization=True,
    )
    layer = MoELayer(config, problem.moe, groups, problem.settings).requires_grad_(False)
    values, experts = problem.values(), groups.experts
    layer.router.weight.copy_(values["router"]).requires_grad_()
    for name in ("fc1", "fc2"):
        linear = getattr(layer.experts, f"linear_{name}")
        linear.weight.copy_(local(values[name], name, groups))
        parts = []
        for part_name, (label, rank, width, rows) in problem.parts.items():
            if part_name.partition(".")[0] == name:
                parts.append(_part(problem, values, part_name, label, rank, width, rows, groups))
        column = name == "fc1"
        lora = GroupedLora(linear, parts, dropout, column, experts.etp_size, experts.etp_rank)
        setattr(layer.experts, f"linear_{name}", lora)
    if layer.shared_experts is not None:
        shared, tp = layer.shared_experts, groups.tp_rank
        halves = [half.chunk(layout.tp)[tp] for half in values["shared_fc1"].chunk(2)]
        shared.linear_fc1.weight.copy_(torch.cat(halves))
        shared.linear_fc2.weight.copy_(values["shared_fc2"].chunk(layout.tp, dim=1)[tp])
        if shared.gate_weight is not None:
            shared.gate_weight.copy_(values["shared_gate"])
    return layer


def _part(
    problem: Problem,
    values: Values,
    name: str,
    label: str,
    rank: int,
    width: int,
    rows: int,
    groups: ParallelGroups,
) -> GroupedLoraPart:
    etp = groups.experts.etp_size
    first = INNER // etp if label == "up" else 0
    if name.startswith("fc1"):
        block = RowBlock(first, first + rows // etp)
    else:
        block, width = RowBlock(0, rows), width // etp
    count = None if problem.shared_pair else len(groups.experts.experts(problem.moe.num_experts))
    part = GroupedLoraPart(rank, count, width, block, SCALING[label], torch.float64, torch.device("cpu"))
    with torch.no_grad():
        part.lora_a.copy_(local(values[f"{name}.a"], f"{name}.a", groups))
        part.lora_b.copy_(local(values[f"{name}.b"], f"{name}.b", groups))
    numbers = [0] if problem.shared_pair else groups.experts.experts(problem.moe.num_experts)
    part.streams = [1000 * number + len(name) for number in numbers]
    return part


def local(whole: Tensor, name: str, groups: ParallelGroups) -> Tensor:
    """This rank's experts and ETP shard of a whole tensor ``[E, …]``, or of a shared factor ``[…]``."""
    place = groups.experts
    if whole.dim() == 3:
        numbers = place.experts(whole.size(0))
        whole = whole[numbers.start : numbers.stop]
    if name in ("fc1", "fc1.b"):  # gate above up, each cut by itself
        return torch.cat(
            [half.chunk(place.etp_size, dim=-2)[place.etp_rank] for half in whole.chunk(2, dim=-2)], dim=-2
        )
    if name in ("fc1.gate.b", "fc1.up.b"):
        return whole.chunk(place.etp_size, dim=-2)[place.etp_rank]
    if name in ("fc2", "fc2.a"):
        return whole.chunk(place.etp_size, dim=-1)[place.etp_rank]
    return whole


@dataclass
class RankResult:
    """What a rank has: its replica's output and input gradient, and each factor's found and expected gradient."""

    replica: int
    tp_rank: int
    cp_rank: int
    output: Tensor
    grad_x: Tensor | None
    factors: dict[str, tuple[Tensor, Tensor]]


def on_rank(
    problem: Problem,
    layout: Layout,
    expected: Result,
    context: ForwardContext | None = None,
    dropout: float = 0.0,
    way: str = "whole",
) -> RankResult:
    """Runs in a world of ``layout.world`` ranks; factors' gradients are summed as the optimizer step sums them."""
    assert int(os.environ.get("WORLD_SIZE", "1")) == layout.world
    groups, _ = initialize_groups(layout.parallel(), seed=1)
    layer = build(problem, layout, groups, dropout)
    context = replace(context or ForwardContext(), aux_loss_scale=LOSS_SCALE)
    values = problem.values()
    place = groups.tp_rank, groups.context.ring_rank
    x, grad = (layout.share(values[name][groups.dp_rank], *place) for name in ("x", "grad"))
    x = x.clone()
    if way == "frozen below":
        layer.router.weight.requires_grad_(False)
    else:
        x.requires_grad_()
    output = run(layer, x, context, way)
    (output * grad).sum().backward()
    factors = {}
    for name in problem.parts:
        linear, _, label = name.partition(".")
        lora = getattr(layer.experts, f"linear_{linear}")
        part = lora.parts[1 if label == "up" else 0]
        for key, factor in (("a", part.lora_a), ("b", part.lora_b)):
            whole = expected.factors.get(f"{name}.{key}")
            found = summed(factor, groups)
            factors[f"{name}.{key}"] = (
                found,
                found if whole is None else local(whole, f"{name}.{key}", groups),
            )
    if layer.router.weight.requires_grad:
        router = _summed_router(layer, groups)
        factors["router"] = (router, expected.factors.get("router", router))
    found_x = x.grad
    destroy_groups()
    return RankResult(groups.dp_rank, *place, output.detach(), found_x, factors)


def run(layer: MoELayer, x: Tensor, context: ForwardContext, way: str) -> Tensor:
    """The output, computed at once, by halves of the rows in turns, or again in the backward pass."""
    if way == "by turns":
        rows = x.size(1) // 2
        halves = (x[:, :rows], context.rows(0, rows)), (x[:, rows:], context.rows(rows, x.size(1)))
        first, second = by_turns(*(layer.steps(*half) for half in halves))
        return torch.cat([first[0], second[0]], dim=1)
    if way == "recomputed":
        output: Tensor = tensor_parallel.checkpoint(lambda hidden: layer(hidden, context)[0], False, x)
        return output
    return layer(x, context)[0]


def _summed_router(layer: MoELayer, groups: ParallelGroups) -> Tensor:
    grad = all_reduce_sum(layer.router.weight.grad, groups.dp_cp_group)
    return all_reduce_sum(grad, groups.tp_group) if layer.router.weight.partial_over_tp else grad


def summed(factor: Tensor, groups: ParallelGroups) -> Tensor:
    """The gradient over all ranks that hold the same shard."""
    grad, place = factor.grad.clone(), groups.experts
    all_reduce_sum(grad, place.edp_group)
    if getattr(factor, "shared_by_experts", False):
        all_reduce_sum(grad, place.ep_group)
    if getattr(factor, "partial_over_etp", False):
        all_reduce_sum(grad, place.etp_group)
    return grad
