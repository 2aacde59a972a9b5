"""The adapter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, PROBABILITY, Section, flag

MOE_FORMATS = ("per-expert", "fused")
LORA_NAMES = ("lora_target_modules", "lora_exclude_modules")
"""The fields that name linears."""
OLD_NAMES = {
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}
"""Names of Megatron's older layers → those of megatron-core."""
_LIST_OF_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+,?")
FUSION_PLANS = ("auto", "one-collective", "overlapped")
FUSION_WEIGHTS = ("merge", "split")


def listed_names(words: Iterable[str]) -> Iterator[str]:
    """The names of linears in words that may be lists with commas; a regular expression stays whole."""
    for word in words:
        yield from filter(None, word.split(",")) if _LIST_OF_NAMES.fullmatch(word) else (word,)


@dataclass(frozen=True, kw_only=True)
class LoraFlags(Section):
    """LoRA's knobs but for where an adapter is read: a job starts from one, a conversion takes several."""

    lora_r: int | None = flag("rank; left out: that of --lora-load, else 16", check=AT_LEAST_ONE)
    lora_alpha: int | None = flag(
        "scaling is alpha / r; left out: that of --lora-load, else 2 r", check=POSITIVE
    )
    lora_dropout: float | None = flag(
        "dropout of the adapter's input; left out: that of --lora-load, else 0", check=PROBABILITY
    )
    lora_target_modules: tuple[str, ...] | None = flag(
        "what gets an adapter: Megatron names, whose matrices share one A (linear_qkv linear_proj linear_fc1 "
        "linear_fc2, the last two of dense, experts' and shared experts' MLPs alike; experts.linear_fc1, router), "
        "Hugging Face names, each for itself (q_proj), all-linear, or regular expressions over full names (left out: "
        "those of --lora-load, else all four linears)",
        metavar="NAME",
    )
    lora_exclude_modules: tuple[str, ...] | None = flag(
        "what gets none although --lora-target-modules names it; the same kinds of names", metavar="NAME"
    )
    lora_layers_to_transform: tuple[int, ...] | None = flag(
        "only these layers get an adapter, counted from 0", check=NOT_NEGATIVE, metavar="LAYER"
    )
    lora_layers_pattern: tuple[str, ...] | None = flag(
        "with --lora-layers-to-transform: name of the list of layers, where it is not found by itself",
        metavar="NAME",
    )
    lora_rank_pattern: dict[str, int] | None = flag(
        'other ranks, by PEFT\'s rules of names: \'{"v_proj": 32, "layers.0.mlp.up_proj": 4}\'',
        check=AT_LEAST_ONE,
        metavar="JSON",
    )
    lora_alpha_pattern: dict[str, float] | None = flag(
        "other alphas, as --lora-rank-pattern", check=POSITIVE, metavar="JSON"
    )
    use_rslora: bool = flag("scaling is alpha / √r (rank-stabilised LoRA)", False)
    lora_bias: str | None = flag(
        "biases of the base that are trained with the adapter: none, all, or those of the modules that carry it "
        "(left out: as --lora-load says, else none)",
        choices=("none", "all", "lora_only"),
    )
    lora_modules_to_save: tuple[str, ...] | None = flag(
        "modules of the base that are trained whole and saved with the adapter: embedding, output layer, norms …, by "
        "Megatron's or Hugging Face's names or expressions",
        metavar="NAME",
    )
    lora_ensure_weight_tying: bool = flag(
        "keep a tied embedding and output layer tied where --lora-modules-to-save trains them", False
    )
    lora_fusion: bool = flag("hide communication behind products and send less of it (docs/cclora.md)", False)
    lora_fusion_plan: tuple[str, ...] | None = flag(
        "schedule of --lora-fusion: auto (left out), one-collective or overlapped (CCLoRA as published), then if "
        "wanted merge (multiply by W + BA) or split",
        choices=FUSION_PLANS + FUSION_WEIGHTS,
        metavar="PLAN",
    )
    lora_fusion_chunks: int | None = flag(
        "one-collective: chunks in which a micro-batch travels while it is computed; 0: it arrives first (left out: by "
        "the cost model)",
        check=NOT_NEGATIVE,
    )
    lora_fusion_interleave: bool = flag(
        "one-collective: two halves of a micro-batch go through each layer, one computed while the other travels",
        False,
    )
    lora_ckpt_filter: bool = flag("save only the adapter (the default here)", False)
    lora_save_base: bool = flag("save the frozen model with each checkpoint too", False)
    lora_moe_shared: bool = flag(
        "one pair of factors for all experts of a layer and linear, in place of one for each", False
    )
    peft_moe_format: str | None = flag(
        "how a PEFT adapter that is written has experts: a module for each (transformers 4), or one parameter for all "
        "of a layer (transformers 5, target_parameters); left out: as the installed transformers load it",
        choices=MOE_FORMATS,
    )
    lora_save_dtype: str | None = flag(
        "dtype of the saved PEFT adapter; left out: fp32", choices=("fp32", "bf16", "fp16")
    )

    @property
    def enabled(self) -> bool:
        """Whether an adapter is trained or applied: any LoRA flag was given."""
        return any(getattr(self, field.name) != field.default for field in dataclasses.fields(self))


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LoraFlags):
    """What a job trains or applies; any of its flags switches LoRA on, none of them trains all parameters."""

    lora_load: str | None = flag(
        "adapter to start from: a PEFT folder, a --save folder or one of its iter_*, or a Megatron checkpoint with "
        "factors in it"
    )
