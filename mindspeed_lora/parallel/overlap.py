"""Gather and sum of a micro-batch's tokens over TP, cut into chunks that travel while the next one is computed.

Both work on rows of tokens: ``n`` of this rank, ``t · n`` in all, those of rank j at ``[j · n, (j + 1) · n)``. What
is of this rank itself never travels, so it is computed while the rest does: first after a gather, last before a sum.

=====  ===============================  ========================================
SP     before a column linear           after a row linear
=====  ===============================  ========================================
on     :class:`TokenGather`             :class:`TokenSum`, scattered
off    nothing: every rank has all      :class:`TokenSum`, everywhere (all-reduce)
=====  ===============================  ========================================

Backward the two change places. Every rank starts its collectives in the same order, that of the program; the chunks
of one are one logical collective. On CUDA they run on the backend's own stream, and waiting makes the computing
stream wait, not the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindspeed_lora.parallel.collectives import (
    start_all_reduce,
    start_exchange,
    start_gather_first_dim,
    start_reduce_scatter_first_dim,
)

Tensor = torch.Tensor
WHOLE = 0
"""Number of chunks that says: one collective, and nothing is computed before its end."""


@dataclass(frozen=True)
class TokenAxis:
    """How the tokens of a micro-batch lie over the ranks of a group, and in how many chunks they travel."""

    group: dist.ProcessGroup
    size: int
    rank: int
    sequence_parallel: bool
    chunks: int = WHOLE

    def gather(self, tokens: Tensor) -> TokenGather:
        """Begins to gather this rank's ``[n, w]``; without SP they are all tokens already."""
        return TokenGather(self, tokens)

    def sum(self, num_tokens: int, like: Tensor, width: int) -> TokenSum:
        """A sum of partial ``[num_tokens, width]``, of the dtype and device of ``like``."""
        return TokenSum(self, num_tokens, like, width)

    @property
    def cut(self) -> int:
        """Over how many ranks the tokens are cut."""
        return self.size if self.sequence_parallel else 1

    def chunk_bounds(self, num_tokens: int) -> list[tuple[int, int]]:
        """First and last row of every chunk of ``num_tokens`` rows; none is empty."""
        count = max(1, min(self.chunks, num_tokens))
        ends = [num_tokens * i // count for i in range(count + 1)]
        return list(zip(ends, ends[1:], strict=False))


class TokenGather:
    """``[n, w]`` of every rank, on its way to all; begun at once."""

    def __init__(self, axis: TokenAxis, tokens: Tensor) -> None:
        self.axis = axis
        self.num_tokens = tokens.size(0) * axis.cut
        self._own = tokens.contiguous()
        self._bounds = axis.chunk_bounds(tokens.size(0))
        self._flights: list[tuple[Tensor, dist.Work | None]] = []
        if axis.cut > 1:
            self._flights = [start_gather_first_dim(self._own[a:b], axis.group) for a, b in self._bounds]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Rows of the whole as they come: the place of the first one, and ``[m, w]``. Each place comes once."""
        n, axis = self._own.size(0), self.axis
        if axis.cut == 1:
            yield 0, self._own
            return
        if axis.chunks == WHOLE:
            yield 0, _arrived(self._flights.pop())
            return
        yield axis.rank * n, self._own
        for first, last in self._bounds:
            chunk = _arrived(self._flights.pop(0)).view(axis.size, last - first, -1)
            for rank in _others(axis):
                yield rank * n + first, chunk[rank]


class TokenSum:
    """The sum over ranks of partial rows, which :meth:`compute` forms and sends off.

    Under SP each rank ends with its own rows ``[n, w]``, otherwise with all of them.
    """

    def __init__(self, axis: TokenAxis, num_tokens: int, like: Tensor, width: int) -> None:
        self.axis = axis
        self.num_tokens = num_tokens
        self.result = like.new_empty(num_tokens // axis.cut, width)
        """Whole after :meth:`wait`."""
        self._bounds = axis.chunk_bounds(self.result.size(0))
        self._flights: list[tuple[Tensor, dist.Work | None]] = []
        self._pending: Callable[[], object] = lambda: None

    def compute(self, product: Callable[[int, Tensor], None]) -> None:
        """Forms the partial rows and starts the sum.

        Args:
            product: writes the rows from the given one on into the tensor ``[m, w]``.
        """
        axis = self.axis
        if axis.size == 1:
            product(0, self.result)
        elif not axis.sequence_parallel:
            for first, last in self._bounds:
                product(first, self.result[first:last])
                self._flights.append(
                    (self.result[first:last], start_all_reduce(self.result[first:last], axis.group))
                )
        elif axis.chunks == WHOLE:
            partial = self.result.new_empty(self.num_tokens, self.result.size(1))
            product(0, partial)
            self._pending = start_reduce_scatter_first_dim(partial, self.result, axis.group)
        else:
            self._exchange(product)

    def _exchange(self, product: Callable[[int, Tensor], None]) -> None:
        """What other ranks need first, chunk by chunk; this rank's own rows last."""
        axis, n = self.axis, self.result.size(0)
        for first, last in self._bounds:
            sent = self.result.new_empty(axis.size - 1, last - first, self.result.size(1))
            for place, rank in enumerate(_others(axis)):
                product(rank * n + first, sent[place])
            self._flights.append(start_exchange(sent, axis.group))
        product(axis.rank * n, self.result)

    def wait(self) -> Tensor:
        """:attr:`result`, whole."""
        self._pending()
        for (first, last), flight in zip(self._bounds, self._flights, strict=False):
            received = _arrived(flight)
            if self.axis.sequence_parallel:
                for part in received:
                    self.result[first:last] += part
        self._flights = []
        return self.result


def _others(axis: TokenAxis) -> list[int]:
    return [rank for rank in range(axis.size) if rank != axis.rank]


def _arrived(flight: tuple[Tensor, dist.Work | None]) -> Tensor:
    tensor, work = flight
    if work is not None:
        work.wait()
    return tensor
