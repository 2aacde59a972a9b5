"""Child process: where the time of our training step goes.

The same steps are taken twice, without and with the profiler, so that its cost is known.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from comparison.product_peak import best_product
from comparison.profile_parts import (
    ATTENTION,
    LOSS,
    OPTIMIZER_RANGE,
    parts_of,
    plain_products,
    slowest,
)
from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from mindspeed_lora.training.plan import plan_training
from mindspeed_lora.training.session import TrainingSession

_OWN_SHAPES = 8
_SLOWEST = 12


class Stepper:
    """Takes optimizer steps of a training session as the training loop does."""

    def __init__(self, flags: Sequence[str]) -> None:
        plan = plan_training(parse("posttrain", flags))
        groups, _ = initialize_groups(plan.job.parallel, plan.job.training.seed)
        self.session = TrainingSession(plan, groups)
        self.plan = plan

    def step(self, number: int) -> None:
        """Step ``number``, counted from 1."""
        session = self.session
        with record_function(OPTIMIZER_RANGE):
            session.optimizer.zero_grad()
        session.runner.train(session.batches.step(number), number)
        with record_function(OPTIMIZER_RANGE):
            session.optimizer.step(self.plan.learning_rate.at(number - 1))

    def milliseconds(self, numbers: range) -> float:
        """Time of these steps."""
        started = time.perf_counter()
        for number in numbers:
            self.step(number)
        return (time.perf_counter() - started) * 1000


def main() -> None:
    """Read the request, profile, write the result."""
    request = json.loads(Path(sys.argv[1]).read_text())
    warmup, steps = request["warmup"], request["steps"]
    measured = range(warmup + 1, warmup + steps + 1)
    stepper = Stepper(request["flags"])
    try:
        stepper.milliseconds(range(1, warmup + 1))
        plain_ms = stepper.milliseconds(measured)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            profiled_ms = stepper.milliseconds(measured)
        result = _result(profiler.events(), steps, plain_ms, profiled_ms, request["rank"])
    finally:
        destroy_groups()
    Path(request["result"]).write_text(json.dumps(result))


def _result(
    events: Sequence[Any], steps: int, plain_ms: float, profiled_ms: float, rank: int
) -> dict[str, Any]:
    """Figures of one step."""
    parts = parts_of(events, profiled_ms, rank)
    if not (parts[LOSS].gflop and parts[ATTENTION].gflop):
        raise Failed(
            "the profile has no products of the output layer or of attention: their names have changed"
        )
    peak, shape = best_product(_heaviest(plain_products(events)))
    done = sum(part.gflop for part in parts.values())
    reached = done / plain_ms * 1000
    return {
        "steps": steps,
        "step_ms": plain_ms / steps,
        "profiled_step_ms": profiled_ms / steps,
        "parts": {name: {"ms": part.ms / steps, "gflop": part.gflop / steps} for name, part in parts.items()},
        "slowest": [
            {"name": name, "calls": calls / steps, "ms": ms / steps}
            for name, calls, ms in slowest(events, _SLOWEST)
        ],
        "gflop": done / steps,
        "gflop_per_second": reached,
        "peak_gflop_per_second": peak,
        "peak_shape": shape,
        "share_of_peak": reached / peak,
    }


def _heaviest(products: Counter[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """The shapes that take most of the work."""

    def work(shape: tuple[int, ...]) -> int:
        rows, inner, columns = shape
        return products[shape] * rows * inner * columns

    return [(m, k, n) for m, k, n in sorted(products, key=work, reverse=True)[:_OWN_SHAPES]]


if __name__ == "__main__":
    main()
