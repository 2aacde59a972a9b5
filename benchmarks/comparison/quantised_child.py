"""Child process: reads a checkpoint's bytes, loads it as training does, or predicts what a rank of it will hold."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparison.convert_child import BLOCK_BYTES


def read(request: dict[str, Any]) -> dict[str, Any]:
    """Every byte of the weights' files into one buffer."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    started = time.perf_counter()
    for path in sorted(Path(request["folder"]).rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - started}


def load(request: dict[str, Any]) -> dict[str, Any]:
    """The model of a training job, ready for its first step; bytes of all that is frozen in it."""
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
    from mindspeed_lora.training.plan import plan_training
    from mindspeed_lora.training.session import TrainingSession

    plan = plan_training(parse("posttrain", request["flags"]))
    groups, _ = initialize_groups(plan.job.parallel, plan.job.training.seed)
    started = time.perf_counter()
    session = TrainingSession(plan, groups)
    seconds = time.perf_counter() - started
    frozen = [p for chunk in session.chunks for p in chunk.parameters() if not p.requires_grad]
    buffers = [b for chunk in session.chunks for b in chunk.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*frozen, *buffers)}
    destroy_groups()
    return {"seconds": seconds, "weights": sum(storages.values())}


def predict(request: dict[str, Any]) -> dict[str, Any]:
    """What one rank that holds the whole model would hold, by its dry run; of each job."""
    return {"jobs": [_predicted(job["flags"], job["itemsize"]) for job in request["jobs"]]}


def _predicted(flags: list[str], itemsize: int) -> dict[str, float]:
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.device import resident_memory_bytes
    from mindspeed_lora.training.dry_run import memory_question
    from mindspeed_lora.training.memory import predict_memory
    from mindspeed_lora.training.plan import plan_training

    plan = plan_training(parse("posttrain", [*flags, "--dry-run"], {"WORLD_SIZE": "1"}))
    question = memory_question(plan, 1, itemsize)
    found = predict_memory(question, 0)
    return {
        "weights": found.weights,
        "bits": found.quantized.bits or 8 * itemsize,
        "adapter_and_optimizer": found.adapters + found.gradients + found.optimizer,
        "total": found.total + resident_memory_bytes(),
    }


def main() -> None:
    """Read the request, do it, write the result."""
    import resource

    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    ways: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "read": read,
        "load": load,
        "predict": predict,
    }
    answer = ways[request["what"]](request)
    answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(request["result"]).write_text(json.dumps(answer))
    # Loading leaves threads of gloo that need not be waited for.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
