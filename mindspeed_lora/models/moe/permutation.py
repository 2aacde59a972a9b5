"""Copies of tokens to rows and sums of rows to tokens, each the other's dual, without scattered additions.

Both know for each row its token, and for each token its rows: so both directions gather, and the sums have one order
on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Copies:
    """M rows, each a copy of one of T tokens."""

    token_of_row: Tensor
    """``[M]`` int64."""
    rows_of_token: Tensor
    """``[T, c]`` int64: the copies of each token."""
    kept: Tensor | None = None
    """bool ``[T, c]``: which of the copies there are; None: all."""

    def copy(self, tokens: Tensor) -> Tensor:
        """``[T, w]`` to ``[M, w]``; backward the sum over a token's rows."""
        output: Tensor = _Copy.apply(tokens, self)
        return output

    def sum(self, rows: Tensor) -> Tensor:
        """``[M, w]`` to ``[T, w]``, the sum over a token's rows; backward their copies."""
        output: Tensor = _Sum.apply(rows, self)
        return output


class _Copy(torch.autograd.Function):
    """``rows[m] = tokens[token(m)]``; backward :class:`_Sum`'s forward."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return tokens.index_select(0, copies.token_of_row)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _summed(grad_outputs[0], ctx.copies), None


class _Sum(torch.autograd.Function):
    """``tokens[t] = Σ rows[m]`` over the rows of t; backward :class:`_Copy`'s forward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return _summed(rows, copies)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].index_select(0, ctx.copies.token_of_row), None


def _summed(rows: Tensor, copies: Copies) -> Tensor:
    num_tokens = copies.rows_of_token.size(0)
    if rows.size(0) == 0 or num_tokens == 0:
        return rows.new_zeros(num_tokens, rows.size(1))
    kept = None if copies.kept is None else copies.kept.to(rows.dtype)
    return F.embedding_bag(copies.rows_of_token, rows.contiguous(), mode="sum", per_sample_weights=kept)


class Reordered:
    """Rows in another order, ``order [M]`` of them; its dual is the inverse order."""

    def __init__(self, order: Tensor) -> None:
        self.order = order
        self.inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device=order.device)
        )

    def there(self, rows: Tensor) -> Tensor:
        """Row i of the result is row ``order[i]`` of ``rows [M, w]``."""
        output: Tensor = _Reorder.apply(rows, self.order, self.inverse)
        return output

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`there`."""
        output: Tensor = _Reorder.apply(rows, self.inverse, self.order)
        return output


class _Reorder(torch.autograd.Function):
    """A permutation of rows; backward its inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].index_select(0, ctx.inverse), None, None
