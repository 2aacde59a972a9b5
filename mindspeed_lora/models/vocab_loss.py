"""Cross entropy over a vocabulary sharded by TP, without ever holding the logits of all positions.

Only positions that carry loss reach the output layer. They pass through it in chunks; the gradient of the
hidden states is formed in the forward pass, while a chunk's logits are still there, and scaled in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.parallel.collectives import all_reduce_max, all_reduce_sum

Tensor = torch.Tensor

IGNORED_LABEL = -100
LOGITS_BYTES = 64 << 20
"""Most that a chunk of logits takes in float32 on the CPU, where a chunk should stay in the cache."""
ACCELERATOR_LOGITS_BYTES = 512 << 20
"""The same elsewhere. A product of c rows with W does c operations for each byte of W that it reads: a hundred rows
of a large vocabulary would wait for memory."""


def vocab_parallel_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_range: tuple[int, int], group: dist.ProcessGroup
) -> Tensor:
    """Sum of the cross entropies of all positions whose label is not −100.

    Args:
        hidden: ``[n, h]``, the same on every TP rank; its gradient is this rank's partial sum over TP.
        weight: ``[v/t, h]``, this rank's rows of the output layer.
        labels: ``[n]`` int64, global token numbers or −100. On the host, so that choosing the positions does not
            wait for the device.
        vocab_range: this rank's first row and the end of its rows that are no padding, as token numbers.
        group: the TP group.

    Returns:
        A float32 scalar, the same on every TP rank; 0 where no position carries loss, with zero gradients for all
        that has one otherwise: data-parallel ranks must reduce the same gradients in the same order.
    """
    positions = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    targets = labels[positions].to(hidden.device, non_blocking=True)
    selected = hidden.index_select(0, positions.to(hidden.device, non_blocking=True))
    loss: Tensor = _ChunkedCrossEntropy.apply(selected, weight, targets, vocab_range, group)
    return loss


def logits_bytes(on_cpu: bool) -> int:
    """Most that a chunk of logits takes in float32."""
    return LOGITS_BYTES if on_cpu else ACCELERATOR_LOGITS_BYTES


class _ChunkedCrossEntropy(torch.autograd.Function):
    """``Σᵢ log Σ_v exp(hᵢ·w_v) − hᵢ·w_{yᵢ}`` with ``∂/∂hᵢ = Σ_v (p_iv − [v = yᵢ]) w_v``.

    Saves the gradient of ``hidden [n, h]`` in float32, and that of ``weight`` where it is trained; no logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_range: tuple[int, int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        start, end = vocab_range
        local_weight = weight[: end - start]
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        rows = max(1, logits_bytes(hidden.device.type == "cpu") // 4 // max(1, weight.size(0)))
        for first in range(0, hidden.size(0), rows):
            part = slice(first, first + rows)
            losses, logits = _cross_entropy(hidden[part], local_weight, labels[part] - start, group)
            total += losses.sum(dtype=torch.float64)
            if grad_hidden is not None:
                grad_hidden[part] = logits.to(weight.dtype) @ local_weight
            if grad_weight is not None:
                grad_weight[: end - start] += (logits.to(weight.dtype).t() @ hidden[part]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scale = grad_outputs[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale).to(hidden_dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Losses ``[c]`` and the gradient of the local logits ``[c, v/t]`` in float32.

    Args:
        hidden: ``[c, h]``.
        weight: ``[v/t, h]`` without padding rows; may be empty on the last TP ranks.
        labels: ``[c]`` relative to this rank's first row; outside ``[0, v/t)`` where another rank has it.
    """
    logits = (hidden @ weight.t()).float()
    here = (labels >= 0) & (labels < weight.size(0))
    column = torch.where(here, labels, 0).unsqueeze(1)
    if weight.size(0) == 0:
        largest = torch.full_like(labels, torch.finfo(torch.float32).min, dtype=torch.float32)
        target = torch.zeros_like(largest)
    else:
        largest = logits.amax(dim=1)
        target = torch.where(here, logits.gather(1, column).squeeze(1), 0.0)
    largest = all_reduce_max(largest, group)
    logits.sub_(largest.unsqueeze(1)).exp_()
    normaliser = logits.sum(dim=1)
    all_reduce_sum(target, group)
    all_reduce_sum(normaliser, group)
    losses = normaliser.log() + largest - target
    logits.div_(normaliser.unsqueeze(1))
    if weight.size(0):
        logits.scatter_add_(1, column, -here.float().unsqueeze(1))
    return losses, logits
