"""LoRA flags beside an adapter's files: what is given and is not what the files say is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.description import hf_linears
from mindspeed_lora.checkpoint.peft.expert_names import PER_EXPERT
from mindspeed_lora.checkpoint.peft.flags import excluded_modules, peft_pattern, targeted_modules
from mindspeed_lora.checkpoint.peft.moe_form import Linears
from mindspeed_lora.checkpoint.peft.rules import is_kept_from_adapters, layer_index, matcher
from mindspeed_lora.checkpoint.peft.saved_modules_flag import hf_modules, peft_modules_to_save
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused


def refuse_contradictions(
    lora: LoraFlags, config: AdapterConfig, modules: Collection[str], shape: ModelShape
) -> None:
    """Refuse flags that contradict an adapter.

    Args:
        lora: the flags.
        config: the adapter's.
        modules: full Hugging Face names of the modules that carry it.
        shape: of its model without the adapter.
    """
    linears = hf_linears(shape)
    differing = [
        *_differing(lora, config, modules, linears),
        *_differing_patterns(lora, config, modules, linears),
        *_differing_trained(lora, config, shape),
    ]
    if differing:
        raise Refused(
            f"{', '.join(differing)}: contradicting {config.path}; leave out what the adapter tells"
        )


def _differing(
    lora: LoraFlags, config: AdapterConfig, modules: Collection[str], linears: Linears
) -> Iterator[str]:
    """Each flag that contradicts, with both values."""
    if lora.lora_r not in (None, config.r):
        yield f"--lora-r {lora.lora_r} (the adapter has {config.r})"
    if lora.lora_alpha not in (None, config.alpha):
        yield f"--lora-alpha {lora.lora_alpha} (the adapter has {config.alpha:g})"
    if lora.use_rslora and not config.use_rslora:
        yield "--use-rslora (the adapter's scaling is alpha / r)"
    targets = lora.lora_target_modules
    if targets is not None and _still_named(lora, config, linears) != set(modules):
        found = dict.fromkeys(module.rpartition(".")[2] for module in modules)
        yield f"--lora-target-modules {' '.join(targets)} (the adapter is on {' '.join(found)})"
    excluded = lora.lora_exclude_modules
    if excluded is not None and excluded_modules(excluded, linears) != config.exclude_modules:
        yield f"--lora-exclude-modules {' '.join(excluded)} (the adapter has {config.exclude_modules})"
    layers = lora.lora_layers_to_transform
    if layers is not None and set(layers) != set(config.layers):
        found_layers = " ".join(map(str, config.layers)) or "none"
        yield f"--lora-layers-to-transform {' '.join(map(str, layers))} (the adapter has {found_layers})"


def _still_named(lora: LoraFlags, config: AdapterConfig, linears: Linears) -> set[str]:
    """What ``--lora-target-modules`` means, without what the adapter's exclusions and layers leave out."""
    excluded = matcher(config.exclude_modules or ())
    return {
        module
        for module in targeted_modules(lora.lora_target_modules or (), linears)
        if not (config.exclude_modules is not None and excluded(module))
        and not is_kept_from_adapters(config.modules_to_save, config.stored_name(module))
        and (not config.layers or layer_index(module, config.layer_lists) in config.layers)
    }


def _differing_trained(lora: LoraFlags, config: AdapterConfig, shape: ModelShape) -> Iterator[str]:
    """Of what is trained beside the factors."""
    if lora.lora_bias not in (None, config.bias):
        yield f"--lora-bias {lora.lora_bias} (the adapter has {config.bias})"
    if lora.lora_ensure_weight_tying and not config.ensure_weight_tying:
        yield "--lora-ensure-weight-tying (the adapter is without)"
    if lora.lora_modules_to_save is None:
        return
    given = dataclasses.replace(
        config, modules_to_save=peft_modules_to_save(lora.lora_modules_to_save, shape), moe_format=PER_EXPERT
    )
    if any(given.saves(module) != config.saves(module) for module in hf_modules(shape)):
        found = " ".join(config.modules_to_save) or "none"
        yield f"--lora-modules-to-save {' '.join(lora.lora_modules_to_save)} (the adapter has {found})"


def _differing_patterns(
    lora: LoraFlags, config: AdapterConfig, modules: Collection[str], linears: Linears
) -> Iterator[str]:
    # The flags name each expert's matrices, in whatever form the adapter is.
    by_module = dataclasses.replace(
        config, moe_format=PER_EXPERT, target_parameters=(), separate_gate_up=False
    )
    if lora.lora_rank_pattern is not None:
        ranks = peft_pattern("--lora-rank-pattern", lora.lora_rank_pattern, linears, modules)
        given = dataclasses.replace(by_module, rank_pattern=ranks)
        if any(given.rank_of(module) != config.rank_of(module) for module in modules):
            yield f"--lora-rank-pattern {lora.lora_rank_pattern} (the adapter has {dict(config.rank_pattern)})"
    if lora.lora_alpha_pattern is not None:
        alphas = peft_pattern("--lora-alpha-pattern", lora.lora_alpha_pattern, linears, modules)
        given = dataclasses.replace(by_module, alpha_pattern=alphas)
        if any(given.alpha_of(module) != config.alpha_of(module) for module in modules):
            yield f"--lora-alpha-pattern {lora.lora_alpha_pattern} (the adapter has {dict(config.alpha_pattern)})"
