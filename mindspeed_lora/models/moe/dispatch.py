"""Tokens to the ranks that hold their experts, and the experts' outputs back.

A choice is a pair of token and expert. A rank sorts its choices by expert and sends each of them straight to all ETP
ranks of the expert's EP rank: one exchange over EP × ETP, whose duplicates stand for the gather over ETP. On the way
back every ETP rank sends its partial output, and the token's rank sums them with those of its other choices: that is
the reduce-scatter over ETP. Backward the same two exchanges run the other way round. With EP = ETP = 1 nothing
travels, and, where nothing is dropped, nothing waits for the device; otherwise the host waits once, for the counts.

Letters: T tokens of this rank, k choices of each, M rows that it sends, R that it computes, P ranks of EP × ETP, e
experts of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mindspeed_lora.models.moe.exchange import Exchange
from mindspeed_lora.models.moe.permutation import Copies, Reordered
from mindspeed_lora.models.moe.routing import Routing
from mindspeed_lora.parallel.collectives import gather_first_dim
from mindspeed_lora.parallel.experts import ExpertParallel

Tensor = torch.Tensor


@dataclass(frozen=True)
class ExpertRows:
    """What a rank's experts compute, ordered by expert."""

    hidden: Tensor
    """``[R, h]``."""
    weights: Tensor
    """``[R]`` float32, of the choices."""
    offsets: Tensor
    """``[e]`` int32, where the rows of each expert end."""
    keys: Tensor | None
    """``[R]`` int64, the dropout keys of the tokens; None: nothing is dropped."""


class Dispatch:
    """One micro-batch's way to the experts and back; it sets out when it is made.

    Args:
        tokens: ``[T, h]``, this rank's own.
        routing: of these tokens.
        num_experts: of the layer.
        experts: this rank's place.
        keys: ``[T]`` int64 dropout keys, or None.
    """

    def __init__(
        self,
        tokens: Tensor,
        routing: Routing,
        num_experts: int,
        experts: ExpertParallel,
        keys: Tensor | None = None,
    ) -> None:
        self._experts = experts
        self._num_local = num_experts // experts.ep_size
        order, counts = _sorted_choices(routing, num_experts)
        self._reordered: Reordered | None = None
        self._plan: tuple[list[int], list[int]] | None = None
        if experts.group is None:
            if routing.kept is not None:
                order = order[: int(counts.sum())]
            self.offsets = counts.cumsum(0).to(torch.int32)
        else:
            order = self._share(order, counts)
        topk = routing.experts.size(1)
        self._copies, of_choices = _copies(order, routing, experts.etp_size)
        self._tokens, self._weights, self._keys = (_Way(self._plan, experts) for _ in range(3))
        self._under_way = (
            self._tokens.start(self._copies.copy(tokens)),
            self._weights.start(of_choices.copy(routing.weights.reshape(-1, 1))),
            None if keys is None else self._keys.start(keys.index_select(0, order // topk).unsqueeze(1)),
        )

    def arrive(self) -> ExpertRows:
        """The rows that this rank's experts compute."""
        tokens, weights, keys = self._under_way
        del self._under_way
        return ExpertRows(
            hidden=self._by_expert(self._tokens.finish(tokens)),
            weights=self._by_expert(self._weights.finish(weights)).squeeze(1),
            offsets=self.offsets,
            keys=None if keys is None else self._by_expert(self._keys.finish(keys)).squeeze(1),
        )

    def send_back(self, outputs: Tensor) -> None:
        """Sends the experts' outputs ``[R, h]``, in the order of :meth:`arrive`, on their way."""
        self._return = _Way(None if self._plan is None else (self._plan[1], self._plan[0]), self._experts)
        by_rank = outputs if self._reordered is None else self._reordered.back(outputs)
        self._returning = self._return.start(by_rank)

    def combine(self) -> Tensor:
        """The sum over each token's choices, ``[T, h]``."""
        returned = self._return.finish(self._returning)
        del self._returning
        return self._copies.sum(returned)

    def _by_expert(self, rows: Tensor) -> Tensor:
        return rows if self._reordered is None else self._reordered.there(rows)

    def _share(self, order: Tensor, counts: Tensor) -> Tensor:
        """Tells all ranks the counts ``[E]``; returns the choice of every row to send, by rank."""
        place, local = self._experts, self._num_local
        assert place.group is not None
        every = gather_first_dim(counts.unsqueeze(0), place.group)  # [P, E]
        on_host = every.tolist()
        mine = on_host[place.ep_rank * place.etp_size + place.etp_rank]
        blocks = [sum(mine[i * local : (i + 1) * local]) for i in range(place.ep_size)]
        first = place.ep_rank * local
        received = [sum(of_rank[first : first + local]) for of_rank in on_host]
        self._plan = [count for count in blocks for _ in range(place.etp_size)], received
        here = every[:, first : first + local]  # [P, e]
        self.offsets = here.sum(dim=0).cumsum(0).to(torch.int32)
        if local > 1:
            numbers = torch.arange(local, device=order.device).repeat(place.size)
            expert_of_row = numbers.repeat_interleave(here.flatten(), output_size=sum(received))
            self._reordered = Reordered(expert_of_row.argsort(stable=True))
        order = order[: sum(blocks)]
        if place.etp_size > 1:
            order = torch.cat([block.repeat(place.etp_size) for block in order.split(blocks)])
        return order


class _Way:
    """An exchange between ranks, or nothing where there is one rank."""

    def __init__(self, plan: tuple[list[int], list[int]] | None, experts: ExpertParallel) -> None:
        self._exchange: Exchange | None = None
        if plan is not None and experts.group is not None:
            self._exchange = Exchange(*plan, experts.group)

    def start(self, rows: Tensor) -> Tensor:
        return rows if self._exchange is None else self._exchange.start(rows)

    def finish(self, rows: Tensor) -> Tensor:
        return rows if self._exchange is None else self._exchange.finish(rows)


def _sorted_choices(routing: Routing, num_experts: int) -> tuple[Tensor, Tensor]:
    """Numbers ``[T · k]`` of the choices by expert, those that are dropped last, and the count ``[E]`` of each."""
    experts = routing.experts
    if routing.kept is not None:
        experts = torch.where(routing.kept, experts, num_experts)
    flat = experts.flatten()
    counts = flat.new_zeros(num_experts + 1).index_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts[:num_experts]


def _copies(order: Tensor, routing: Routing, etp_size: int) -> tuple[Copies, Copies]:
    """The rows as copies of tokens and as copies of choices; ``order [M]`` has the choice of each row."""
    num_tokens, topk = routing.experts.shape
    copies = num_tokens, topk * etp_size
    # The rows of one choice, sorted together, are its copies for the ETP ranks; a dropped choice has none.
    by_choice = order.argsort(stable=True)
    if routing.kept is None:
        rows = by_choice.view(num_tokens * topk, etp_size)
        return Copies(order // topk, rows.view(copies)), Copies(order, rows)
    kept = routing.kept.reshape(-1, 1).expand(-1, etp_size)
    rows = torch.zeros_like(kept, dtype=torch.int64).masked_scatter_(kept, by_choice)
    return Copies(order // topk, rows.view(copies), kept.reshape(copies)), Copies(order, rows, kept)
