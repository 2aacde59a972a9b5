"""How the model and the batch are cut over processes."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, POSITIVE, Section, flag
from mindspeed_lora.errors import Refused


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Degrees of parallelism; what tensor and pipeline parallelism leave of the world is data parallel."""

    tensor_model_parallel_size: int = flag("ranks that share each layer's matrices", 1, check=AT_LEAST_ONE)
    pipeline_model_parallel_size: int = flag("stages that the layers are cut into", 1, check=AT_LEAST_ONE)
    sequence_parallel: bool = flag(
        "cut norms, dropout and residuals along the sequence (no effect at TP 1)", False
    )
    use_distributed_optimizer: bool = flag("cut the optimizer state over data-parallel ranks", False)
    distributed_backend: str | None = flag(
        "communication library; left out: nccl with CUDA, else gloo", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = flag(
        "minutes after which a rank gives up waiting for its peers", 10.0, check=POSITIVE
    )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model together, TP × PP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a world of that size; refused when it does not fit TP × PP."""
        if world_size % self.model_parallel_size:
            raise Refused(
                f"world size {world_size} is not divisible by --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} = {self.model_parallel_size}; "
                f"start a multiple of {self.model_parallel_size} processes"
            )
        return world_size // self.model_parallel_size
