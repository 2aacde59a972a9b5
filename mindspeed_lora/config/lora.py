"""The adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, POSITIVE, PROBABILITY, Section, flag


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """LoRA's knobs; any of them switches LoRA on, none of them trains all parameters."""

    lora_r: int | None = flag("rank; left out: that of --lora-load, else 16", check=AT_LEAST_ONE)
    lora_alpha: int | None = flag(
        "scaling is alpha / r; left out: that of --lora-load, else 2 r", check=POSITIVE
    )
    lora_dropout: float = flag("dropout of the adapter's input", 0.0, check=PROBABILITY)
    lora_target_modules: tuple[str, ...] | None = flag(
        "linears that get an adapter: linear_qkv linear_proj linear_fc1 linear_fc2 (left out: those of "
        "--lora-load, else all four)",
        metavar="NAME",
    )
    lora_load: str | None = flag("adapter to start from: a PEFT folder, a --save folder or one of its iter_*")
    lora_fusion: bool = flag("overlap the adapter's communication (accepted; the plain schedule runs)", False)
    lora_ckpt_filter: bool = flag("save only the adapter (the default here)", False)
    lora_save_base: bool = flag("save the frozen model with each checkpoint too", False)
    lora_save_dtype: str | None = flag(
        "dtype of the saved PEFT adapter; left out: fp32", choices=("fp32", "bf16", "fp16")
    )

    @property
    def enabled(self) -> bool:
        """Whether an adapter is trained or applied: any LoRA flag was given."""
        return any(getattr(self, field.name) != field.default for field in dataclasses.fields(self))
