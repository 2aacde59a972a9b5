"""A tiny training job: its command line, and its live parts on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import ParallelGroups, initialize_groups
from mindspeed_lora.training.plan import TrainPlan, plan_training
from mindspeed_lora.training.session import TrainingSession

DEFAULTS: dict[str, Any] = {
    "seq_length": 48,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "train_iters": 4,
    "lr": 1e-2,
    "lr_warmup_iters": 0,
    "lr_decay_style": "constant",
}


@dataclass(frozen=True)
class Tiny:
    """A model folder and the prefix of prepared rows."""

    model: Path
    data: Path

    def words(self, **flags: Any) -> list[str]:
        """The command line: flags as keywords, True for a switch, None leaves a default of these tests out.

        LoRA of rank 4 unless ``lora_r=None``.
        """
        values = {"load": self.model, "data_path": self.data, "lora_r": 4, **DEFAULTS, **flags}
        words: list[str] = []
        for name, value in values.items():
            if value is None or value is False:
                continue
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
        return words


def plan(words: list[str]) -> TrainPlan:
    """The plan of a command line of posttrain_gpt.py."""
    return plan_training(parse("posttrain", words))


def join(tp: int = 1, pp: int = 1) -> ParallelGroups:
    """The groups of the ranks that a function of the pool runs on."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, distributed_timeout_minutes=3
    )
    return initialize_groups(parallel, seed=1)[0]


def open_session(words: list[str], groups: ParallelGroups) -> TrainingSession:
    """The live parts of the job of a command line."""
    return TrainingSession(plan(words), groups)
