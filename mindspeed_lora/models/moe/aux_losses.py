"""The router's auxiliary losses, as megatron-core defines them, over the tokens of a micro-batch on TP × CP ranks.

Load balancing (Switch Transformer, arXiv 2101.03961, equations 4 to 6): ``c · E · Σ_e f_e P_e`` with ``f_e`` the share
of the T · k choices that fall on expert e, ``P_e`` the mean of its normalised scores. By rows: the mean of the rows'
own losses. z-loss (ST-MoE, arXiv 2202.08906, equation 5): ``c · mean(logsumexp(logits)²)``. Every token counts, padding
too. A rank computes what its tokens add to the loss, whose sum over the ranks is the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.moe.routing import full_precision
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.parallel.collectives import all_reduce_sum

Tensor = torch.Tensor


@dataclass(frozen=True)
class TokenPlace:
    """Which of a micro-batch's tokens, flattened from ``[s, b]``, this rank routes."""

    first: int
    """Place of the first one, up to a multiple of ``num_rows``."""
    num_rows: int
    """Rows b of the micro-batch."""
    total: int
    """Tokens of the micro-batch on all TP × CP ranks."""

    def rows(self, count: int, device: torch.device) -> Tensor:
        """The row of each of the ``count`` tokens, int64."""
        return torch.arange(self.first, self.first + count, device=device) % self.num_rows


def auxiliary_losses(
    logits: Tensor, moe: MoEShape, settings: MoESettings, place: TokenPlace, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """What this rank's ``logits [T, E]`` add to each loss whose coefficient is above 0, coefficient included."""
    logits = full_precision(logits)
    losses = {}
    if settings.z_loss_coeff > 0:
        losses["z_loss"] = logits.logsumexp(dim=-1).square().sum() * (settings.z_loss_coeff / place.total)
    if settings.aux_loss_coeff > 0 or settings.seq_aux_loss_coeff > 0:
        scores = _normalised(logits, moe)
        chosen = scores.detach().topk(moe.topk, dim=-1).indices
        for name, coeff, by_rows in (
            ("load_balancing_loss", settings.aux_loss_coeff, False),
            ("seq_load_balancing_loss", settings.seq_aux_loss_coeff, True),
        ):
            if coeff > 0:
                losses[name] = coeff * _balance(scores, chosen, place, by_rows, group)
    return losses


def _normalised(logits: Tensor, moe: MoEShape) -> Tensor:
    if moe.score_function == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def _balance(
    scores: Tensor, chosen: Tensor, place: TokenPlace, by_rows: bool, group: dist.ProcessGroup
) -> Tensor:
    """``E · Σ_e f_e P_e`` of ``scores [T, E]`` and ``chosen [T, k]``; by rows its mean over them."""
    (count, num_experts), topk = scores.shape, chosen.size(1)
    num_rows = place.num_rows if by_rows else 1
    rows = place.rows(count, scores.device) if by_rows else chosen.new_zeros(count)
    choices = scores.new_zeros(num_rows * num_experts)
    places = (rows.unsqueeze(1) * num_experts + chosen).flatten()
    all_reduce_sum(choices.index_add_(0, places, scores.new_ones(places.numel())), group)
    sums = scores.new_zeros(num_rows, num_experts).index_add(0, rows, scores)
    tokens = place.total / num_rows
    return (sums * choices.view_as(sums)).sum() * (num_experts / (topk * tokens * tokens * num_rows))


def attach_loss(weights: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
    """``weights`` as they are; their backward pass adds the gradient of ``loss · scale``."""
    output: Tensor = _AttachLoss.apply(weights, loss, scale)
    return output


class _AttachLoss(torch.autograd.Function):
    """Forward the first operand; backward ``g`` for it and ``scale`` for the loss (a scalar)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_outputs[0], torch.ones_like(ctx.like) * ctx.scale, None
