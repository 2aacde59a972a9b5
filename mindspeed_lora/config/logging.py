"""What a run reports."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, Section, flag


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """Iteration lines and tensorboard."""

    log_interval: int = flag("steps between iteration lines", 1, check=AT_LEAST_ONE)
    log_throughput: bool = flag("add tokens and TFLOP per second to the iteration line", False)
    tensorboard_dir: str | None = flag(
        "folder of tensorboard events; left out: <save>/tensorboard", metavar="DIR"
    )
