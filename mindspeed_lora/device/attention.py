"""The fused softmax attention of each device, with its log-sum-exp, so that partial results can be merged.

FlashAttention-2 (Dao 2023, arXiv 2307.08691): torch's own kernels for the CPU and for CUDA. What a device has no
kernel for (float32 or a mask on CUDA) is computed in plain steps.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F

from mindspeed_lora.device.capped_attention import capped_backward, capped_forward

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

Tensor = torch.Tensor
_HALF = (torch.bfloat16, torch.float16)


def rows_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sub_rows: tuple[tuple[int, ...], ...] | None,
    window: int | None,
    scale: float,
    cap: float | None = None,
) -> Tensor | None:
    """Causal attention of all rows in one call, with autograd; None where the device has no kernel for that.

    Args:
        query: ``[s, b, n, d]``.
        key: ``[s, b, g, d]``, n a multiple of g.
        value: ``[s, b, g, v]``.
        sub_rows: of each row the lengths of its sub-rows, which attention does not cross; None: each is one.
        window: position i sees positions i − window + 1 … i; None: all before it.
        scale: of the scores.
        cap: their bound, if any.

    Returns:
        ``[s, b, n, v]``.
    """
    if not query.is_cuda or cap is not None:
        return None
    width = value.size(-1)
    if _has_cuda_kernel(query, value, None):
        query, key, value = _of_one_width(query, key, value)
    elif sub_rows is not None or window is not None:
        return None
    if sub_rows is None and window is None:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).narrow(-1, 0, width)
    s, b = query.shape[:2]
    lengths = sub_rows or ((s,),) * b
    bounds = _bounds(lengths, query.device)
    q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
    longest = max(map(max, lengths))
    out = _varlen(q, k, v, bounds, longest, -1 if window is None else window - 1, scale)
    return out.unflatten(0, (b, s)).transpose(0, 1).narrow(-1, 0, width)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, window_left: int, scale: float
) -> Tensor:
    """``[b · s, n, d]`` of sub-rows one behind the other; ``window_left`` keys before a query's own, −1: all."""
    if flash_attn_varlen_func is not None:
        result: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            window_size=(window_left, 0),
        )
        return result
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window_left,
        window_size_right=0,
    )[0]
    return out


@lru_cache(maxsize=64)
def _bounds(sub_rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Where each sub-row of all rows begins, and the end: int32."""
    stops = itertools.accumulate(itertools.chain.from_iterable(sub_rows), initial=0)
    return torch.tensor(list(stops), dtype=torch.int32, device=device)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale · q kᵀ + mask) v`` and ``log Σ exp(scale · q kᵀ + mask)``.

    Args:
        query: ``[b, n, s, d]``.
        key: ``[b, g, t, d]``, n a multiple of g.
        value: ``[b, g, t, v]``.
        causal: query i sees keys 0 … i; needs ``s == t``.
        mask: ``[s, t]`` in the dtype of the query, 0 or −∞, no row all −∞; not together with ``causal``.
        scale: of the scores.
        cap: bounds the scores (:mod:`mindspeed_lora.device.capped_attention`).

    Returns:
        ``[b, n, s, v]`` in the dtype of the query, and ``[b, n, s]`` in float32 (float64 of float64).
    """
    if cap is not None:
        return capped_forward(query, key, value, causal, mask, scale, cap)
    on_cpu = query.device.type == "cpu"
    if not on_cpu and not _has_cuda_kernel(query, value, mask):
        return plain_forward(query, key, value, causal, mask, scale)
    width = value.size(-1)
    query, key, value = _of_one_width(query, key, value)
    if on_cpu:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return out.narrow(-1, 0, width), lse
    operands = (tensor.transpose(1, 2) for tensor in (query, key, value))
    sizes = query.size(2), key.size(2)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *operands, None, None, *sizes, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2).narrow(-1, 0, width), lse


def flash_backward(
    grad_out: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of :func:`flash_forward`.

    Args:
        grad_out: ``[b, n, s, v]``.
        operands: query, key and value.
        out: ``[b, n, s, v]``, that of all keys where these are only some of them.
        lse: ``[b, n, s]``, of all keys likewise.
        causal: as in the forward pass.
        mask: as in the forward pass.
        scale: as in the forward pass.
        cap: as in the forward pass.
    """
    if cap is not None:
        return capped_backward(grad_out, operands, out, lse, causal, mask, scale, cap)
    query, _, value = operands
    on_cpu = query.device.type == "cpu"
    if not on_cpu and not _has_cuda_kernel(query, value, mask):
        return plain_backward(grad_out, operands, out, lse, causal, mask, scale)
    widths = [tensor.size(-1) for tensor in operands]
    query, key, value = _of_one_width(*operands)
    grad_out, out = (_widened(tensor, query.size(-1)) for tensor in (grad_out, out))
    if on_cpu:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = op(grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        tensors = (tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out))
        states = (torch.zeros(2, dtype=torch.uint64, device=query.device) for _ in range(2))
        sizes = query.size(2), key.size(2)
        # Bounds that are there, even empty ones, would choose the kernel for sub-rows.
        grads = torch.ops.aten._flash_attention_backward(
            *tensors, lse.contiguous(), None, None, *sizes, 0.0, causal, *states, scale=scale
        )
        grads = tuple(grad.transpose(1, 2) for grad in grads)
    grad_query, grad_key, grad_value = (
        grad.narrow(-1, 0, width) for grad, width in zip(grads, widths, strict=True)
    )
    return grad_query, grad_key, grad_value


def _of_one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with zeros behind the narrower ones: the kernels want values as wide as keys."""
    width = max(query.size(-1), value.size(-1))
    return _widened(query, width), _widened(key, width), _widened(value, width)


def _widened(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.size(-1) == width else F.pad(tensor, (0, width - tensor.size(-1)))


def _has_cuda_kernel(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether FlashAttention takes operands of this dtype and width of a head."""
    width = max(query.size(-1), value.size(-1))
    return query.is_cuda and query.dtype in _HALF and mask is None and width % 8 == 0 and width <= 256


def plain_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`flash_forward` in plain steps."""
    scores = _scores(query, key, causal, mask, scale)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    weights = (scores - lse).exp().to(query.dtype)
    return (weights @ value.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2).squeeze(-1)


def plain_backward(
    grad_out: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`flash_backward` in plain steps.

    With P the weights: ``dS = P ∘ (dO vᵀ − Σ dO ∘ O)``, ``dq = scale · dS k``, ``dk = scale · dSᵀ q``,
    ``dv = Pᵀ dO``.
    """
    query, key, value = operands
    grouped_grad, grouped_query = _by_group(grad_out, key), _by_group(query, key)
    weights = (_scores(query, key, causal, mask, scale) - _by_group(lse.unsqueeze(-1), key)).exp()
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1, keepdim=True)
    slopes = (grouped_grad @ value.unsqueeze(2).transpose(-1, -2)).to(lse.dtype) - _by_group(delta, key)
    slopes = slopes.mul_(weights).mul_(scale).to(query.dtype)
    grad_query = (slopes @ key.unsqueeze(2)).flatten(1, 2)
    grad_key = (slopes.transpose(-1, -2) @ grouped_query).sum(dim=2)
    grad_value = (weights.to(query.dtype).transpose(-1, -2) @ grouped_grad).sum(dim=2)
    return grad_query, grad_key, grad_value


def _by_group(tensor: Tensor, key: Tensor) -> Tensor:
    """``[b, n, …]`` as ``[b, g, n/g, …]``."""
    return tensor.unflatten(1, (key.size(1), -1))


def _scores(query: Tensor, key: Tensor, causal: bool, mask: Tensor | None, scale: float) -> Tensor:
    """``[b, g, n/g, s, t]``, at least float32."""
    scores = _by_group(query, key) @ key.unsqueeze(2).transpose(-1, -2)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)).mul_(scale)
    if causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        return scores.masked_fill_(unseen, -torch.inf)
    return scores if mask is None else scores.add_(mask)
