"""Two halves of a micro-batch by turns: one computes while what the other has sent is on its way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from typing import TypeVar

import torch

from mindspeed_lora.models.forward_context import ForwardContext

Tensor = torch.Tensor
T = TypeVar("T")
EXPERTS = "experts"
Steps = Generator[str | None, None, T]
"""A forward pass that pauses and in the end returns its output.

A pause tells :data:`EXPERTS` where tokens have just set out to their experts, or the experts' outputs back.
"""


def to_the_end(steps: Steps[T]) -> T:
    """What the steps return, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            output: T = ended.value
            return output


def by_turns(first: Steps[T], second: Steps[T], only_experts: bool = False) -> list[T]:
    """What both return. Autograd goes back in the opposite order, so that what holds here holds for it too.

    Args:
        first: is one step ahead: each computes while what the other has sent is on its way.
        second: the other half.
        only_experts: they change only where :data:`EXPERTS` is told, neither ahead. Each then sends all that it has
            to send and lets the other compute a whole attention, or its experts, before it asks for what comes.
    """
    outputs: dict[Steps[T], T] = {}
    ahead = () if only_experts else (first, second, first)
    for steps in itertools.chain(ahead, itertools.cycle((first, second))):
        if len(outputs) == 2:
            break
        if steps not in outputs:
            try:
                while next(steps) != EXPERTS and only_experts:
                    pass
            except StopIteration as ended:
                outputs[steps] = ended.value
    return [outputs[first], outputs[second]]


def rows_by_turns(
    through: Callable[[Tensor, Tensor | None, ForwardContext | None], Steps[Tensor]],
    hidden_states: Tensor,
    rotary_pos_emb: Tensor | None,
    context: ForwardContext | None,
    only_experts: bool,
) -> Tensor:
    """What one layer or several make of ``hidden_states [s, b, h]``, two halves of the rows by turns.

    Args:
        through: the layers' steps.
        hidden_states: at least two rows.
        rotary_pos_emb: ``[2, s, b or 1, 1, d/2]``.
        context: of all rows.
        only_experts: see :func:`by_turns`.
    """
    rows = hidden_states.size(1)
    halves = []
    for start, stop in ((0, rows // 2), (rows // 2, rows)):
        rotation = rotary_pos_emb
        if rotation is not None and rotation.size(2) > 1:
            rotation = rotation[:, :, start:stop]
        of_half = None if context is None else context.rows(start, stop)
        halves.append(through(hidden_states[:, start:stop].contiguous(), rotation, of_half))
    return torch.cat(by_turns(halves[0], halves[1], only_experts), dim=1)
