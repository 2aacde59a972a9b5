"""A layer of experts in every layout against the plain formula: outputs, input gradients, every expert's factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

from mindspeed_lora.adapters.dropout import token_keys
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.moe.exchange import Exchange
from mindspeed_lora.models.moe.routing import route
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from tests.support.pool import WorkerPool
from tests.unit.models.moe.moe_problem import (
    MOE,
    Layout,
    Problem,
    RankResult,
    Result,
    Values,
    build,
    expert_output,
    on_rank,
    plain,
)

EXACT = 1e-10
"""In float64, sums of up to a hundred terms."""

LAYOUTS = [
    Layout(world=1),
    Layout(ep=2, world=2),
    Layout(etp=2, world=2),
    Layout(tp=2, ep=2, world=2),
    Layout(tp=2, sp=True, ep=2, world=2),
    Layout(tp=2, etp=2, world=2),
    Layout(tp=2, sp=True, etp=2, world=2),
    Layout(ep=4, world=4),
    Layout(ep=2, world=4),
    Layout(ep=2, etp=2, world=4),
    Layout(tp=2, sp=True, ep=2, etp=2, world=4),
    Layout(tp=2, sp=True, ep=4, world=4),
]


def check(ranks: list[RankResult], expected: Result, layout: Layout) -> None:
    for rank in ranks:
        for name in ("output", "grad_x") if rank.grad_x is not None else ("output",):
            shard = layout.share(getattr(expected, name)[rank.replica], rank.tp_rank, rank.cp_rank)
            torch.testing.assert_close(getattr(rank, name), shard, rtol=EXACT, atol=EXACT)
        for name, (found, whole) in rank.factors.items():
            torch.testing.assert_close(
                found, whole, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(workers: WorkerPool, layout: Layout) -> None:
    moe = replace(MOE, shared_expert_gate=True)
    # 7 x 1 tokens do not divide by TP: without SP the slices are uneven.
    problem = Problem(
        moe=moe, s=8 if layout.sp else 7, b=1, replicas=layout.replicas, split_gate_up=layout.ep > 1
    )
    expected = plain(problem)
    check(workers.run(layout.world, on_rank, problem, layout, expected), expected, layout)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[9], LAYOUTS[10]], ids=str)
def test_one_pair_for_all_experts(workers: WorkerPool, layout: Layout) -> None:
    problem = Problem(replicas=layout.replicas, shared_pair=True)
    expected = plain(problem)
    check(workers.run(layout.world, on_rank, problem, layout, expected), expected, layout)


@pytest.mark.parametrize("layout", [Layout(ep=4, world=4), Layout(tp=2, ep=2, etp=2, world=4)], ids=str)
def test_ranks_and_experts_without_tokens(workers: WorkerPool, layout: Layout) -> None:
    # One token: without SP the second TP rank has an empty slice, and most experts get none.
    problem = Problem(s=1, b=1, replicas=layout.replicas)
    expected = plain(problem)
    check(workers.run(layout.world, on_rank, problem, layout, expected), expected, layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world=1),
        Layout(tp=2, ep=2, world=2),
        Layout(tp=2, sp=True, cp=2, ep=2, world=4),
        Layout(cp=2, ep=2, world=4),
    ],
    ids=str,
)
def test_auxiliary_losses(workers: WorkerPool, layout: Layout) -> None:
    losses = MoESettings(aux_loss_coeff=0.3, seq_aux_loss_coeff=0.2, z_loss_coeff=0.1)
    problem = Problem(replicas=layout.replicas, settings=losses)
    expected = plain(problem)
    assert (expected.grad_x - plain(replace(problem, settings=MoESettings())).grad_x).abs().max() > 0.1
    check(workers.run(layout.world, on_rank, problem, layout, expected), expected, layout)


def whole(rank: RankResult) -> Result:
    """One process's result, to be expected of others."""
    factors = {name: found for name, (found, _) in rank.factors.items()}
    return Result(rank.output.unsqueeze(0), rank.grad_x.unsqueeze(0), factors)


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, ep=2, world=2), Layout(tp=2, sp=True, etp=2, world=2)], ids=str
)
def test_dropout_is_that_of_one_process(workers: WorkerPool, layout: Layout) -> None:
    problem, places = Problem(split_gate_up=True), torch.arange(16).view(8, 2)
    context = ForwardContext(token_keys=token_keys(1234, 1, places, places))
    (one,) = workers.run(1, on_rank, problem, Layout(), Result(*[torch.empty(0)] * 2), context, 0.4)
    expected = whole(one)
    assert (expected.output - plain(problem).output).abs().max() > 0.01
    check(workers.run(layout.world, on_rank, problem, layout, expected, context, 0.4), expected, layout)


@pytest.mark.parametrize("layout", [Layout(world=1), Layout(tp=2, sp=True, ep=2, world=2)], ids=str)
def test_activation_computed_again(workers: WorkerPool, layout: Layout) -> None:
    problem = Problem(settings=MoESettings(recompute_activation=True))
    expected = plain(problem)
    check(workers.run(layout.world, on_rank, problem, layout, expected), expected, layout)


@pytest.mark.parametrize("layout", [Layout(world=1), Layout(ep=2, etp=2, world=4)], ids=str)
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_tokens_over_the_capacity_are_dropped(workers: WorkerPool, layout: Layout, policy: str) -> None:
    capacity = MoESettings(capacity_factor=0.5, drop_policy=policy)
    problem = Problem(settings=capacity, replicas=layout.replicas)
    expected = plain(problem)
    assert (expected.output - plain(replace(problem, settings=MoESettings())).output).abs().max() > 0.1
    check(workers.run(layout.world, on_rank, problem, layout, expected), expected, layout)


def filled_to_capacity(problem: Problem, values: Values, tokens: torch.Tensor) -> torch.Tensor:
    """The experts' outputs with megatron-core's ``--moe-pad-expert-input-to-capacity``: as many rows for each."""
    routing, count = route(tokens @ values["router"].t(), problem.moe), problem.moe.num_experts
    weights = torch.zeros(len(tokens), count, dtype=tokens.dtype).scatter(1, routing.experts, routing.weights)
    factor = problem.settings.capacity_factor
    assert factor is not None
    padded, rows = apply_router_token_dropping(
        weights, weights > 0, problem.moe.topk, factor, pad_to_capacity=True
    )
    (capacity,) = set(rows.sum(dim=0).tolist())
    output = torch.zeros_like(tokens)
    for expert in range(count):
        taken = rows[:, expert].nonzero().flatten()
        assert len(taken) == capacity
        own = padded[taken, expert].unsqueeze(1) * expert_output(problem, values, expert, tokens[taken])
        output = output.index_add(0, taken, own)
    return output


@pytest.mark.parametrize("layout", [Layout(world=1), Layout(ep=2, etp=2, world=4)], ids=str)
@pytest.mark.parametrize("factor", [0.5, 1.5, 4.0])
def test_filling_experts_up_to_their_capacity_changes_nothing(
    workers: WorkerPool, layout: Layout, factor: float
) -> None:
    """Megatron fills with tokens of weight 0: outputs and all gradients are those without."""
    problem = Problem(settings=MoESettings(capacity_factor=factor), replicas=layout.replicas)
    expected = plain(problem, filled_to_capacity)
    check(workers.run(layout.world, on_rank, problem, layout, expected), expected, layout)


@pytest.mark.parametrize("way", ["by turns", "recomputed", "frozen below"])
@pytest.mark.parametrize(
    "layout", [Layout(ep=2, world=2), Layout(tp=2, sp=True, ep=2, etp=1, world=2)], ids=str
)
def test_other_ways_through_the_layer(workers: WorkerPool, layout: Layout, way: str) -> None:
    problem = Problem(replicas=layout.replicas)
    expected = plain(problem)
    ranks = workers.run(layout.world, on_rank, problem, layout, expected, None, 0.0, way)
    check(ranks, expected, layout)


def order_of_work() -> list[str]:
    """What one rank of EP 2 does, in order, forward and backward."""
    told: list[str] = []
    begin, end = Exchange._begin, Exchange._end

    def tell(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def told_first(*args: Any) -> Any:
            told.append(name)
            return function(*args)

        return told_first

    Exchange._begin, Exchange._end = tell("send", begin), tell("wait", end)  # type: ignore[method-assign]
    try:
        groups, _ = initialize_groups(Layout(ep=2, world=2).parallel(), seed=1)
        problem = Problem(replicas=2)
        layer = build(problem, Layout(ep=2, world=2), groups)
        assert layer.shared_experts is not None
        for name in ("linear_fc1", "linear_fc2"):
            linear = getattr(layer.shared_experts, name)
            linear.register_forward_hook(lambda *_, n=name: told.append(f"shared {n}"))
            linear.register_full_backward_hook(lambda *_, n=name: told.append(f"shared {n}"))
            layer.experts.get_submodule(name).parts[0].lora_a.register_post_accumulate_grad_hook(
                lambda _, n=name: told.append(f"factors of {n}")
            )
        x = problem.values()["x"][groups.dp_rank].requires_grad_()
        output, _ = layer(x)
        told.append("backward")
        output.sum().backward()
    finally:
        Exchange._begin, Exchange._end = begin, end  # type: ignore[method-assign]
        destroy_groups()
    return told


def test_tokens_travel_while_others_compute(workers: WorkerPool) -> None:
    told, _ = workers.run(2, order_of_work)
    forward, backward = told[: told.index("backward")], told[told.index("backward") + 1 :]
    # Tokens and their weights, then outputs.
    assert forward == [
        "send",
        "send",
        "shared linear_fc1",
        "wait",
        "wait",
        "send",
        "shared linear_fc2",
        "wait",
    ]
    assert backward[:3] == ["send", "shared linear_fc2", "wait"]
    assert backward[3:5] == ["send", "send"] and backward[-2:] == ["wait", "wait"]
    assert sorted(backward[5:-2]) == ["factors of linear_fc1", "factors of linear_fc2", "shared linear_fc1"]
