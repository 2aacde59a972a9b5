"""Tokens that every TP rank has, each rank taking its slice of them (TP without sequence parallelism).

Slices are ``⌈T/t⌉`` tokens; the last ones may be shorter, or empty.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mindspeed_lora.parallel.collectives import gather_first_dim

Tensor = torch.Tensor


def slice_bounds(num_tokens: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """First token of this rank's slice, and the end."""
    width = _width(num_tokens, group)
    first = min(dist.get_rank(group) * width, num_tokens)
    return first, min(first + width, num_tokens)


def take_slice(tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's slice of ``tokens [T, h]``; backward the slices' gradients are gathered."""
    output: Tensor = _TakeSlice.apply(tokens, group)
    return output


def join_slices(tokens: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """``[T, h]`` of every rank's slice; backward each rank takes its slice of the gradient, which all have."""
    output: Tensor = _JoinSlices.apply(tokens, num_tokens, group)
    return output


class _TakeSlice(torch.autograd.Function):
    """Forward slice, backward all-gather."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.num_tokens, ctx.group = tokens.size(0), group
        return _slice(tokens, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _join(grad_outputs[0], ctx.num_tokens, ctx.group), None


class _JoinSlices(torch.autograd.Function):
    """Forward all-gather, backward slice."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _join(tokens, num_tokens, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _slice(grad_outputs[0], ctx.group), None, None


def _width(num_tokens: int, group: dist.ProcessGroup) -> int:
    return -(-num_tokens // dist.get_world_size(group))


def _slice(tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    first, end = slice_bounds(tokens.size(0), group)
    return tokens[first:end].clone()


def _join(tokens: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Only slices at the end are short, so that what pads them is cut off with the end."""
    padding = _width(num_tokens, group) - tokens.size(0)
    return gather_first_dim(F.pad(tokens, (0, 0, 0, padding)), group)[:num_tokens]
