"""The layout that a run was saved in, and what changes when it goes on in another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.config.stages import LayerPlacement

_WORDS = {
    "tp": "tensor parallel",
    "pp": "pipeline parallel",
    "cp": "context parallel",
    "dp": "data parallel",
    "stages": "layers by stage",
}
"""Fields whose names say too little."""
_OF_THE_UPDATE_ALONE = ("distributed_optimizer",)
"""What has no part in the forward pass."""


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """How a run is cut over processes."""

    tp: int
    pp: int
    cp: int
    dp: int
    stages: str
    """The layers of every pipeline rank, as :meth:`LayerPlacement.describe` says it."""
    sequence_parallel: bool
    distributed_optimizer: bool
    micro_batch_size: int

    @classmethod
    def of(cls, job: TrainJob, placement: LayerPlacement, dp_size: int) -> RunLayout:
        """Of a job."""
        parallel = job.parallel
        return cls(
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            cp=parallel.context_parallel_size,
            dp=dp_size,
            stages=placement.describe(),
            sequence_parallel=parallel.sequence_parallel,
            distributed_optimizer=parallel.use_distributed_optimizer,
            micro_batch_size=job.training.micro_batch_size,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dataclasses.asdict(self)

    def changes(self, saved: Mapping[str, Any]) -> list[str]:
        """What was otherwise where a checkpoint was saved, in words; what that does not tell is passed over."""
        return [
            f"{_WORDS.get(name, name.replace('_', ' '))} {_word(saved[name])} → {_word(now)}"
            for name, now in self.state().items()
            if saved.get(name, now) != now
        ]

    def keeps_random_states(self, saved: Mapping[str, Any]) -> bool:
        """Whether each rank draws for what it drew for before: the same part of the model, the same rows."""
        here = self.state()
        return all(
            saved.get(name, here[name]) == here[name] for name in here if name not in _OF_THE_UPDATE_ALONE
        )


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
