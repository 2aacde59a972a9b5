"""Routing, capacity and auxiliary losses against megatron-core's own functions, on one rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    z_loss_func,
)

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.moe.aux_losses import TokenPlace, attach_loss, auxiliary_losses
from mindspeed_lora.models.moe.router import Router
from mindspeed_lora.models.moe.routing import Routing, route, within_capacity
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.parallel.groups import ParallelGroups

SOFTMAX = MoEShape(num_experts=8, topk=3, ffn_hidden_size=4)
SIGMOID = dataclasses.replace(SOFTMAX, score_function="sigmoid", scaling_factor=2.5)
BIAS = torch.linspace(-0.5, 0.5, 8)
LOGITS = torch.randn(40, 8, generator=torch.Generator().manual_seed(2)) * 2


def dense(routing: Routing) -> torch.Tensor:
    """Weights ``[T, E]``, zero where a token does not go."""
    return torch.zeros(routing.weights.size(0), 8).scatter(1, routing.experts, routing.weights)


@pytest.mark.parametrize(("moe", "bias"), [(SOFTMAX, None), (SIGMOID, None), (SIGMOID, BIAS)])
def test_weights_are_those_of_megatron(moe: MoEShape, bias: torch.Tensor | None) -> None:
    theirs, _ = topk_routing_with_score_function(
        LOGITS, 3, score_function=moe.score_function, expert_bias=bias, scaling_factor=moe.scaling_factor
    )
    torch.testing.assert_close(dense(route(LOGITS, moe, bias)), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 8.0])
def test_capacity_drops_what_megatron_drops(factor: float) -> None:
    routing = route(LOGITS, SOFTMAX)
    went = dense(routing) > 0
    theirs, _ = apply_router_token_dropping(dense(routing), went, 3, factor, "probs")
    ours = within_capacity(routing, 8, MoESettings(capacity_factor=factor))
    assert torch.equal(dense(ours), theirs)
    if factor < 2:
        assert ours.kept is not None and not ours.kept.all()


def test_capacity_by_position_keeps_the_first_tokens() -> None:
    routing = route(LOGITS, SOFTMAX)
    ours = within_capacity(routing, 8, MoESettings(capacity_factor=0.5, drop_policy="position"))
    for expert in range(8):
        tokens = (routing.experts == expert).any(dim=1).nonzero().flatten()
        kept = (dense(ours)[:, expert] > 0).nonzero().flatten()
        assert kept.tolist() == tokens[:8].tolist()  # ceil(40 * 3 / 8 * 0.5) = 8


@pytest.mark.parametrize("moe", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_losses_are_those_of_megatron(groups: ParallelGroups, moe: MoEShape) -> None:
    went, scores = compute_routing_scores_for_aux_loss(LOGITS, 3, moe.score_function)
    by_rows, went_by_rows = scores.reshape(20, -1), went.reshape(20, -1)
    expected = {
        "z_loss": z_loss_func(LOGITS, 0.1),
        "load_balancing_loss": switch_load_balancing_loss_func(scores, went.sum(0), 40, 3, 8, 0.2),
        "seq_load_balancing_loss": switch_load_balancing_loss_func(
            by_rows, went_by_rows.sum(0), 20, 3, 8, 0.3
        )
        / 2,
    }
    settings = MoESettings(aux_loss_coeff=0.2, seq_aux_loss_coeff=0.3, z_loss_coeff=0.1)
    place = TokenPlace(first=0, num_rows=2, total=40)
    found = auxiliary_losses(LOGITS, moe, settings, place, groups.tp_cp_group)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-6, atol=0)
    assert auxiliary_losses(LOGITS, moe, MoESettings(), place, groups.tp_cp_group) == {}


def test_values_of_the_losses_are_summed_until_they_are_taken(groups: ParallelGroups) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    router = Router(config, SOFTMAX, groups, MoESettings(z_loss_coeff=0.1))
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    place, value = TokenPlace(first=0, num_rows=2, total=40), z_loss_func(LOGITS, 0.1)
    for _ in range(2):
        router(LOGITS, place, aux_loss_scale=1.0)
    router(LOGITS, place)  # an evaluation
    with torch.no_grad():
        router(LOGITS, place, aux_loss_scale=1.0)  # the first pass of a recomputed layer
    torch.testing.assert_close(router.take_losses()["z_loss"], 2 * value)
    assert router.take_losses() == {}


def test_an_attached_loss_adds_its_gradient_alone() -> None:
    weights = torch.ones(3, requires_grad=True)
    attached = attach_loss(weights, (weights * torch.tensor([1.0, 2.0, 3.0])).sum(), 0.5)
    assert torch.equal(attached, weights)
    attached.sum().backward()
    assert weights.grad is not None and weights.grad.tolist() == [1.5, 2.0, 2.5]
