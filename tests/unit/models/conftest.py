"""Models of ours built from Hugging Face folders that transformers writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.loading.model import AdapterPlan, build_model
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.groups import ParallelGroups

BuildGpt = Callable[..., GPTModel]


@pytest.fixture
def build_gpt(groups: ParallelGroups) -> BuildGpt:
    """``build_gpt(folder, adapter=None, divisible_by=1, **training)``: the model of a folder, on one rank."""

    def build(
        folder: Path, adapter: AdapterPlan | None = None, divisible_by: int = 1, **training: Any
    ) -> GPTModel:
        source = open_source(folder)
        settings = TrainingConfig(**training)
        config = transformer_config(source.shape, ParallelConfig(), groups, torch.float32, settings)
        model, _ = build_model(source.shape, config, groups, source, adapter, divisible_by)
        return model

    return build
