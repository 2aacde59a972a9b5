"""What both sides of a comparison train, and how; the same for each of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A short LoRA training, rows in file order."""

    model: str
    """A Hugging Face folder."""
    data: str
    rows: int | None = None
    """Rows of the file that are in use, from its start; None: all. A run that needs more starts again."""
    prompt_type: str = "chatml"
    seq_length: int = 512
    """Longer rows are cut."""
    global_batch_size: int = 8
    """Rows of an optimizer step, however a side cuts them into micro-batches."""
    packed_rows: int = 3
    """Rows of an optimizer step of a peer that packs the data set into rows of ``seq_length``: about as many
    tokens as in ``global_batch_size`` rows of the demo set."""
    pad_to_multiple_of: int = 8
    """A micro-batch is padded to its longest row, rounded up to a multiple of this."""
    rank: int = 16
    alpha: float = 32.0
    lr: float = 1e-4
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    seed: int = 1234
    threads: int = 2
    cuda: bool = False
    """On the CUDA device; else on the CPU, accelerators hidden."""
    bf16: bool = False
    """Weights and activations; else fp32."""
    warmup: int = 2
    """Steps before those that are measured."""
    steps: int = 10
    """Measured steps of a repetition."""

    @property
    def without_folders(self) -> Setting:
        """With the names of model and data alone: results that are kept tell nothing of a machine's folders."""
        return replace(self, model=Path(self.model).name, data=Path(self.data).name)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to see the device."""
        return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")} if self.cuda else {}

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a repetition."""
        return self.warmup + self.steps

    @property
    def num_samples(self) -> int:
        """Rows of a repetition."""
        return self.num_steps * self.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files that both sides read."""

    data_prefix: str
    """Prepared rows, as ours reads them."""
    rows_file: str
    """The same rows as JSON: a list of objects with ``input_ids`` and ``labels``."""
    start_adapter: str
    """A PEFT folder: the adapter from which both sides start."""
    tokenizer: str | None = None
    """Where a peer that must have one reads it; None: beside the model."""
    lengths: tuple[tuple[int, int], ...]
    """Tokens, and tokens that carry loss, of each row."""

    def sample(self, number: int) -> tuple[int, int]:
        """Tokens and loss-carrying tokens of sample ``number`` of a run, counted from 0."""
        return self.lengths[number % len(self.lengths)]
