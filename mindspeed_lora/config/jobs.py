"""The configuration of each command: its sections, checked and resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mindspeed_lora.config.checkpoint import CheckpointConfig, LoadConfig
from mindspeed_lora.config.conversion import ConversionConfig
from mindspeed_lora.config.data import DataConfig
from mindspeed_lora.config.evaluation import EvaluationConfig
from mindspeed_lora.config.inference import ComputeFlags, InferenceConfig
from mindspeed_lora.config.inspection import InspectConfig, VerifyConfig
from mindspeed_lora.config.layout_plan import LayoutPlanConfig, MachineConfig
from mindspeed_lora.config.logging import LoggingConfig
from mindspeed_lora.config.lora import LoraConfig, LoraFlags
from mindspeed_lora.config.model import ModelConfig
from mindspeed_lora.config.moe import ExpertsConfig, RoutingConfig
from mindspeed_lora.config.parallel import ParallelConfig, StagesConfig
from mindspeed_lora.config.preprocess import PreprocessConfig, RawRowsConfig
from mindspeed_lora.config.quantization import ConversionQuantFlags, QuantFlags, TrainQuantFlags
from mindspeed_lora.config.runtime import FileRuntimeConfig, LaunchedRuntimeConfig, RuntimeConfig
from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every command's configuration has."""

    runtime: RuntimeConfig
    given: frozenset[str] = frozenset()
    """Names of the fields that the user gave; the others hold defaults."""
    notices: tuple[str, ...] = ()
    """Sentences for the user: defaults that were taken, flags without effect."""
    hub_ids: Mapping[str, str] = field(default_factory=dict)
    """Folders of hubs' snapshots that stand in the place of ids → the ids, with the commit where it is known."""


@dataclass(frozen=True, kw_only=True)
class TrainJob(Job):
    """``posttrain_gpt.py`` and ``pretrain_gpt.py``."""

    runtime: LaunchedRuntimeConfig
    model: ModelConfig
    experts: ExpertsConfig
    routing: RoutingConfig
    parallel: ParallelConfig
    lora: LoraConfig
    quantization: TrainQuantFlags
    data: DataConfig
    raw_rows: RawRowsConfig
    tokenizer: TokenizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig


@dataclass(frozen=True, kw_only=True)
class ConversionJob(Job):
    """``convert_ckpt.py``."""

    runtime: FileRuntimeConfig
    conversion: ConversionConfig
    stages: StagesConfig
    lora: LoraFlags
    quantization: ConversionQuantFlags
    model: ModelConfig
    experts: ExpertsConfig


@dataclass(frozen=True, kw_only=True)
class InspectJob(Job):
    """``convert_ckpt.py inspect``."""

    inspect: InspectConfig


@dataclass(frozen=True, kw_only=True)
class VerifyJob(Job):
    """``convert_ckpt.py verify``."""

    verify: VerifyConfig


@dataclass(frozen=True, kw_only=True)
class PreprocessJob(Job):
    """``preprocess_data.py``."""

    runtime: FileRuntimeConfig
    preprocess: PreprocessConfig
    tokenizer: TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class LayoutPlanJob(Job):
    """``tools/plan.py``."""

    plan: LayoutPlanConfig
    machine: MachineConfig
    lora: LoraConfig
    quantization: QuantFlags


@dataclass(frozen=True, kw_only=True)
class ModelJob(Job):
    """A command that runs a model without training it."""

    runtime: LaunchedRuntimeConfig
    model: ModelConfig
    experts: ExpertsConfig
    parallel: ParallelConfig
    lora: LoraConfig
    quantization: QuantFlags
    tokenizer: TokenizerConfig
    checkpoint: LoadConfig

    @property
    def compute(self) -> ComputeFlags:
        """The section with seed, dtype and the longest row."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class InferenceJob(ModelJob):
    """``inference.py``."""

    inference: InferenceConfig

    @property
    def compute(self) -> ComputeFlags:
        """The section with seed, dtype and the longest row."""
        return self.inference


@dataclass(frozen=True, kw_only=True)
class EvaluationJob(ModelJob):
    """``evaluation.py``."""

    evaluation: EvaluationConfig

    @property
    def compute(self) -> ComputeFlags:
        """The section with seed, dtype and the longest row."""
        return self.evaluation
