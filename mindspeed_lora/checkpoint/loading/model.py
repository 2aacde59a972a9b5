"""Building a rank's model: made without memory, then each parameter filled with its slices of the sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.adapters.dropout import stream_of
from mindspeed_lora.adapters.initial import initial_lora_a
from mindspeed_lora.adapters.inject import inject_adapters
from mindspeed_lora.adapters.lora import LoraPart
from mindspeed_lora.adapters.schedules.choice import Scheduler
from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.loading.local_parameters import (
    LocalParameter,
    canonical_name,
    local_parameters,
)
from mindspeed_lora.checkpoint.loading.quantization import QuantPlan
from mindspeed_lora.checkpoint.loading.quantized import quantized_weights
from mindspeed_lora.checkpoint.peft.adapted import AdaptedSource
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import ModelChunk
from mindspeed_lora.device import current_device
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.quantization.shard import QuantizedWeight

if TYPE_CHECKING:
    from mindspeed_lora.checkpoint.peft.config import AdapterConfig
    from mindspeed_lora.checkpoint.peft.source import AdapterSource


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """The adapter to train or apply: what is injected, and where its values come from."""

    spec: AdapterSpec
    shape: ModelShape
    """Of the model with the adapter on it."""
    config: AdapterConfig
    """What the saved adapter's configuration says."""
    shared: frozenset[str] = frozenset()
    """The fused linears, by Megatron's names, whose matrices share one A."""
    source: AdapterSource | None = None
    """Values to start from; None draws A from the seed and leaves B at zero."""
    seed: int = 1234
    notices: tuple[str, ...] = ()

    @property
    def tokenizer_folder(self) -> Path | None:
        """The adapter's folder, where it has tokens of its own and the tokenizer that knows them."""
        if self.source is None or not self.source.has_own_words:
            return None
        folder = self.source.path
        return folder if (folder / "tokenizer_config.json").is_file() else None


def build_model(
    shape: ModelShape,
    config: TransformerConfig,
    groups: ParallelGroups,
    source: Source,
    adapter: AdapterPlan | None = None,
    vocab_divisible_by: int = 1,
    chunk: ModelChunk | None = None,
    scheduler: Scheduler | None = None,
    experts: MoESettings | None = None,
    quantization: QuantPlan | None = None,
) -> tuple[GPTModel, list[LocalParameter]]:
    """One chunk of the model with its weights on the device, and its parameters in canonical terms.

    The scheduler tells which schedule each linear with an adapter runs; without it, unfused. What ``quantization``
    names is quantised while it is read, or read as it was quantised.

    Peak memory is the rank's shard and one tensor (quantising: two): the modules are made on the meta device, and each
    parameter is read as just the ranges that this rank holds.
    """
    if adapter is not None:
        shape, source = adapter.shape, AdaptedSource(source, adapter.shape, adapter.source)
    vocab_size = padded_vocab_size(shape, vocab_divisible_by, groups.tp_size)
    with torch.device("meta"):
        model = GPTModel(shape, config, groups, vocab_size, chunk, experts)
        if adapter is not None:
            inject_adapters(
                model, adapter.spec, lambda local_name: canonical_name(model, local_name), scheduler
            )
    for parameter in local_parameters(model):
        if parameter.is_adapter:
            _set_stream(model, parameter)
        elif quantization is not None and quantization.covers(parameter.members):
            continue
        _set_parameter(model, parameter, _values(parameter, adapter, source))
    if quantization is not None:
        covered = [one for one in local_parameters(model) if quantization.covers(one.members)]
        for parameter, weight in zip(
            covered, quantized_weights(covered, source, quantization.settings), strict=True
        ):
            _set_quantized(model, parameter, weight)
    return model, local_parameters(model)


def _values(parameter: LocalParameter, adapter: AdapterPlan | None, source: Source) -> Iterator[torch.Tensor]:
    """This rank's shards of the canonical tensors that a parameter is made of, one after the other."""
    for name in parameter.members:
        if parameter.is_adapter:
            assert adapter is not None
            yield _read_own(parameter, name, adapter, source)
        else:
            yield source.read(name, parameter.axis, parameter.ranges or None)


def _read_own(parameter: LocalParameter, name: str, adapter: AdapterPlan, base: Source) -> torch.Tensor:
    """This rank's shard of a factor or of rows of tokens: from the adapter's files, or its starting value."""
    if adapter.source is not None:
        return adapter.source.read(name, parameter.axis, parameter.ranges or None)
    if name.endswith("lora_b"):
        return torch.zeros(parameter.param.shape[-2:])
    for rows in adapter.spec.token_rows:
        if rows.name == name:
            return base.read(rows.tensor, 0, [(token, token + 1) for token in rows.tokens])
    rank, in_features = parameter.shape
    whole = initial_lora_a(adapter.seed, name, rank, in_features)
    if parameter.axis is None:
        return whole
    return torch.cat(
        [whole.narrow(parameter.axis, a, b - a) for a, b in parameter.ranges], dim=parameter.axis
    )


def _set_stream(model: GPTModel, parameter: LocalParameter) -> None:
    """Sets a factor A's dropout apart by its canonical name, which is the same in every layout."""
    if parameter.name.endswith("lora_a"):
        part: Any = model.get_submodule(parameter.local_name.rpartition(".")[0])
        streams = [stream_of(name) for name in parameter.members]
        if isinstance(part, LoraPart):
            (part.stream,) = streams
        else:
            part.streams = streams


def _set_parameter(model: GPTModel, parameter: LocalParameter, values: Iterable[torch.Tensor]) -> None:
    """Puts the values in place of the meta parameter, with the attributes that megatron-core gave that one."""
    old = parameter.param
    # A copy of its own: a value may be a view of a larger buffer.
    data = torch.empty(old.shape, dtype=old.dtype, device=current_device())
    for place, value in zip(data if parameter.is_stack else [data], values, strict=True):
        assert value.shape == place.shape, (
            f"{parameter.name}: read {tuple(value.shape)} for {tuple(place.shape)}"
        )
        place.copy_(value)
    new = torch.nn.Parameter(data, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    trained_rows = getattr(old, "trained_rows", None)
    if trained_rows is not None:
        new.register_hook(lambda gradient: _only(gradient, trained_rows))
    module_name, _, name = parameter.local_name.rpartition(".")
    setattr(model.get_submodule(module_name), name, new)


def _set_quantized(model: GPTModel, parameter: LocalParameter, weight: QuantizedWeight) -> None:
    """Puts a quantised weight in place of the meta parameter: buffers, no parameter."""
    module_name, _, name = parameter.local_name.rpartition(".")
    module = model.get_submodule(module_name)
    delattr(module, name)
    module.add_module(name, weight.to(current_device()))


def _only(gradient: torch.Tensor, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The gradient ``[n]``, zero outside of these rows."""
    kept = torch.zeros_like(gradient)
    for start, stop in rows:
        kept[start:stop] = gradient[start:stop]
    return kept
