"""Child process: the operations that a token of a model with the comparison's adapter needs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.training.reporting import ModelFlops


def main() -> None:
    """Read the request, write the figures of every model."""
    request = json.loads(Path(sys.argv[1]).read_text())
    made = {}
    for model, start_adapter in request["models"].items():
        shape = open_source(model).shape
        plan = plan_adapter(LoraConfig(lora_load=start_adapter), shape, 0)
        assert plan is not None
        made[model] = asdict(ModelFlops.of(shape, plan.spec))
    Path(request["result"]).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
