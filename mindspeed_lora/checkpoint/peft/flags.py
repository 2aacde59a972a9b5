"""From the LoRA flags to an adapter's configuration in PEFT's form.

A name in ``--lora-target-modules``, ``--lora-exclude-modules`` or a pattern is one of these, tried in this order:

* ``all-linear``, PEFT's word for every linear of the layers;
* a Megatron name or the end of one (``linear_qkv``, ``mlp.linear_fc1``): the linear as one matrix; in a name the number
  of an expert can be left out (``experts.linear_fc1``), and ``linear_fc1`` is that of every MLP;
  with multi-latent attention ``linear_qkv``, ``linear_q`` and ``linear_kv`` mean linears of it;
* a Hugging Face name or the end of one (``q_proj``, ``experts.gate_proj``): that matrix alone, as PEFT has it;
* a regular expression over whole canonical names (``decoder\\.layers\\.[01]\\..*``): the linears that it means;
* a regular expression over whole Hugging Face names: the matrices that it means.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mindspeed_lora.checkpoint.canonical import EMBEDDING, ROUTER, linear_kind, of_all_experts
from mindspeed_lora.checkpoint.peft.chosen_names import shortest_names
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.description import FUSED, hf_linears
from mindspeed_lora.checkpoint.peft.expert_names import (
    is_expert,
    parameter_of,
    without_number,
)
from mindspeed_lora.checkpoint.peft.moe_form import Linears, chosen_moe_format
from mindspeed_lora.checkpoint.peft.rules import (
    Names,
    ends,
    faulty_expression,
    is_all_linear,
    is_suffix,
    matcher,
    pattern_key,
)
from mindspeed_lora.checkpoint.peft.saved_modules_flag import peft_modules_to_save
from mindspeed_lora.checkpoint.peft.trained_tensors import trained_tensors
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused

Number = TypeVar("Number", int, float)
_OF_LATENT_ATTENTION = {
    "linear_qkv": ("linear_q_down_proj", "linear_q_proj", "linear_kv_down_proj"),
    "linear_q": ("linear_q_proj", "linear_q_up_proj"),
    "linear_kv": ("linear_kv_up_proj",),
}
"""People's names on a model with multi-latent attention → the linears there are; ``linear_qkv`` is what MindSpeed-LLM
packs: all that reads the hidden states."""
_OF_THE_VOCABULARY = ("lm_head", "embed_tokens", "output_layer", "word_embeddings")


@dataclass(frozen=True)
class Meant:
    """What one name or expression of a flag means on a model."""

    whole: tuple[str, ...]
    """Canonical linears, each as one matrix."""
    matrices: tuple[str, ...]
    """Full Hugging Face names of matrices, each for itself."""
    own: Names | None = None
    """PEFT's names or expression for the same, where that is what the flag says; None: they are to be found."""

    def peft(self, linears: Linears) -> Names:
        """The same for PEFT: names, or one expression."""
        if self.own is not None:
            return self.own
        everything = [matrix for names in linears.values() for matrix in names]
        chosen = [*self.matrices, *(name for module in self.whole for name in linears[module])]
        return shortest_names(chosen, everything)

    def hf_modules(self, linears: Linears) -> set[str]:
        """Full Hugging Face names of all that is meant."""
        return {*self.matrices, *(name for module in self.whole for name in linears[module])}


def config_from_flags(
    lora: LoraFlags, shape: ModelShape, together: bool = True
) -> tuple[AdapterConfig, frozenset[str]]:
    """The configuration that the flags ask for, and the kinds of fused linears whose matrices share one A.

    Rank, alpha and targets are set: the command line's rules have filled in what the user left out. Without
    ``together`` no matrices share one A, however they are named.

    Raises:
        Refused: a name means nothing on the model, or names contradict each other.
    """
    assert lora.lora_r is not None and lora.lora_alpha is not None and lora.lora_target_modules is not None
    linears = hf_linears(shape)
    targets = _targets(lora.lora_target_modules, linears)
    shared = _shared(targets, linears) if together else frozenset()
    target_modules = _peft_names(targets, linears)
    _check_layers(lora, shape, target_modules)
    config = AdapterConfig(
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout or 0.0,
        use_rslora=lora.use_rslora,
        target_modules=target_modules,
        exclude_modules=excluded_modules(lora.lora_exclude_modules, linears),
        layers_to_transform=lora.lora_layers_to_transform,
        layers_pattern=lora.lora_layers_pattern,
        bias=lora.lora_bias or "none",
        modules_to_save=peft_modules_to_save(lora.lora_modules_to_save, shape),
        ensure_weight_tying=lora.lora_ensure_weight_tying,
    )
    _check_trained(config, shape)
    found = _found(config, targets, lora.lora_exclude_modules or (), linears)
    config = dataclasses.replace(
        config,
        rank_pattern=peft_pattern("--lora-rank-pattern", lora.lora_rank_pattern, linears, found),
        alpha_pattern=peft_pattern("--lora-alpha-pattern", lora.lora_alpha_pattern, linears, found),
    )
    if shape.moe is not None:
        separate = "experts.linear_fc1" not in shared
        config = chosen_moe_format(config, linears, lora.peft_moe_format, separate)
    return config, shared


def targeted_modules(names: Sequence[str], linears: Linears) -> set[str]:
    """Full Hugging Face names of what ``--lora-target-modules`` means."""
    return _hf_modules(_targets(names, linears), linears)


def _hf_modules(targets: Sequence[Meant], linears: Linears) -> set[str]:
    return {module for one in targets for module in one.hf_modules(linears)}


def _targets(names: Sequence[str], linears: Linears) -> list[Meant]:
    return [meaning(name, linears, "--lora-target-modules") for name in names]


def meaning(name: str, linears: Linears, flag: str) -> Meant:
    """What a name or expression means; by the order of this module's first lines."""
    matrices = [matrix for names in linears.values() for matrix in names]
    if is_all_linear(name):
        routers = {
            matrix for module, names in linears.items() if is_suffix(ROUTER, module) for matrix in names
        }
        wanted = tuple(matrix for matrix in matrices if matrix not in routers)
        return Meant((), wanted, None if routers else name.lower())
    whole = _whole_linears(name, linears)
    if whole:
        return Meant(whole, ())
    alone = tuple(matrix for matrix in matrices if is_suffix(name, matrix))
    if alone:
        return Meant((), alone, (name,))
    alone = tuple(matrix for matrix in matrices if is_suffix(name, without_number(matrix)))
    if alone:
        return Meant((), alone)
    fault = faulty_expression([name])
    if fault is not None:
        raise Refused(f"{flag}: {fault}, and no module has this name; {_there_are(linears)}")
    whole = tuple(module for module in linears if re.fullmatch(name, module))
    if whole:
        return Meant(whole, ())
    alone = tuple(matrix for matrix in matrices if re.fullmatch(name, matrix))
    if alone:
        return Meant((), alone, name)
    if name.rpartition(".")[2] in _OF_THE_VOCABULARY:
        raise Refused(
            f"{flag}: {name} gets no factors, which are for linears of the layers; leave it out, or train it whole by "
            "--lora-modules-to-save"
        )
    raise Refused(f"{flag}: the model has no module {name}; {_there_are(linears)}")


def _whole_linears(name: str, linears: Linears) -> tuple[str, ...]:
    """The linears that a Megatron name means, that of an experts' parameter, or a name for latent attention."""

    def is_meant(module: str) -> bool:
        if is_suffix(name, module) or is_suffix(name, of_all_experts(module)):
            return True
        first = linears[module][0]
        return is_expert(first) and is_suffix(name, parameter_of(first)) and len(linears[module]) > 1

    found = tuple(module for module in linears if is_meant(module))
    places = _OF_LATENT_ATTENTION.get(name.removeprefix("self_attention."))
    if found or places is None:
        return found
    return tuple(module for module in linears if module.rpartition(".")[2] in places)


def _there_are(linears: Linears) -> str:
    megatron = sorted({module.rpartition(".")[2] for module in linears})
    ours = ", ".join(megatron)
    theirs = ", ".join(dict.fromkeys(name.rpartition(".")[2] for names in linears.values() for name in names))
    return f"it has {ours} by Megatron's names, {theirs} by Hugging Face's"


def _peft_names(meant: Sequence[Meant], linears: Linears) -> Names:
    """``target_modules`` or ``exclude_modules`` of several names: one expression alone stays one."""
    if len(meant) == 1:
        return meant[0].peft(linears)
    everything = next((one.own for one in meant if one.own is not None and is_all_linear(one.own)), None)
    if everything is not None:
        return everything
    names: list[str] = []
    for one in meant:
        names += one.matrices if isinstance(one.own, str) else one.peft(linears)
    return tuple(dict.fromkeys(names))


def shared_by_name(names: Sequence[str], linears: Linears) -> frozenset[str]:
    """The fused linears that are named as one matrix; refused where their matrices are also named alone."""
    return _shared(_targets(names, linears), linears)


def _shared(targets: Sequence[Meant], linears: Linears) -> frozenset[str]:
    whole = {module for one in targets for module in one.whole if len(linears[module]) > 1}
    shared = {linear_kind(module) for module in whole}
    owners = {matrix: module for module, names in linears.items() for matrix in names}
    for matrix in (matrix for one in targets for matrix in one.matrices):
        linear, name = linear_kind(owners[matrix]), matrix.rpartition(".")[2]
        if linear in shared:
            raise Refused(
                f"--lora-target-modules: {linear} is one adapter for {_last(linears[owners[matrix]])}, and {name} one "
                "for itself; name either"
            )
    return frozenset(linear for linear in FUSED if linear in shared)


def _last(names: Sequence[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in names)


def _check_layers(lora: LoraFlags, shape: ModelShape, target_modules: Names) -> None:
    layers = lora.lora_layers_to_transform
    if layers is None:
        if lora.lora_layers_pattern is not None:
            raise Refused("--lora-layers-pattern says nothing without --lora-layers-to-transform; add it")
        return
    absent = [layer for layer in layers if layer >= shape.num_layers]
    if absent:
        raise Refused(
            f"--lora-layers-to-transform {absent[0]}: the model has the layers 0 to {shape.num_layers - 1}"
        )
    in_full = (
        [] if isinstance(target_modules, str) else [name for name in target_modules if ".layers." in name]
    )
    if isinstance(target_modules, str) or in_full:
        raise Refused(
            "--lora-layers-to-transform goes with names like q_proj or linear_qkv in --lora-target-modules; with an "
            "expression, all-linear or a name in full, say there which layers are meant"
        )
    fault = faulty_expression(lora.lora_layers_pattern or ())
    if fault is not None:
        raise Refused(f"--lora-layers-pattern: {fault}")


def excluded_modules(names: Sequence[str] | None, linears: Linears) -> Names | None:
    """``exclude_modules`` for what ``--lora-exclude-modules`` names."""
    if names is None:
        return None
    return _peft_names([meaning(name, linears, "--lora-exclude-modules") for name in names], linears)


def _check_trained(config: AdapterConfig, shape: ModelShape) -> None:
    """Refuses ``--lora-bias`` and ``--lora-ensure-weight-tying`` that change nothing."""
    trained = trained_tensors(config, shape)
    if config.bias != "none" and not any(tensor.name.endswith(".bias") for tensor in trained):
        where = " on the modules with an adapter" if config.bias == "lora_only" else ""
        raise Refused(f"--lora-bias {config.bias}: the model has no bias{where}; leave it out")
    if not config.ensure_weight_tying:
        return
    if shape.untie_embeddings_and_output_weights:
        raise Refused(
            "--lora-ensure-weight-tying: the model's output layer is not tied to its embedding; leave it out"
        )
    if not any(tensor.name == EMBEDDING for tensor in trained):
        raise Refused(
            "--lora-ensure-weight-tying: --lora-modules-to-save names neither embed_tokens nor lm_head; name one, or "
            "leave it out"
        )


def _found(
    config: AdapterConfig, targets: Sequence[Meant], excluded: Sequence[str], linears: Linears
) -> set[str]:
    """Full Hugging Face names of what gets an adapter; refused where nothing is left or excluded in vain."""
    found = {name for names in linears.values() for name in names if config.targets(name)}
    if not found:
        raise Refused(
            "the LoRA flags leave no module: --lora-exclude-modules, --lora-layers-to-transform and "
            "--lora-layers-pattern take away all that --lora-target-modules names"
        )
    names = config.exclude_modules
    if names is not None and not any(map(matcher(names), _hf_modules(targets, linears))):
        raise Refused(
            f"--lora-exclude-modules {' '.join(excluded)}: none of it is named by "
            "--lora-target-modules; leave it out"
        )
    return found


def peft_pattern(
    flag: str, given: Mapping[str, Number] | None, linears: Linears, found: Collection[str]
) -> dict[str, Number]:
    """A pattern for PEFT: a key that means no matrix but canonical linears is written as their matrices' names."""
    matrices = [matrix for names in linears.values() for matrix in names]
    found_ends = {end for name in found for end in ends(name)}
    pattern: dict[str, Number] = {}
    for key, value in (given or {}).items():
        fault = faulty_expression([key])
        if fault is not None:
            raise Refused(f"{flag}: {fault}")
        if any(pattern_key([key], matrix) for matrix in matrices):
            keys: tuple[str, ...] = (key,)
            touching = [key] if any(pattern_key([key], name) for name in found) else []
        else:
            keys = shortest_names(_meant_by_key(key, linears), matrices)
            touching = [one for one in keys if one in found_ends]
        if not touching:
            what = "none of the modules that get an adapter" if keys else "no module of the model"
            raise Refused(f"{flag}: {key!r} means {what}; {_there_are(linears)}")
        for one in touching:
            pattern.setdefault(one, value)
    return pattern


def _meant_by_key(key: str, linears: Linears) -> Iterator[str]:
    """The matrices of the canonical linears that a pattern's key means, or of experts whose number it leaves out."""
    for module, names in linears.items():
        if pattern_key([key], module) or pattern_key([key], of_all_experts(module)):
            yield from names
        else:
            yield from (name for name in names if pattern_key([key], without_number(name)))
