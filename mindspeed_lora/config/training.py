"""Length, batch, optimizer, precision and recomputation of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mindspeed_lora.config.flags import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Check,
    Section,
    flag,
)
from mindspeed_lora.errors import Refused

_OTHER_STAGES = {
    **dict.fromkeys(("dpo", "simpo"), "preference training is"),
    **dict.fromkeys(("rm", "orm", "prm"), "the training of reward models is"),
    **dict.fromkeys(("trl_ppo", "ray_ppo", "ray_online_dpo", "ray_grpo"), "reinforcement learning is"),
}
_EVAL_ITERS = Check(
    "an integer of at least 0, or -1 for the whole validation part", lambda value: value >= -1
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """One run; exactly one of ``train_iters``, ``train_samples`` and ``epochs`` is set after parsing."""

    stage: str = flag(
        "objective; pretrain is what pretrain_gpt.py trains",
        "sft",
        choices=("sft", "pretrain"),
        not_built=_OTHER_STAGES,
    )
    micro_batch_size: int = flag("rows that one rank computes at once", 1, check=AT_LEAST_ONE)
    global_batch_size: int = flag("rows of one optimizer step over all ranks", 16, check=AT_LEAST_ONE)
    train_iters: int | None = flag("length of the run in optimizer steps", check=AT_LEAST_ONE)
    train_samples: int | None = flag("length of the run in rows", check=AT_LEAST_ONE)
    epochs: float | None = flag(
        "length of the run in passes over the data (left out with the others: 3)", check=POSITIVE
    )

    lr: float = flag("highest learning rate", 1e-4, check=NOT_NEGATIVE)
    min_lr: float = flag("learning rate at the end of the decay", 0.0, check=NOT_NEGATIVE)
    lr_decay_style: str = flag("shape of the decay", "cosine", choices=("cosine", "linear", "constant"))
    lr_decay_iters: int | None = flag("steps of the decay; left out: the whole run", check=AT_LEAST_ONE)
    lr_warmup_fraction: float | None = flag(
        "share of --lr-decay-iters with a rising learning rate (left out with --lr-warmup-iters: 0.03)",
        check=PROBABILITY,
    )
    lr_warmup_iters: int | None = flag("steps with a rising learning rate", check=NOT_NEGATIVE)
    weight_decay: float = flag("decoupled weight decay, on every trained parameter", 0.01, check=NOT_NEGATIVE)
    clip_grad: float = flag("largest global gradient norm; 0: no clipping", 1.0, check=NOT_NEGATIVE)
    adam_beta1: float = flag("decay of Adam's first moment", 0.9, check=PROBABILITY)
    adam_beta2: float = flag("decay of Adam's second moment", 0.999, check=PROBABILITY)
    adam_eps: float = flag("Adam's epsilon", 1e-8, check=NOT_NEGATIVE)

    bf16: bool = flag("compute in bfloat16", False)
    fp16: bool = flag("compute in float16 with loss scaling", False)
    loss_scale: float | None = flag("fixed loss scale of --fp16; left out: dynamic", check=POSITIVE)
    initial_loss_scale: float = flag("first dynamic loss scale of --fp16", 2.0**32, check=POSITIVE)
    min_loss_scale: float = flag("smallest dynamic loss scale", 1.0, check=POSITIVE)
    loss_scale_window: int = flag(
        "steps without overflow before the loss scale doubles", 1000, check=AT_LEAST_ONE
    )
    hysteresis: int = flag("overflows before the loss scale is halved", 2, check=AT_LEAST_ONE)
    paged_optimizer: bool = flag(
        "keep the optimizer's state in host memory (on the CPU in a file) and page it in as it is needed",
        False,
        names=("--paged-optimizer", "--swap-optimizer"),
    )
    paged_optimizer_dir: str | None = flag(
        "folder of the file of --paged-optimizer; left out: --save, else the system's folder of temporary files",
        metavar="DIR",
    )
    loss_normalization: str = flag(
        "mean over all loss-carrying tokens of the global batch, or mean of micro-batch means",
        "token",
        choices=("token", "micro-batch"),
    )
    calculate_per_token_loss: bool = flag("the same as --loss-normalization token", False)

    recompute_granularity: str | None = flag(
        "recompute activations in the backward pass: whole layers, or core attention",
        choices=("full", "selective"),
    )
    recompute_activations: bool = flag("the same as --recompute-granularity selective", False)
    recompute_method: str | None = flag(
        "with full: chunks of --recompute-num-layers, or that many layers of each stage",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = flag("layers a chunk (uniform) or a stage (block)", check=AT_LEAST_ONE)

    seed: int = flag("seed of data order, starting values and dropout", 1234, check=NOT_NEGATIVE)
    eval_interval: int = flag("steps between evaluations", 1000, check=AT_LEAST_ONE)
    eval_iters: int = flag("global batches an evaluation; 0: none, -1: the whole part", 0, check=_EVAL_ITERS)
    early_stopping_patience: int | None = flag(
        "stop after this many evaluations without a better loss", check=AT_LEAST_ONE
    )
    exit_duration_in_mins: float | None = flag("save and leave after this many minutes", check=POSITIVE)
    exit_interval: int | None = flag(
        "save and leave after a step whose number is a multiple of this", check=AT_LEAST_ONE
    )
    no_check_for_nan_in_loss_and_grad: bool = flag(
        "go on after a step whose loss or gradient is not finite; nothing is updated in it", False
    )
    manual_gc: bool = flag("collect Python's garbage only every --manual-gc-interval steps", False)
    manual_gc_interval: int = flag("steps between collections; 0: none", 0, check=NOT_NEGATIVE)

    @property
    def params_dtype(self) -> str:
        """Name of the compute dtype: ``bfloat16``, ``float16`` or ``float32``."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run over a training part of ``num_samples`` rows."""
        if self.train_iters is not None:
            return self.train_iters
        if self.train_samples is not None:
            return math.ceil(self.train_samples / self.global_batch_size)
        if self.epochs is None:
            raise ValueError(
                "the length of the run is not resolved: none of train_iters, train_samples, epochs"
            )
        return math.ceil(self.epochs * num_samples / self.global_batch_size)

    def decay_steps(self, num_steps: int) -> int:
        """Steps after which the learning rate has reached ``min_lr``, for a run of ``num_steps``."""
        return num_steps if self.lr_decay_iters is None else self.lr_decay_iters

    def warmup_steps(self, num_steps: int) -> float:
        """Steps of the rising learning rate, for a run of ``num_steps``; a fraction is not rounded."""
        decay = self.decay_steps(num_steps)
        if self.lr_warmup_iters is None:
            return (self.lr_warmup_fraction or 0.0) * decay
        if self.lr_warmup_iters and self.lr_warmup_iters >= decay:
            raise Refused(
                f"--lr-warmup-iters {self.lr_warmup_iters} must be below the {decay} steps of the decay; "
                "lower it or raise --lr-decay-iters or the length of the run"
            )
        return float(self.lr_warmup_iters)
