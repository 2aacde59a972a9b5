"""Rows exchanged between ranks, in flight between two autograd nodes, forward and backward.

What a caller computes between :meth:`Exchange.start` and :meth:`Exchange.finish` runs while the rows travel. Autograd
takes the nodes of that in between too on its way back, while the gradients travel the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.parallel.collectives import start_all_to_all

Tensor = torch.Tensor


class Exchange:
    """One exchange: the next ``send[i]`` rows go to rank i of the group, ``receive[i]`` come from it."""

    def __init__(self, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._under_way: tuple[Tensor, Tensor, dist.Work] | None = None
        """What is sent, what is being filled, and what to wait for."""

    def start(self, rows: Tensor) -> Tensor:
        """Sends off ``rows [Σ send, w]``; what is returned is for :meth:`finish` and not filled before."""
        travelling: Tensor = _Start.apply(rows, self)
        return travelling

    def finish(self, travelling: Tensor) -> Tensor:
        """The rows that came, ``[Σ receive, w]``."""
        arrived: Tensor = _Finish.apply(travelling, self)
        return arrived

    def _begin(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert self._under_way is None, "an exchange is ended before it is begun again"
        rows = rows.contiguous()
        received, work = start_all_to_all(rows, send, receive, self.group)
        self._under_way = rows, received, work
        return received

    def _end(self) -> Tensor:
        assert self._under_way is not None
        _, received, work = self._under_way
        self._under_way = None
        work.wait()
        return received


class _Start(torch.autograd.Function):
    """Forward starts the exchange; backward ends that of the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._begin(rows, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._end(), None


class _Finish(torch.autograd.Function):
    """Forward ends the exchange; backward starts that of the gradients."""

    @staticmethod
    def forward(ctx: Any, travelling: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        received = exchange._end()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange._begin(grad_outputs[0], exchange.receive, exchange.send)
        return grad_outputs[0], None
