"""Cross entropy over a vocabulary sharded by TP, without ever holding the logits of all positions.

Only positions that carry loss reach the output layer. They pass through it in chunks; the gradient of the
hidden states is formed in the forward pass, while a chunk's logits are still there, and scaled in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.models.token_rows import TokenRows
from mindspeed_lora.parallel.collectives import all_reduce_max, all_reduce_sum

Tensor = torch.Tensor

IGNORED_LABEL = -100
LOGITS_BYTES = 64 << 20
"""Most that a chunk of logits takes in float32 on the CPU, where a chunk should stay in the cache."""
ACCELERATOR_LOGITS_BYTES = 512 << 20
"""The same elsewhere. A product of c rows with W does c operations for each byte of W that it reads: a hundred rows
of a large vocabulary would wait for memory."""


def vocab_parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_range: tuple[int, int],
    group: dist.ProcessGroup,
    token_rows: TokenRows | None = None,
    weights: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the cross entropies of all positions whose label is not −100, each times its weight.

    Args:
        hidden: ``[n, h]``, the same on every TP rank; its gradient is this rank's partial sum over TP.
        weight: ``[v/t, h]``, this rank's rows of the output layer.
        labels: ``[n]`` int64, global token numbers or −100. On the host, so that choosing the positions does not
            wait for the device.
        vocab_range: this rank's first row and the end of its rows that are no padding, as token numbers.
        group: the TP group.
        token_rows: rows that stand in the place of the weight's for some tokens.
        weights: ``[n]`` float32 on the host, what each position's loss is multiplied by; None: 1.
        softcap: c, where the logits are ``c tanh(z / c)`` of the products z (Gemma 2).

    Returns:
        A float32 scalar, the same on every TP rank; 0 where no position carries loss, with zero gradients for all
        that has one otherwise: data-parallel ranks must reduce the same gradients in the same order.
    """
    positions = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    targets = labels[positions].to(hidden.device, non_blocking=True)
    selected = hidden.index_select(0, positions.to(hidden.device, non_blocking=True))
    rows, columns = (None, None) if token_rows is None else token_rows.in_output()
    chosen = None if weights is None else weights[positions].to(hidden.device, non_blocking=True)
    loss: Tensor = _ChunkedCrossEntropy.apply(
        selected, weight, rows, columns, targets, chosen, vocab_range, group, softcap
    )
    return loss


def logits_bytes(on_cpu: bool) -> int:
    """Most that a chunk of logits takes in float32."""
    return LOGITS_BYTES if on_cpu else ACCELERATOR_LOGITS_BYTES


class _ChunkedCrossEntropy(torch.autograd.Function):
    """``Σᵢ cᵢ (log Σ_v exp(hᵢ·w_v) − hᵢ·w_{yᵢ})`` with ``∂/∂hᵢ = cᵢ Σ_v (p_iv − [v = yᵢ]) w_v``; ``c [n]`` are 1
    where no loss weights are given.

    Saves the gradient of ``hidden [n, h]`` in float32, and that of ``weight`` or ``rows`` where they are trained; no
    logits. ``rows [m, h]`` stand in the place of the rows ``columns [m]`` of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        columns: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor | None,
        vocab_range: tuple[int, int],
        group: dist.ProcessGroup,
        softcap: float | None,
    ) -> Tensor:
        start, end = vocab_range
        local_weight = weight[: end - start]
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_rows = None if rows is None else torch.zeros_like(rows, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        size = max(1, logits_bytes(hidden.device.type == "cpu") // 4 // max(1, weight.size(0)))
        for first in range(0, hidden.size(0), size):
            part = slice(first, first + size)
            logits = _logits(hidden[part], local_weight, rows, columns)
            slope = None if softcap is None else _softcap(logits, softcap)
            losses = _cross_entropy(logits, labels[part] - start, group)
            if loss_weights is not None:
                losses *= loss_weights[part]
                logits.mul_(loss_weights[part].unsqueeze(1))
            total += losses.sum(dtype=torch.float64)
            if slope is not None:
                logits.mul_(slope)
            gradient = logits.to(weight.dtype)
            if rows is not None and columns is not None and grad_rows is not None:
                of_rows = gradient[:, columns]
                gradient[:, columns] = 0
                grad_rows += (of_rows.t() @ hidden[part]).float()
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ local_weight
                if rows is not None:
                    grad_hidden[part] += of_rows @ rows
            if grad_weight is not None:
                grad_weight[: end - start] += (gradient.t() @ hidden[part]).float()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_rows)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_dtype, weight_dtype = ctx.dtypes
        scaled = [
            None if gradient is None else gradient.mul_(grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(
                ctx.saved_tensors, (hidden_dtype, weight_dtype, weight_dtype), strict=True
            )
        ]
        return *scaled, None, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Logits ``[c, v/t]`` of ``hidden [c, h]`` in float32; ``weight [v/t, h]`` has no padding, and may be empty."""
    logits = (hidden @ weight.t()).float()
    if rows is not None and columns is not None:
        logits[:, columns] = (hidden @ rows.t()).float()
    return logits


def _softcap(logits: Tensor, cap: float) -> Tensor:
    """Turns logits z into ``c tanh(z / c)``, and returns the slope of that, ``1 − tanh²(z / c)``."""
    bounded = logits.div_(cap).tanh_()
    slope = torch.addcmul(torch.ones_like(bounded), bounded, bounded, value=-1.0)
    bounded.mul_(cap)
    return slope


def _cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Losses ``[c]``; ``logits [c, v/t]`` become their own gradient.

    Args:
        logits: this rank's, in float32; no columns on the last TP ranks of a small vocabulary.
        labels: ``[c]`` relative to this rank's first row; outside ``[0, v/t)`` where another rank has it.
    """
    width = logits.size(1)
    here = (labels >= 0) & (labels < width)
    column = torch.where(here, labels, 0).unsqueeze(1)
    if width == 0:
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
    if width:
        logits.scatter_add_(1, column, -here.float().unsqueeze(1))
    return losses
