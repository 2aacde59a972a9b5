"""Which of a model's weights are quantised, and how: decided from flags and headers, before anything is read.

Quantised are the linears of attention, MLPs, experts and shared experts; embeddings, output layer, norms and routers
never are, nor what an adapter trains of the base.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.canonical import adapter_linears, canonical_tensors, of_all_experts
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.peft.description import hf_linears
from mindspeed_lora.checkpoint.peft.flags import meaning
from mindspeed_lora.checkpoint.peft.rules import is_suffix
from mindspeed_lora.checkpoint.peft.saved_modules_flag import hf_modules
from mindspeed_lora.config.quantization import QuantFlags, QuantSettings
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from mindspeed_lora.checkpoint.source import Source

SKIP_FLAG = "--quant-skip-modules"

_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """What is held quantised."""

    settings: QuantSettings
    weights: frozenset[str]
    """Canonical names of the quantised weights (``decoder.layers.3.mlp.linear_fc1.weight``)."""
    notices: tuple[str, ...] = ()

    @cached_property
    def layer_kinds(self) -> dict[int, int]:
        """Layer → the first layer in which the same weights are quantised; layers without any are left out."""
        found: dict[int, set[str]] = {}
        for name in self.weights:
            if (match := _IN_LAYER.match(name)) is not None:
                found.setdefault(int(match[1]), set()).add(name[match.end() :])
        first: dict[frozenset[str], int] = {}
        return {layer: first.setdefault(frozenset(found[layer]), layer) for layer in sorted(found)}

    def covers(self, names: Collection[str]) -> bool:
        """Whether a parameter that is made of these canonical tensors is held quantised; all of them are, or none."""
        return any(name in self.weights for name in names)

    def describe(self) -> str:
        """For people: how, and how many weights."""
        return f"{self.settings}; {len(self.weights)} weights"

    def state(self) -> dict[str, Any]:
        """What a run keeps of it, to know the base again that its adapter was trained on."""
        return {**dataclasses.asdict(self.settings), "weights": len(self.weights)}


def plan_quantization(
    flags: QuantFlags, source: Source, shape: ModelShape, adapter: AdapterSpec | None
) -> QuantPlan | None:
    """What the flags and the checkpoint say together; None where nothing is quantised.

    Raises:
        Refused: the checkpoint is quantised and the flags do not say so or say it otherwise, or a linear would be
            quantised in part.
    """
    stored = source.quantization
    if not flags.quantises:
        if stored is not None:
            raise Refused(
                f"{source.path} holds quantised weights ({stored}), which only QLoRA trains and runs as they are; add "
                "--qlora, or convert it to a plain checkpoint with convert_ckpt.py"
            )
        return None
    if stored is not None:
        _check_stored(flags, stored, source)
    linears = adapter_linears(shape)
    names = {f"{module}.weight" for module in linears}
    if stored is not None:
        names = {name for name in names if source.is_quantized(name)}
    skipped = _skipped(flags.quant_skip_modules or (), shape)
    trained = {tensor.name for tensor in adapter.trained} & names if adapter is not None else set()
    notices = [f"trained and therefore not quantised: {first_few(sorted(trained))}"] if trained else []
    settings = stored or flags.settings()
    weights = names - {f"{module}.weight" for module in skipped} - trained
    _check_experts(weights, shape)
    return QuantPlan(settings=settings, weights=frozenset(weights), notices=tuple(notices))


def _check_stored(flags: QuantFlags, stored: QuantSettings, source: Source) -> None:
    """Refuse flags that say otherwise than a quantised checkpoint."""
    kind = "nf4" if flags.qlora_nf4 else flags.quant_type
    asked = {
        f"--quant-type {kind}": kind in (None, stored.kind),
        f"--quant-block-size {flags.quant_block_size}": flags.quant_block_size in (None, stored.block_size),
        "--quant-double": not flags.quant_double or stored.double,
    }
    for words, agrees in asked.items():
        if not agrees:
            raise Refused(
                f"{words}: {source.path} is quantised already, as {stored}; leave the flag out, or give the plain "
                "checkpoint"
            )


def _skipped(names: Sequence[str], shape: ModelShape) -> set[str]:
    """Canonical linears that the flag keeps plain."""
    linears = hf_linears(shape)
    meant: set[str] = set()
    for name in names:
        if not _is_always_plain(name, shape):
            meant |= meaning(name, linears, SKIP_FLAG).hf_modules(linears)
    for module, matrices in linears.items():
        kept = [matrix for matrix in matrices if matrix in meant]
        if kept and len(kept) < len(matrices):
            others = ", ".join(one.rpartition(".")[2] for one in matrices if one not in meant)
            raise Refused(
                f"{SKIP_FLAG} {kept[0].rpartition('.')[2]}: it is one matrix with {others} in {module}, which is "
                "quantised whole or not at all; name all of them"
            )
    return {module for module, matrices in linears.items() if meant & set(matrices)}


def _is_always_plain(name: str, shape: ModelShape) -> bool:
    """Whether a name is that of a module outside of the linears."""
    linears = {matrix for matrices in hf_linears(shape).values() for matrix in matrices}
    others = [module for module in hf_modules(shape) if module not in linears]
    ours = [tensor.rpartition(".")[0] for tensor in canonical_tensors(shape)]
    ours = [module for module in ours if not module.rpartition(".")[2].startswith("linear_")]
    found = any(is_suffix(name, module) for module in (*others, *ours, "lm_head", "output_layer"))
    return found and not any(is_suffix(name, matrix) for matrix in linears)


def _check_experts(weights: Collection[str], shape: ModelShape) -> None:
    """Refuse a layer of which some experts are quantised: their matrices are stacked."""
    if shape.moe is None:
        return
    counts: dict[str, int] = {}
    for name in weights:
        if of_all_experts(name) != name:
            counts[of_all_experts(name)] = counts.get(of_all_experts(name), 0) + 1
    partial = _first_partial(counts, shape.moe.num_experts)
    if partial is not None:
        raise Refused(
            f"{partial}: {counts[partial]} of a layer's {shape.moe.num_experts} experts would be quantised, but they "
            f"are computed together; name all of them in {SKIP_FLAG}, or none"
        )


def _first_partial(counts: Mapping[str, int], whole: int) -> str | None:
    return next((name for name in sorted(counts) if counts[name] != whole), None)
