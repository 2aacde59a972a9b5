"""What a schedule takes: its products and collectives played through on two clocks, compute and link.

Each function here mirrors the order of one autograd Function: what it computes, starts and waits for. The model has
four numbers of a device (:class:`Device`); products cost their operations or their bytes, whichever takes longer,
and messages follow each other on the link. It chooses plans (:mod:`.choice`) and predicts whole models
(``tools/overlap_model.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mindspeed_lora.adapters.schedules.plan import Family, SchedulePlan


@dataclass(frozen=True)
class Device:
    """One rank's device and its link to the others of its TP group."""

    flops: float
    """Of a large matrix product, per second."""
    memory: float
    """Bytes read and written per second by element-wise work."""
    link: float
    """Bytes per second that one rank sends while it receives as many."""
    latency: float
    """Seconds that a collective takes however small it is."""


@dataclass(frozen=True)
class LinearShape:
    """One linear of a layer as a TP rank has it, for one micro-batch."""

    column: bool
    tokens: int
    """Of the whole sequence and micro-batch."""
    in_features: int
    """Columns of this rank's shard of W."""
    out_features: int
    """Rows of this rank's shard of W."""
    rank: int
    """Σ r over the parts; 0: no adapter."""
    tp: int
    sequence_parallel: bool
    element_size: int
    """Bytes."""

    @property
    def cut(self) -> int:
        """Over how many ranks the tokens are cut."""
        return self.tp if self.sequence_parallel else 1


class Timeline:
    """Two clocks, in seconds: what has been computed, and what the link has carried."""

    def __init__(self, device: Device, shape: LinearShape) -> None:
        self.device, self.shape = device, shape
        self.now = self.link = 0.0
        self.computing = self.travelling = 0.0
        """How long either was busy."""

    def product(self, m: int, n: int, k: int, passes: int = 1) -> None:
        """``[m, k] · [k, n]``; ``passes`` 2 where it is added to what stands there."""
        moved = (m * k + k * n + passes * m * n) * self.shape.element_size
        self._compute(max(2.0 * m * n * k / self.device.flops, moved / self.device.memory))

    def element_wise(self, elements: int, passes: int) -> None:
        """So many passes over so many elements."""
        self._compute(elements * passes * self.shape.element_size / self.device.memory)

    def start(self, rows: int, width: int, factor: int = 1) -> float:
        """Sends ``[rows, width]`` to each of the other ranks (``factor`` times); when it has arrived."""
        sent = (self.shape.tp - 1) * rows * width * self.shape.element_size * factor
        took = self.device.latency + sent / self.device.link
        self.link = max(self.link, self.now) + took
        self.travelling += took
        return self.link

    def wait(self, arrival: float) -> None:
        """Computes nothing until then."""
        self.now = max(self.now, arrival)

    def collective(self, rows: int, width: int, factor: int = 1) -> None:
        """Sends and waits."""
        self.wait(self.start(rows, width, factor))

    def _compute(self, seconds: float) -> None:
        self.now += seconds
        self.computing += seconds


def linear_time(
    plan: SchedulePlan, shape: LinearShape, device: Device, needs_input_grad: bool = True
) -> Timeline:
    """Forward and backward pass of one linear under a plan."""
    clock = Timeline(device, shape)
    merge = plan.merges(shape.tokens) and shape.rank > 0
    play = _PLAYS[plan.family if shape.tp > 1 else Family.ONE_COLLECTIVE, shape.column]
    play(clock, merge, plan.chunks, needs_input_grad)
    return clock


def _local(shape: LinearShape) -> int:
    return shape.tokens // shape.cut


def _forward_rows(clock: Timeline, rows: int, merge: bool) -> None:
    """``x Wᵀ``, v, and ``s · v Bᵀ`` unless it is in the merged weight."""
    s = clock.shape
    clock.product(rows, s.out_features, s.in_features)
    clock.product(rows, s.rank, s.in_features)
    if not merge:
        clock.product(rows, s.out_features, s.rank, passes=2)


def _merge(clock: Timeline) -> None:
    """``W + s · B A``: a copy and an added product."""
    s = clock.shape
    clock.element_wise(s.out_features * s.in_features, 2)
    clock.product(s.out_features, s.in_features, s.rank, passes=2)


def _gathered(clock: Timeline, width: int, chunks: int, rows: Callable[[int], None]) -> None:
    """``rows(m)`` of all tokens, those of other ranks as they arrive."""
    s = clock.shape
    if s.cut == 1:
        rows(s.tokens)
        return
    if chunks == 0:
        clock.collective(_local(s), width)
        rows(s.tokens)
        return
    arrivals = [clock.start(_local(s) // chunks, width) for _ in range(chunks)]
    rows(_local(s))
    for arrival in arrivals:
        clock.wait(arrival)
        rows((s.tp - 1) * _local(s) // chunks)


def _summed(clock: Timeline, width: int, chunks: int, rows: Callable[[int], None]) -> float:
    """``rows(m)`` of all tokens, sent off as they are formed; when the sum has arrived."""
    s, local = clock.shape, _local(clock.shape)
    if s.tp == 1:
        rows(s.tokens)
        return clock.now
    count = max(1, chunks)
    if s.cut == 1:
        arrival = 0.0
        for _ in range(count):
            rows(s.tokens // count)
            # An all-reduce sends a share of 1/t twice.
            arrival = clock.start(s.tokens // count // s.tp, width, factor=2)
        return arrival
    if chunks == 0:
        rows(s.tokens)
        return clock.start(local, width)
    arrival = 0.0
    for _ in range(count):
        rows((s.tp - 1) * local // count)
        arrival = clock.start(local // count, width)
    rows(local)
    return arrival


def _one_collective_column(clock: Timeline, merge: bool, chunks: int, needs_dx: bool) -> None:
    s = clock.shape
    if merge:
        _merge(clock)
    _gathered(clock, s.in_features, chunks, lambda m: _forward_rows(clock, m, merge))
    clock.product(s.tokens, s.rank, s.out_features)
    scattered = clock.start(_local(s), s.rank) if s.cut > 1 else clock.now

    def dx_rows(m: int) -> None:
        clock.product(m, s.in_features, s.out_features)
        if not merge and s.cut == 1:
            clock.product(m, s.in_features, s.rank, passes=2)

    arrival = clock.now
    if needs_dx:
        if merge:
            _merge(clock)
        arrival = _summed(clock, s.in_features, chunks, dx_rows)
    clock.product(s.rank, s.out_features, s.tokens)
    clock.wait(scattered)
    clock.product(s.rank, s.in_features, _local(s))
    clock.wait(arrival)
    if needs_dx and s.cut > 1:
        clock.element_wise(_local(s) * s.in_features, 3)
        if not merge:
            clock.product(_local(s), s.in_features, s.rank, passes=2)


def _one_collective_row(clock: Timeline, merge: bool, chunks: int, needs_dx: bool) -> None:
    s = clock.shape
    if merge:
        _merge(clock)
    clock.wait(_summed(clock, s.out_features, chunks, lambda m: _forward_rows(clock, m, merge)))
    if s.cut > 1:
        clock.element_wise(_local(s) * s.out_features, 3)

    def backward_rows(m: int) -> None:
        clock.product(m, s.rank, s.out_features)
        clock.product(m, s.in_features, s.out_features)
        if not merge:
            clock.product(m, s.in_features, s.rank, passes=2)
        clock.product(s.rank, s.out_features, m)

    if merge:
        _merge(clock)
    _gathered(clock, s.out_features, chunks, backward_rows)
    clock.product(s.rank, s.in_features, s.tokens)


def _overlapped_column(clock: Timeline, merge: bool, chunks: int, needs_dx: bool) -> None:
    s, local = clock.shape, _local(clock.shape)
    arrival = clock.start(local, s.in_features) if s.cut > 1 else clock.now
    clock.product(local, s.rank, s.in_features)
    if merge:
        _merge(clock)
    clock.wait(arrival)
    inner = clock.start(local, s.rank) if s.cut > 1 and not merge else clock.now
    clock.product(s.tokens, s.out_features, s.in_features)
    clock.wait(inner)
    if not merge:
        clock.product(s.tokens, s.out_features, s.rank, passes=2)
    inner = clock.start(local, s.rank) if s.cut > 1 else clock.now
    clock.product(s.tokens, s.rank, s.out_features)
    clock.wait(inner)
    outer = clock.start(local if s.cut > 1 else local // s.tp, s.rank, 1 if s.cut > 1 else 2)
    if merge:
        _merge(clock)
    clock.product(s.tokens, s.in_features, s.out_features)
    clock.wait(outer)
    arrival = clock.start(local if s.cut > 1 else local // s.tp, s.in_features, 1 if s.cut > 1 else 2)
    clock.product(s.rank, s.in_features, local)
    clock.product(s.rank, s.out_features, s.tokens)
    clock.wait(arrival)
    if s.cut > 1:
        clock.element_wise(local * s.in_features, 3)
    if not merge:
        clock.product(local, s.in_features, s.rank, passes=2)


def _overlapped_row(clock: Timeline, merge: bool, chunks: int, needs_dx: bool) -> None:
    s, local = clock.shape, _local(clock.shape)
    merge = merge and s.cut > 1
    share, factor = (local, 1) if s.cut > 1 else (local // s.tp, 2)
    clock.product(s.tokens, s.rank, s.in_features)
    inner = clock.start(share, s.rank, factor)
    if merge:
        _merge(clock)
        clock.wait(inner)
        clock.product(s.tokens, s.out_features, s.in_features)
        clock.collective(share, s.out_features, factor)
    else:
        clock.product(s.tokens, s.out_features, s.in_features)
        clock.wait(inner)
        arrival = clock.start(share, s.out_features, factor)
        clock.element_wise(local * s.out_features, 1)
        clock.product(local, s.out_features, s.rank, passes=2)
        clock.wait(arrival)
        clock.element_wise(local * s.out_features, 3)
    if s.cut > 1:
        clock.element_wise(local * s.out_features, 3)
    arrival = clock.start(local, s.out_features) if s.cut > 1 else clock.now
    clock.product(s.rank, s.out_features, local)
    clock.wait(arrival)
    clock.product(s.tokens, s.rank, s.out_features)
    if merge:
        _merge(clock)
    clock.product(s.tokens, s.in_features, s.out_features)
    if not merge:
        clock.product(s.tokens, s.in_features, s.rank, passes=2)
    clock.product(s.rank, s.in_features, s.tokens)


def _unfused_column(clock: Timeline, merge: bool, chunks: int, needs_dx: bool) -> None:
    s, local = clock.shape, _local(clock.shape)
    if s.cut > 1:
        clock.collective(local, s.in_features)
    clock.product(s.tokens, s.out_features, s.in_features)
    clock.product(local, s.rank, s.in_features)
    if s.cut > 1:
        clock.collective(local, s.rank)
    _autograd_sum(clock, s.tokens, s.out_features)
    clock.product(s.tokens, s.rank, s.out_features)
    clock.element_wise(s.tokens * s.out_features, 2)
    clock.collective(local if s.cut > 1 else local // s.tp, s.rank, 1 if s.cut > 1 else 2)
    if s.cut > 1:
        clock.collective(local, s.rank)
    clock.product(s.rank, s.out_features, s.tokens)
    clock.product(s.rank, s.in_features, local)
    clock.product(local, s.in_features, s.rank)
    clock.product(s.tokens, s.in_features, s.out_features)
    clock.collective(local if s.cut > 1 else local // s.tp, s.in_features, 1 if s.cut > 1 else 2)
    clock.element_wise(local * s.in_features, 6 if s.cut > 1 else 3)


def _unfused_row(clock: Timeline, merge: bool, chunks: int, needs_dx: bool) -> None:
    s, local = clock.shape, _local(clock.shape)
    share, factor = (local, 1) if s.cut > 1 else (local // s.tp, 2)
    clock.product(s.tokens, s.out_features, s.in_features)
    clock.collective(share, s.out_features, factor)
    clock.product(s.tokens, s.rank, s.in_features)
    clock.collective(share, s.rank, factor)
    _autograd_sum(clock, local, s.out_features)
    clock.element_wise(local * s.out_features, 2)
    clock.product(local, s.rank, s.out_features)
    clock.product(s.rank, s.out_features, local)
    if s.cut > 1:
        clock.collective(local, s.rank)
        clock.collective(local, s.out_features)
    clock.product(s.tokens, s.in_features, s.out_features)
    clock.product(s.tokens, s.in_features, s.rank)
    clock.product(s.rank, s.in_features, s.tokens)
    clock.element_wise(s.tokens * s.in_features, 3)


def _autograd_sum(clock: Timeline, rows: int, width: int) -> None:
    """``y + s · (v Bᵀ)``: the product, scaled into a new tensor, added into another."""
    clock.product(rows, width, clock.shape.rank)
    clock.element_wise(rows * width, 5)


_Play = Callable[[Timeline, bool, int, bool], None]
_PLAYS: dict[tuple[Family, bool], _Play] = {
    (Family.ONE_COLLECTIVE, True): _one_collective_column,
    (Family.ONE_COLLECTIVE, False): _one_collective_row,
    (Family.OVERLAPPED, True): _overlapped_column,
    (Family.OVERLAPPED, False): _overlapped_row,
    (Family.UNFUSED, True): _unfused_column,
    (Family.UNFUSED, False): _unfused_row,
}


def candidates(family: Family | None, merge: bool | None, chunks: int | None) -> list[SchedulePlan]:
    """The plans that are left where some of their fields are given, the simplest first."""
    families = [Family.ONE_COLLECTIVE, Family.OVERLAPPED] if family is None else [family]
    merges = [None, 0] if merge is None else [0 if merge else None]
    plans = []
    for one in families:
        counts = [0, 1, 2, 4, 8] if chunks is None else [chunks]
        counts = counts if one is Family.ONE_COLLECTIVE else [0]
        plans += [SchedulePlan(one, merge_from, count) for count in counts for merge_from in merges]
    return plans


def best(plans: list[SchedulePlan], shape: LinearShape, device: Device) -> SchedulePlan:
    """The fastest one; a later plan must gain 2% on an earlier, simpler one.

    Where plans without merging were left too, it merges only from as many tokens on as make it gain.
    """
    chosen = plans[0]
    for plan in plans[1:]:
        if linear_time(plan, shape, device).now < 0.98 * linear_time(chosen, shape, device).now:
            chosen = plan
    if chosen.merge_from is None or replace(chosen, merge_from=None) not in plans:
        return chosen
    return replace(chosen, merge_from=_merge_from(chosen, shape, device))


def _merge_from(plan: SchedulePlan, shape: LinearShape, device: Device) -> int:
    """The fewest tokens, in eighths of those of the shape, from which on merging gains."""
    split = replace(plan, merge_from=None)
    for eighth in range(1, 8):
        fewer = replace(shape, tokens=max(shape.tp, shape.tokens * eighth // 8 // shape.tp * shape.tp))
        if (
            linear_time(replace(plan, merge_from=0), fewer, device).now
            < linear_time(split, fewer, device).now
        ):
            return fewer.tokens
    return shape.tokens
