"""``tools/plan.py``."""

from __future__ import annotations

import time

from mindspeed_lora.config.jobs import LayoutPlanJob
from mindspeed_lora.planning.choose import Chooser
from mindspeed_lora.planning.report import as_json, command_lines, table_lines


def plan_layouts(job: LayoutPlanJob) -> None:
    """Print the layouts that fit, and the command of the fastest.

    Raises:
        Refused: none fits.
    """
    started = time.monotonic()
    found = Chooser(job).choose()
    if job.plan.json:
        print(as_json(job, found))
        return
    machine = job.machine
    print(f"{len(found)} layouts of {machine.gpus} GPUs fit; the fastest, each at its best:\n")
    print("\n".join(table_lines(job, found)))
    print(
        f"\nTimes are of a model with products at {100 * machine.efficiency:.0f}% of {machine.tflops:g} TFLOP/s, links "
        f"of {machine.link_gb:g} GB/s within and {machine.network_gb:g} GB/s between nodes: they rank, and promise "
        f"nothing. ({time.monotonic() - started:.1f} s)\n"
    )
    print("\n".join(command_lines(job, found[0])))
