"""All ranks of a sweep over link rates, in a network namespace of their own; rank 0 writes what was measured.

    python benchmarks/comparison/cclora_child.py '{"ratios": [0.5, 1.0], …}' FILE.json

Started without ``RANK``, it starts the ranks and waits for them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from comparison.fused_layers import FusedLayers, Way, local_copies, peak_above  # noqa: E402
from comparison.rate_limited_link import bring_up, limit  # noqa: E402
from comparison.sizes import Sizes  # noqa: E402
from mindspeed_lora.adapters.schedules import Family  # noqa: E402
from mindspeed_lora.adapters.schedules.choice import FusionRequest, measure  # noqa: E402
from mindspeed_lora.config.parallel import ParallelConfig  # noqa: E402
from mindspeed_lora.device.heap import keep_freed_memory  # noqa: E402
from mindspeed_lora.parallel.groups import initialize_groups  # noqa: E402

ONE, OVERLAPPED = Family.ONE_COLLECTIVE, Family.OVERLAPPED
WAYS = (
    Way("unfused"),
    Way("fused", FusionRequest()),
    Way("interleaved", FusionRequest(ONE), interleave="rows"),
    Way("interleaved tokens", FusionRequest(ONE), interleave="tokens"),
    Way("interleaved, no chunks", FusionRequest(ONE, chunks=0), interleave="rows"),
    Way("no chunks", FusionRequest(ONE, chunks=0)),
    Way("published, merge", FusionRequest(OVERLAPPED, merge=True)),
    Way("published, split", FusionRequest(OVERLAPPED, merge=False)),
)
"""``fused`` is ``--lora-fusion`` alone, ``interleaved`` adds ``--lora-fusion-interleave``, by rows or, as with one row,
by tokens; ``no chunks`` waits for whole collectives."""


def main() -> None:
    """Starts the ranks, or is one."""
    options = json.loads(sys.argv[1])
    if "RANK" in os.environ:
        _rank(options, Path(sys.argv[2]))
        return
    bring_up()
    environment = {"WORLD_SIZE": str(options["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    environment["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **environment, "RANK": str(rank)})
        for rank in range(options["ranks"])
    ]
    sys.exit(max(process.wait() for process in ranks))


def _rank(options: dict[str, Any], target: Path) -> None:
    layers, is_main = joined_layers(options["ranks"], Sizes(**options["sizes"]))
    sweep = Sweep(layers, is_main, options["repeats"])
    results = [sweep.at(ratio) for ratio in options["ratios"]]
    if is_main:
        found = {"compute_seconds": sweep.compute, "bytes_sent": layers.bytes_sent, "rates": results}
        target.write_text(json.dumps(found))
    dist.destroy_process_group()


def joined_layers(size: int, sizes: Sizes) -> tuple[FusedLayers, bool]:
    """This rank's layers, once all ranks are here, and whether it is rank 0."""
    torch.set_num_threads(1)
    keep_freed_memory()
    groups, _ = initialize_groups(ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=True), 1)
    return FusedLayers(sizes, groups), groups.is_main


class Sweep:
    """Measures at one link rate after the other; all ranks call the same."""

    def __init__(self, layers: FusedLayers, is_main: bool, repeats: int) -> None:
        self.layers, self.is_main, self.repeats = layers, is_main, repeats
        self._limit(None)
        self.layers.use(self.layers.choose(WAYS[0]), None)
        self.compute = self._compute()

    def at(self, ratio: float | None) -> dict[str, Any]:
        """Everything at the link rate at which the base's collectives take ``ratio`` times the compute."""
        rate = self.limit_to(ratio)
        communication = self._median(self.layers.communicate)
        plans = {way.name: self.layers.choose(way) for way in WAYS}
        speeds = measure(
            self.layers.sizes.tokens,
            self.layers.sizes.hidden_size,
            torch.float32,
            torch.device("cpu"),
            self.layers.groups,
        )
        seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
        compute = []
        for turn in range(self.repeats + 1):
            for way in WAYS:
                self.layers.use(plans[way.name], way.interleave)
                took = self.time(self.layers.step)
                if turn:
                    seconds[way.name].append(took)
            self.layers.use(plans["unfused"], None)
            compute.append(self._compute_once())
        peaks = {}
        for way in WAYS:
            self.layers.use(plans[way.name], way.interleave)
            peaks[way.name] = peak_above(self.layers.step)
        return {
            "ratio": ratio,
            "bytes_per_second": rate,
            "communication_seconds": communication,
            "compute_seconds": statistics.median(compute),
            "step_seconds": seconds,
            "peak_bytes": peaks,
            "speeds": vars(speeds),
            "plans": {
                name: {kind: str(plan) for kind, plan in chosen.items()} for name, chosen in plans.items()
            },
        }

    def limit_to(self, ratio: float | None) -> float | None:
        """Limits the link such that communication takes ``ratio`` times the compute; its rate, bytes a second."""
        rate = None
        if ratio is not None:
            # Both ranks' bytes pass the same loopback.
            rate = 2 * self.layers.bytes_sent / (ratio * self.compute)
        self._limit(rate)
        return rate

    def _compute(self) -> float:
        self._compute_once()
        return statistics.median(self._compute_once() for _ in range(max(3, self.repeats)))

    def _compute_once(self) -> float:
        with local_copies():
            started = time.perf_counter()
            self.layers.step()
            took = time.perf_counter() - started
        slowest = torch.tensor([took])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    def _median(self, work: Callable[[], None]) -> float:
        work()
        return statistics.median(self.time(work) for _ in range(self.repeats))

    def time(self, work: Callable[[], None]) -> float:
        """Seconds until all ranks have done the work."""
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - started

    def _limit(self, rate: float | None) -> None:
        if self.is_main:
            limit(rate)
        dist.barrier()


if __name__ == "__main__":
    main()
