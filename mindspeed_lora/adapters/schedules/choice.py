"""Which schedule each linear of a model runs: what the flags fix, and the cost model for the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from mindspeed_lora.adapters.schedules.cost import Device, LinearShape, best, candidates, linear_time
from mindspeed_lora.adapters.schedules.plan import UNFUSED, Family, SchedulePlan
from mindspeed_lora.device import synchronize
from mindspeed_lora.parallel.collectives import broadcast_object, start_gather_first_dim
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor
LARGEST_MESSAGE = 8 << 20
"""Bytes that each rank sends to measure a link, which may be slow."""


@dataclass(frozen=True)
class FusionRequest:
    """``--lora-fusion`` and what its flags leave open."""

    family: Family | None = None
    """None: the cost model's choice."""
    merge: bool | None = None
    chunks: int | None = None


@dataclass
class Scheduler:
    """Gives each linear its plan, the same one for linears of the same kind and shape."""

    request: FusionRequest | None = None
    """None: every linear runs :attr:`fixed`."""
    fixed: SchedulePlan = UNFUSED
    tokens: int = 1
    """Of a full micro-batch."""
    tp: int = 1
    sequence_parallel: bool = False
    speeds: Device | None = None
    """Of this rank's device and link, the same on all ranks; needed with a request."""
    lines: list[str] = field(default_factory=list)
    """What was chosen, a line per kind of linear."""
    _plans: dict[tuple[str, LinearShape], SchedulePlan] = field(default_factory=dict)

    @property
    def link_share(self) -> float:
        """How long bytes travel, by how long products and messages' latency take, over one linear of each kind.

        Latency stands with the products since halves by turns, which this decides on, send twice as often.
        """
        if self.speeds is None or not self._plans:
            return 0.0
        clocks = [linear_time(plan, shape, self.speeds) for (_, shape), plan in self._plans.items()]
        at_once = replace(self.speeds, latency=0.0)
        bytes_only = sum(
            linear_time(plan, shape, at_once).travelling for (_, shape), plan in self._plans.items()
        )
        busy = sum(clock.computing + clock.travelling for clock in clocks) - bytes_only
        return bytes_only / busy

    def plan(self, linear: str, weight: Tensor, column: bool, rank: int) -> SchedulePlan:
        """The plan of one linear.

        Args:
            linear: Megatron's name of its kind (``linear_qkv``).
            weight: this rank's shard ``[out, in]``; only its shape and dtype are read.
            column: whether it is column-parallel.
            rank: Σ r over its parts.
        """
        if self.request is None:
            return self.fixed
        shape = LinearShape(
            column=column,
            tokens=max(self.tp, self.tokens),
            in_features=weight.size(1),
            out_features=weight.size(0),
            rank=rank,
            tp=self.tp,
            sequence_parallel=self.sequence_parallel and self.tp > 1,
            element_size=weight.element_size(),
        )
        if (linear, shape) not in self._plans:
            self._plans[linear, shape] = self._choose(linear, shape, self.request)
        return self._plans[linear, shape]

    def _choose(self, linear: str, shape: LinearShape, request: FusionRequest) -> SchedulePlan:
        assert self.speeds is not None
        plans = candidates(request.family, request.merge, request.chunks)
        plan = best(plans, shape, self.speeds)
        took = linear_time(plan, shape, self.speeds).now
        unfused = linear_time(UNFUSED, shape, self.speeds).now
        self.lines.append(
            f"--lora-fusion: {linear} {plan}; {1000 * took:.3g} ms predicted for {shape.tokens} tokens, "
            f"unfused {1000 * unfused:.3g} ms ({100 * (1 - took / unfused):.0f}% saved)"
        )
        return plan


def measure(
    tokens: int, width: int, dtype: torch.dtype, device: torch.device, groups: ParallelGroups
) -> Device:
    """Speeds of rank 0's device and link, the same answer on all ranks, which must all call.

    Taken with what a layer does: ``[tokens, width]`` times a square weight, and its gather over TP.
    """
    rows = min(tokens, 1024)
    x = torch.zeros(rows, width, dtype=dtype, device=device)
    y, weight = torch.zeros_like(x), torch.zeros(width, width, dtype=dtype, device=device)
    product = shortest_seconds(lambda: torch.mm(x, weight, out=y), device)
    added = shortest_seconds(lambda: y.add_(x), device)
    link, latency = math.inf, 0.0
    if groups.tp_size > 1:
        most = LARGEST_MESSAGE // (width * x.element_size())
        message = x.new_zeros(max(1, min(tokens // groups.tp_size, most)), width)

        def gather(some: Tensor) -> Callable[[], object]:
            return lambda: start_gather_first_dim(some, groups.tp_group)[1].wait()

        latency, whole = (
            shortest_seconds(gather(message[:1]), device),
            shortest_seconds(gather(message), device),
        )
        sent = (groups.tp_size - 1) * message.numel() * message.element_size()
        link = sent / max(whole - latency, 1e-9)
    moved = 3.0 * y.numel() * y.element_size()
    found = Device(
        flops=2.0 * rows * width * width / product, memory=moved / added, link=link, latency=latency
    )
    return broadcast_object(found, groups)


def shortest_seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The shortest of some runs after one that does not count."""
    shortest = math.inf
    for turn in range(repeats + 1):
        started = _now(device)
        work()
        took = _now(device) - started
        shortest = min(shortest, took) if turn else math.inf
    return max(shortest, 1e-9)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        synchronize()
    return time.perf_counter()
