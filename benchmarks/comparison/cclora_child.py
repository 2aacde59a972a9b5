"""All ranks of a sweep over link rates, in a network namespace of their own; rank 0 writes what was measured.

    python benchmarks/comparison/cclora_child.py '{"ratios": [0.5, 1.0], …}' FILE.json

Started without ``RANK``, it starts the ranks and waits for them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from comparison.fused_layers import FusedLayers, Way  # noqa: E402
from comparison.link_sweep import LinkSweep, start_ranks  # noqa: E402
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
    sys.exit(start_ranks(options["ranks"]))


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


class Sweep(LinkSweep):
    """Measures every way at one link rate after the other; all ranks call the same."""

    layers: FusedLayers

    def __init__(self, layers: FusedLayers, is_main: bool, repeats: int) -> None:
        super().__init__(layers, is_main, repeats)

    def use_plainest(self) -> None:
        """Unfused, nothing by turns."""
        self.layers.use(self.layers.choose(WAYS[0]), None)

    def at(self, ratio: float | None) -> dict[str, Any]:
        """Everything at the link rate at which the base's collectives take ``ratio`` times the compute."""
        rate = self.limit_to(ratio)
        communication = self.median(self.layers.communicate)
        plans = {way.name: self.layers.choose(way) for way in WAYS}
        speeds = measure(
            self.layers.sizes.tokens,
            self.layers.sizes.hidden_size,
            torch.float32,
            torch.device("cpu"),
            self.layers.groups,
        )
        interleave = {way.name: way.interleave for way in WAYS}
        measured = self.in_turn(list(plans), lambda name: self.layers.use(plans[name], interleave[name]))
        return {
            "ratio": ratio,
            "bytes_per_second": rate,
            "communication_seconds": communication,
            **measured,
            "speeds": vars(speeds),
            "plans": {
                name: {kind: str(plan) for kind, plan in chosen.items()} for name, chosen in plans.items()
            },
        }


if __name__ == "__main__":
    main()
