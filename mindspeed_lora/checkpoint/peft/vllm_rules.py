"""Whether vLLM serves an adapter, by its published rules, and the command that does.

The rules are those of vLLM's ``PEFTHelper``, ``LoRAConfig`` and ``LoRAModel``: plain LoRA and rsLoRA, no
``modules_to_save``, no bias, a rank of at most ``--max-lora-rank``, factors of modules that the served model has.
It takes r and alpha from the configuration for every module, so that patterns which scale a module otherwise
would be served wrongly. Experts of Mixtral, Qwen, DeepSeek and GLM are modules of their own there (``experts.7.w1``),
each with all three; kv_b_proj of latent attention is passed over in decoding.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.peft.config import AdapterConfig

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``--max-lora-rank`` takes."""

BASE_PLACEHOLDER = "BASE_MODEL"
"""Stands in the command for a base model that the adapter does not name."""

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
_PACKED = ("qkv_proj", "gate_up_proj", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "W_pack")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
_INTERNLM = ("wqkv", "wo", "w1", "w2", "w3", "output")
_LINEAR_MODULES = frozenset((*_LINEARS, *_PACKED, *_LATENT, *_INTERNLM))
_EMBEDDINGS = frozenset(("embed_tokens", "tok_embeddings", "word_embeddings"))
_EXPERT = re.compile(r".+\.experts\.\d+")
_STACKED = re.compile(r".+\.experts(\.base_layer)?")
_MATRICES_OF_EXPERT = 3
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<kind>lora|lora_embedding)_[AB](?:\.weight)?"
)


def reasons_against(
    values: Mapping[str, Any], names: Iterable[str], config: AdapterConfig | None
) -> list[str]:
    """Why vLLM would not serve an adapter as it was trained; empty where it does.

    Args:
        values: the parsed ``adapter_config.json``.
        names: of the tensors in its file.
        config: the same configuration as this program understands it; None where it does not.
    """
    names = list(names)
    reasons = [text for text in (_of_the_whole(values), *_of_names(names)) if text]
    if values.get("modules_to_save"):
        reasons.append(f"modules_to_save is {values['modules_to_save']!r}; vLLM takes none")
    if values.get("bias", "none") != "none":
        reasons.append(f"bias is {values['bias']!r}; vLLM takes adapters without biases")
    if values.get("trainable_token_indices"):
        reasons.append("trainable_token_indices: vLLM takes no rows of single tokens")
    if config is not None:
        reasons += _of_patterns(config, names)
    rank = largest_rank(values)
    if rank > MAX_LORA_RANKS[-1]:
        reasons.append(f"rank {rank} is above {MAX_LORA_RANKS[-1]}, the largest --max-lora-rank")
    return reasons


def largest_rank(values: Mapping[str, Any]) -> int:
    """The largest rank that any module can have."""
    return max([int(values.get("r") or 0), *map(int, (values.get("rank_pattern") or {}).values())])


def max_lora_rank(rank: int) -> int | None:
    """The smallest permitted ``--max-lora-rank`` that holds a rank; None where there is none."""
    return next((one for one in MAX_LORA_RANKS if one >= rank), None)


def serve_command(folder: Path, base: str | None, rank: int) -> str:
    """The whole ``vllm serve`` line of an adapter folder."""
    full = folder.absolute()
    # A training's adapter lies in <save>/iter_%07d/adapter or <save>/adapter.
    parts = [part for part in full.parts if part != "adapter" and not re.fullmatch(r"iter_\d+", part)]
    name = re.sub(r"[^\w.-]", "-", parts[-1]).strip("-") or "adapter"
    words = ["vllm", "serve", base or BASE_PLACEHOLDER, "--enable-lora"]
    words += ["--lora-modules", f"{name}={full}", "--max-lora-rank", str(max_lora_rank(rank))]
    return shlex.join(words)


def _of_the_whole(values: Mapping[str, Any]) -> str | None:
    if values.get("use_dora"):
        return "use_dora is true; vLLM does not support DoRA"
    return None


def _of_names(names: Iterable[str]) -> list[str]:
    """What is wrong with the tensors' names: no factors, or factors of modules that vLLM does not adapt."""
    other, wrong = [], []
    stacked = False
    experts: dict[str, set[str]] = {}
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match is None:
            # vLLM passes over the frozen vocabulary that PEFT keeps beside a resized one.
            if not name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
                other.append(name)
            continue
        place, _, module = match["module"].rpartition(".")
        if _EXPERT.fullmatch(place):
            experts.setdefault(place, set()).add(module)
        if _STACKED.fullmatch(match["module"]):
            stacked = True
            continue
        allowed = _EMBEDDINGS if match["kind"] == "lora_embedding" else _LINEAR_MODULES
        if module not in allowed:
            wrong.append(module)
    reasons = []
    if stacked:
        reasons.append(
            "experts are adapted as one parameter of a layer, and vLLM takes a module for each; write it with "
            "--peft-moe-format per-expert"
        )
    partly = [place for place, modules in experts.items() if len(modules) < _MATRICES_OF_EXPERT]
    if partly:
        reasons.append(f"experts without factors on all three of their matrices: {first_few(partly)}")
    if other:
        reasons.append(f"tensors that are no factors: {first_few(other)}")
    if wrong:
        reasons.append(f"modules that vLLM does not adapt: {first_few(sorted(set(wrong)))}")
    return reasons


def _of_patterns(config: AdapterConfig, names: Iterable[str]) -> list[str]:
    """Patterns by which a module is scaled otherwise than r and alpha say, which is all that vLLM looks at."""
    usual = config.alpha / (config.r**0.5 if config.use_rslora else config.r)
    modules = dict.fromkeys(
        match["module"]
        for name in names
        if (match := _FACTOR.fullmatch(name)) is not None and not _STACKED.fullmatch(match["module"])
    )
    other = [module for module in modules if config.scaling_of(module) != usual]
    if not other:
        return []
    first = other[0]
    return [
        f"rank_pattern or alpha_pattern scales {len(other)} of {len(modules)} modules otherwise "
        f"({first} by {config.scaling_of(first):g}), and vLLM scales all by {usual:g}"
    ]
