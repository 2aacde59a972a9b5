"""Which experts a token goes to, and with which weights, of the router's logits.

Scores are a softmax over the experts or a sigmoid of each; the best ``topk`` are taken, as Mixtral (arXiv 2401.04088,
section 2.1) has it. With groups (DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, section
2.1.2) only those of each token's best groups are candidates. An expert bias decides on the choice and not on the
weights (DeepSeek-V3, equation 16).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.moe.settings import MoESettings

Tensor = torch.Tensor


class Routing(NamedTuple):
    """Where the tokens of this rank go."""

    experts: Tensor
    """Global numbers ``[T, k]`` int64, different ones in each row."""
    weights: Tensor
    """``[T, k]`` float32; zero where the token is dropped."""
    kept: Tensor | None = None
    """bool ``[T, k]``, what the experts' capacity leaves; None: everything."""


def route(logits: Tensor, moe: MoEShape, expert_bias: Tensor | None = None) -> Routing:
    """The experts and weights of ``logits [T, E]``."""
    logits = full_precision(logits)
    scores = logits.sigmoid() if moe.score_function == "sigmoid" else logits.softmax(dim=-1)
    ranked = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    experts = _candidates(ranked, moe).topk(moe.topk, dim=-1).indices
    weights = scores.gather(1, experts)
    if moe.normalise:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + 1e-20 if moe.score_function == "sigmoid" else total)
    if moe.scaling_factor != 1.0:
        weights = weights * moe.scaling_factor
    return Routing(experts, weights)


def full_precision(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _candidates(ranked: Tensor, moe: MoEShape) -> Tensor:
    """``ranked [T, E]`` with −∞ outside of each token's best groups."""
    if moe.num_groups == 1:
        return ranked
    groups = ranked.unflatten(-1, (moe.num_groups, -1))
    best = groups.topk(2, dim=-1).values.sum(dim=-1) if moe.group_score == "top2" else groups.amax(dim=-1)
    chosen = best.topk(moe.group_topk, dim=-1).indices
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, False)
    return groups.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)


def within_capacity(routing: Routing, num_experts: int, settings: MoESettings) -> Routing:
    """The routing without what exceeds the experts' capacity for this rank's tokens (megatron-core's rule).

    Switch Transformer (arXiv 2101.03961, equation 3), with ``topk`` choices a token.
    """
    if settings.capacity_factor is None:
        return routing
    (num_tokens, topk), experts = routing.experts.shape, routing.experts
    capacity = math.ceil(num_tokens * topk / num_experts * settings.capacity_factor)
    if capacity > num_tokens:
        return routing
    whole = routing.weights.new_zeros(num_tokens, num_experts)
    if settings.drop_policy == "probs":
        whole.scatter_(1, experts, routing.weights.detach())
        stays = torch.zeros_like(whole, dtype=torch.bool)
        stays.scatter_(0, whole.topk(capacity, dim=0, sorted=False).indices, True)
    else:
        stays = whole.scatter_(1, experts, 1.0).cumsum(dim=0) <= capacity
    kept = stays.gather(1, experts)
    return Routing(experts, routing.weights * kept, kept)
