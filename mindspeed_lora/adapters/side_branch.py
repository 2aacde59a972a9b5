"""The adapter's own products on one linear: the r-wide branch beside the frozen weight, on any rows of tokens.

``y = x Wᵀ + Σ_p s_p · (x A_pᵀ) B_pᵀ``. Names, of each part p: the inner activation ``v = x Aᵀ``, the outer gradient
``u = g B``, neither scaled, both ``[T, r]`` for T tokens; g is the gradient of the output. No collective is here:
when which product runs, and what travels meanwhile, is the schedule's (:mod:`mindspeed_lora.adapters.schedules`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.quantization.product import Frozen, ready

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowBlock:
    """Rows of this rank's shard of the base matrix that a part adds to: a block that may repeat.

    Rows ``[start + i · stride, stop + i · stride)`` for i < ``repeats``, in this order. Megatron interleaves q, k
    and v by query group, so that each of them is a block that repeats once per group of this rank; gate and up are
    one block each.
    """

    start: int
    stop: int
    repeats: int = 1
    stride: int = 0

    @property
    def count(self) -> int:
        """Number of rows in all."""
        return self.repeats * (self.stop - self.start)

    def of(self, output: Tensor) -> Tensor:
        """The view ``[…, repeats, stop − start]`` of these rows in ``output […, out]``."""
        width, stride = self.stop - self.start, max(self.stride, self.stop - self.start)
        reach = (self.repeats - 1) * stride + width
        return output.narrow(-1, self.start, reach).unfold(-1, width, stride)


@dataclass(frozen=True)
class Parts:
    """What the side branch of one linear is, beside tensors."""

    rows: tuple[RowBlock, ...]
    """Of each part."""
    scalings: tuple[float, ...]
    """Of each part."""
    kept_share: float = 1.0
    """Probability with which dropout keeps an element of the input; what it keeps is divided by it."""


@dataclass(frozen=True)
class SideBranch:
    """One linear's side branch for one micro-batch."""

    parts: Parts
    factors: Sequence[Tensor]
    """A₁ B₁ A₂ B₂ …: A ``[r, in]``, B ``[rows, r]``, this rank's shards."""
    masks: Sequence[Tensor] | None = None
    """Per part, which elements of the input dropout keeps, bool ``[T, in]``; None where nothing is dropped."""

    def new_inner(self, num_tokens: int) -> list[Tensor]:
        """Memory for v of every part, ``[T, r]``."""
        return [lora_a.new_empty(num_tokens, lora_a.size(0)) for lora_a in self.factors[::2]]

    def inner(self, tokens: Tensor, out: Sequence[Tensor], first: int = 0) -> None:
        """Writes v of ``tokens [m, in]``, which are rows ``first …`` of all, to their rows of ``out``."""
        rows = slice(first, first + tokens.size(0))
        for part, lora_a in enumerate(self.factors[::2]):
            torch.mm(self._kept(part, tokens, first), lora_a.t(), out=out[part][rows])

    def add(self, output: Tensor, inner: Sequence[Tensor], first: int = 0) -> None:
        """Adds ``s · v Bᵀ`` to ``output [m, out]``, which are rows ``first …`` of all, in place."""
        for part, rows in enumerate(self.parts.rows):
            v, lora_b = inner[part][first : first + output.size(0)], self.factors[2 * part + 1]
            if rows.repeats == 1:
                output[:, rows.start : rows.stop].addmm_(v, lora_b.t(), alpha=self._scaling(part))
            else:
                added = (v @ lora_b.t()).unflatten(-1, (rows.repeats, -1))
                rows.of(output).add_(added, alpha=self._scaling(part))

    def outer(self, grad: Tensor) -> list[Tensor]:
        """u of every part, for ``grad [m, out]``."""
        return [
            _columns(grad, rows) @ self.factors[2 * part + 1] for part, rows in enumerate(self.parts.rows)
        ]

    def add_input_gradient(self, grad_x: Tensor, outer: Sequence[Tensor], first: int = 0) -> None:
        """Adds ``s · u A``, with dropout only where the mask keeps, to ``grad_x [m, in]``, rows ``first …`` of all."""
        for part, u in enumerate(outer):
            if self.masks is None:
                grad_x.addmm_(u, self.factors[2 * part], alpha=self._scaling(part))
            else:
                mask = self.masks[part][first : first + grad_x.size(0)]
                grad_x.add_((u @ self.factors[2 * part]).mul_(mask), alpha=self._scaling(part))

    def grad_a(self, tokens: Tensor, outer: Sequence[Tensor]) -> list[Tensor]:
        """``dA = s · uᵀ x`` of every part, over ``tokens [T, in]``."""
        return [
            (u.t() @ self._kept(part, tokens, 0)).mul_(self._scaling(part)) for part, u in enumerate(outer)
        ]

    def grad_b(self, grad: Tensor, inner: Sequence[Tensor]) -> list[Tensor]:
        """``dB = s · gᵀ v`` of every part, over ``grad [T, out]``."""
        return [
            (_columns(grad, rows).t() @ inner[part]).mul_(self._scaling(part))
            for part, rows in enumerate(self.parts.rows)
        ]

    def merged(self, weight: Tensor) -> Tensor:
        """``W + Σ s · B A``, ``[out, in]``, a new tensor; nothing may be dropped."""
        assert self.masks is None, "a mask stands between x and A"
        whole = weight.clone()
        for part, rows in enumerate(self.parts.rows):
            lora_a, lora_b = self.factors[2 * part], self.factors[2 * part + 1]
            if rows.repeats == 1:
                whole[rows.start : rows.stop].addmm_(lora_b, lora_a, alpha=self._scaling(part))
            else:
                added = (lora_a.t() @ lora_b.t()).unflatten(-1, (rows.repeats, -1))
                rows.of(whole.t()).add_(added, alpha=self._scaling(part))
        return whole

    def multiplied(self, weight: Frozen, merge: bool) -> Frozen:
        """What the tokens of one pass are multiplied by: the merged weight, or W, dequantised as ``ready`` says."""
        if merge:
            assert isinstance(weight, Tensor), "a quantised weight is never merged"
            return self.merged(weight)
        return ready(weight)

    def in_order(self, grad_a: Sequence[Tensor], grad_b: Sequence[Tensor]) -> list[Tensor]:
        """dA₁ dB₁ dA₂ dB₂ …: the order of the factors."""
        return [grad for pair in zip(grad_a, grad_b, strict=True) for grad in pair]

    def _kept(self, part: int, tokens: Tensor, first: int) -> Tensor:
        """The tokens that dropout leaves; what it leaves is scaled by :meth:`_scaling`."""
        if self.masks is None:
            return tokens
        return tokens * self.masks[part][first : first + tokens.size(0)]

    def _scaling(self, part: int) -> float:
        return self.parts.scalings[part] / (1.0 if self.masks is None else self.parts.kept_share)


def flat_tokens(x: Tensor) -> Tensor:
    """``[s, b, w]`` as ``[s · b, w]``."""
    return x.reshape(-1, x.size(-1))


def _columns(grad: Tensor, rows: RowBlock) -> Tensor:
    """The rows' columns of ``grad [T, out]``: ``[T, rows.count]``."""
    if rows.repeats == 1:
        return grad[:, rows.start : rows.stop]
    return rows.of(grad).flatten(-2)
