"""Layouts of a training that fit so many GPUs, ranked by predicted memory and time; needs a config.json, no weights.

    python tools/plan.py --model MODEL --gpus 16 --gpu-memory 80GB --seq-length 4096
    python tools/plan.py --model MODEL --gpus 2 --qlora --global-batch-size 16 --tflops 312 --memory-gb 2039

Memory is what posttrain_gpt.py --dry-run tells; the command that is printed can be given to it with --dry-run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from mindspeed_lora.entry import run  # noqa: E402


def plan(job: Any) -> None:
    """Plan, once it is known that there is something to plan."""
    from mindspeed_lora.device.megatron_import import import_megatron

    import_megatron()
    from mindspeed_lora.planning.main import plan_layouts

    plan_layouts(job)


if __name__ == "__main__":
    run("plan", sys.argv[1:], plan)
