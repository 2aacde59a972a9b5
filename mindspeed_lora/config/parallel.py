"""How the model and the batch are cut over processes."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, POSITIVE, Check, Section, flag
from mindspeed_lora.errors import Refused

_STAGE_SIZES = Check(
    "numbers of layers of at least 1, one a stage, separated by commas",
    lambda text: all(word.strip().isdigit() and int(word) > 0 for word in text.split(",")),
)
_PLACES = Check(
    "different numbers of at least 0, separated by commas",
    lambda text: (
        all(word.strip().isdigit() for word in text.split(","))
        and len(set(map(int, text.split(",")))) == len(text.split(","))
    ),
)


@dataclass(frozen=True, kw_only=True)
class StagesConfig(Section):
    """How layers fall into pipeline stages, where not evenly."""

    num_layers_per_virtual_pipeline_stage: int | None = flag(
        "interleaved pipeline: layers of each of the chunks that a pipeline rank holds", check=AT_LEAST_ONE
    )
    num_virtual_stages_per_pipeline_rank: int = flag(
        "interleaved pipeline: chunks that a pipeline rank holds", 1, check=AT_LEAST_ONE
    )
    num_layer_list: str | None = flag(
        "layers of each pipeline stage, no-ops included, separated by commas", check=_STAGE_SIZES
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        "layers of the first pipeline stage; the other stages share the rest", check=AT_LEAST_ONE
    )
    decoder_last_pipeline_num_layers: int | None = flag(
        "layers of the last pipeline stage; the other stages share the rest", check=AT_LEAST_ONE
    )
    noop_layers: str | None = flag(
        "places, from 0, of layers that do nothing, separated by commas; they come to the checkpoint's layers",
        check=_PLACES,
    )

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """``--num-layer-list`` as numbers."""
        return tuple(map(int, self.num_layer_list.split(","))) if self.num_layer_list is not None else ()

    @property
    def noop_slots(self) -> tuple[int, ...]:
        """``--noop-layers`` as numbers."""
        return tuple(map(int, self.noop_layers.split(","))) if self.noop_layers is not None else ()


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(StagesConfig):
    """Degrees of parallelism; what tensor and pipeline parallelism leave of the world is data parallel."""

    tensor_model_parallel_size: int = flag("ranks that share each layer's matrices", 1, check=AT_LEAST_ONE)
    pipeline_model_parallel_size: int = flag("stages that the layers are cut into", 1, check=AT_LEAST_ONE)
    expert_model_parallel_size: int = flag("ranks that share the experts of a layer", 1, check=AT_LEAST_ONE)
    expert_tensor_parallel_size: int | None = flag(
        "ranks that share each expert's matrices; left out: --tensor-model-parallel-size", check=AT_LEAST_ONE
    )
    moe_tp_extend_ep: bool = flag(
        "tensor-parallel ranks share the experts instead of each expert's matrices: --expert-tensor-parallel-size 1",
        False,
    )
    context_parallel_size: int = flag("ranks that each row's positions are cut over", 1, check=AT_LEAST_ONE)
    context_parallel_algo: str = flag(
        "attention over cut rows: all-to-all over the heads, a ring of keys and values, or a ring of all-to-alls",
        "megatron_cp_algo",
        choices=("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"),
    )
    ulysses_degree_in_cp: int | None = flag("ranks of each all-to-all of hybrid_cp_algo", check=AT_LEAST_ONE)
    sequence_parallel: bool = flag(
        "cut norms, dropout and residuals along the sequence (no effect at TP 1)", False
    )
    use_distributed_optimizer: bool = flag("cut the optimizer state over data-parallel ranks", False)
    overlap_grad_reduce: bool = flag(
        "sum gradients over data-parallel ranks while the backward pass goes on", False
    )
    overlap_param_gather: bool = flag(
        "gather updated parameters while the forward pass goes on (with --use-distributed-optimizer)", False
    )
    ddp_bucket_size: int | None = flag(
        "parameters that --overlap-grad-reduce and --overlap-param-gather send at once; left out: an eighth of "
        "the trained ones, at least a million",
        check=AT_LEAST_ONE,
    )
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

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert's matrices."""
        if self.moe_tp_extend_ep:
            return 1
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that share the experts: with ``--moe-tp-extend-ep`` TP times more than the flag says."""
        extended = self.tensor_model_parallel_size if self.moe_tp_extend_ep else 1
        return self.expert_model_parallel_size * extended

    @property
    def context_degrees(self) -> tuple[int, int]:
        """Ranks of each all-to-all over the heads, and places of the ring; their product is the CP size."""
        size = self.context_parallel_size
        if self.context_parallel_algo == "megatron_cp_algo":
            return 1, size
        ulysses = size
        if self.context_parallel_algo == "hybrid_cp_algo":
            ulysses = self.ulysses_degree_in_cp or 1
        return ulysses, size // ulysses

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that compute other rows; refused when the world does not fit TP × PP × CP."""
        replica = self.model_parallel_size * self.context_parallel_size
        if world_size % replica:
            context = f"x --context-parallel-size {self.context_parallel_size} "
            raise Refused(
                f"world size {world_size} is not divisible by --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} {context if self.context_parallel_size > 1 else ''}"
                f"= {replica}; start a multiple of {replica} processes"
            )
        experts = self.expert_parallel_size * self.expert_tensor_size * self.pipeline_model_parallel_size
        if world_size % experts and (
            self.expert_parallel_size > 1 or self.expert_tensor_parallel_size is not None
        ):
            raise Refused(
                f"world size {world_size} is not divisible by expert-parallel size {self.expert_parallel_size} x "
                f"--expert-tensor-parallel-size {self.expert_tensor_size} x --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} = {experts}; start a multiple of {experts} processes, or cut "
                "the experts less"
            )
        return world_size // replica
