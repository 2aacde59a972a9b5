"""Random weights as a source: what a job without ``--load`` starts from, the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from mindspeed_lora.adapters.initial import generator_for
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.formats.model_files import is_without_weights
from mindspeed_lora.checkpoint.source import CheckpointSource
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.segments import Range


def shape_alone(path: str, notices: list[str]) -> RandomSource | None:
    """For a dry run: the model of a Hugging Face folder without weights; None where it has some."""
    folder = Path(path)
    if not is_without_weights(folder):
        return None
    notices.append(f"--load {path} holds no weights: planned from its config.json")
    return RandomSource(shape_of(folder), 0, 0.0, folder)


class RandomSource(CheckpointSource):
    """Megatron's starting values: N(0, σ), norms 1, biases 0; ``linear_proj`` and ``linear_fc2`` N(0, σ/√2L)."""

    def __init__(self, shape: ModelShape, seed: int, std: float, config_dir: Path | None = None) -> None:
        super().__init__(Path("random weights"), shape, origin=None, config_dir=config_dir)
        self.seed = seed
        self.std = std

    def dtype(self, name: str) -> torch.dtype:
        """Drawn in float32."""
        return torch.float32

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        """Draws the whole tensor from the seed and its name, and cuts the ranges out."""
        value = self._draw(name)
        for axis, ranges in enumerate(wanted):
            value = torch.cat([value.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis)
        out.copy_(value)

    def _draw(self, name: str) -> torch.Tensor:
        size = self.tensors[name]
        if name.endswith("layernorm.weight"):
            return torch.ones(size)
        if name.endswith("bias"):
            return torch.zeros(size)
        output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = self.std / math.sqrt(2 * self.shape.num_layers) if output else self.std
        return torch.empty(size).normal_(0.0, std, generator=generator_for(self.seed, name))
