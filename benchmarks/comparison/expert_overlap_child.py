"""All ranks of a sweep over link rates for experts, in a network namespace of their own; rank 0 writes the figures.

    python benchmarks/comparison/expert_overlap_child.py '{"ratios": [0.5], …}' FILE.json

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

from comparison.expert_layers import ExpertLayers, ExpertSizes  # noqa: E402
from comparison.link_sweep import LinkSweep, start_ranks  # noqa: E402
from mindspeed_lora.config.parallel import ParallelConfig  # noqa: E402
from mindspeed_lora.device.heap import keep_freed_memory  # noqa: E402
from mindspeed_lora.parallel.groups import initialize_groups  # noqa: E402

WAYS = {"waits": None, "rows by turns": "rows", "tokens by turns": "tokens"}
"""Without and with ``--moe-alltoall-overlap-comm``: of a micro-batch of several rows, and as of one of one row."""


def main() -> None:
    """Starts the ranks, or is one."""
    options = json.loads(sys.argv[1])
    if "RANK" not in os.environ:
        sys.exit(start_ranks(options["ranks"]))
    torch.set_num_threads(1)
    keep_freed_memory()
    groups, _ = initialize_groups(ParallelConfig(expert_model_parallel_size=options["ranks"]), 1)
    layers = ExpertLayers(ExpertSizes(**options["sizes"]), groups)
    sweep = Sweep(layers, groups.is_main, options["repeats"])
    results = [sweep.at(ratio) for ratio in options["ratios"]]
    if groups.is_main:
        found = {"compute_seconds": sweep.compute, "bytes_sent": layers.bytes_sent, "rates": results}
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.destroy_process_group()


class Sweep(LinkSweep):
    """Measures every way at one link rate after the other; all ranks call the same."""

    layers: ExpertLayers

    def use_plainest(self) -> None:
        """Each exchange is waited for."""
        self.layers.use(None)

    def at(self, ratio: float | None) -> dict[str, Any]:
        """Everything at the link rate at which the exchanges take ``ratio`` times the compute."""
        rate = self.limit_to(ratio)
        communication = self.median(self.layers.communicate)
        measured = self.in_turn(list(WAYS), lambda name: self.layers.use(WAYS[name]))
        return {
            "ratio": ratio,
            "bytes_per_second": rate,
            "communication_seconds": communication,
            **measured,
        }


if __name__ == "__main__":
    main()
