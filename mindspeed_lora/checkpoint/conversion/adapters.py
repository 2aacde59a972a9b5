"""The adapters of a conversion: opened, checked against the flags, the base and each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mindspeed_lora.checkpoint.canonical import VOCABULARY_TENSORS
from mindspeed_lora.checkpoint.conversion.merge import WeightedAdapter
from mindspeed_lora.checkpoint.peft.contradictions import refuse_contradictions
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused


def open_adapters(
    paths: Sequence[str], weights: Sequence[float] | None, lora: LoraFlags, shape: ModelShape, unmerge: bool
) -> list[WeightedAdapter]:
    """The adapters of a merge or an unmerge on a base of this shape.

    Raises:
        Refused: an adapter contradicts the flags or does not fit the base, two hold the same tensor whole, or one
            that is to be taken out cannot be.
    """
    adapters = []
    for path, weight in zip(paths, weights or (1.0,) * len(paths), strict=True):
        adapter = AdapterSource(path, shape, lora=lora)
        refuse_contradictions(lora, adapter.config, adapter.hf_modules, shape)
        if unmerge:
            _check_reversible(adapter)
        adapters.append(WeightedAdapter(adapter, weight))
    _refuse_ambiguity([one.source for one in adapters])
    return adapters


def tokenizer_folder(adapters: Sequence[WeightedAdapter], unmerge: bool) -> Path | None:
    """The adapter whose tokenizer and chat template the result takes; None keeps the base's."""
    sources = [one.source for one in adapters]
    if unmerge or not sources:
        return None
    if len(sources) == 1:
        return sources[0].path
    with_words = [source.path for source in sources if source.has_own_words]
    kept = f"that of {with_words[0]}" if with_words else "the base's"
    print(f"notice: of several adapters' tokenizers and chat templates, {kept} is taken", file=sys.stderr)
    return with_words[0] if with_words else None


def _held(adapter: AdapterSource) -> dict[tuple[str, int], str]:
    """What an adapter puts in place of the base's own: (canonical name, number of the matrix) → name of it."""
    held: dict[tuple[str, int], str] = {}
    for tensor in adapter.spec.trained:
        mapping = adapter.mapping(tensor.name)
        for part, names in enumerate(tensor.members):
            if names:
                one = f" ({mapping.hf[part].split('.')[-2]})" if len(tensor.members) > 1 else ""
                held[tensor.name, part] = f"{tensor.name}{one}"
    held.update({(rows.tensor, 0): f"rows of {rows.tensor}" for rows in adapter.spec.token_rows})
    held.update({(kept.name, 0): kept.name for kept in adapter.spec.kept})
    if adapter.spec.untied or adapter.has_own_words:
        held.update({(name, 0): held.get((name, 0), name) for name in VOCABULARY_TENSORS})
    return held


def _refuse_ambiguity(adapters: Sequence[AdapterSource]) -> None:
    owners: dict[tuple[str, int], AdapterSource] = {}
    for adapter in adapters:
        for key, name in _held(adapter).items():
            if key in owners:
                raise Refused(
                    f"--lora-load: both {owners[key].path} and {adapter.path} hold {name} in place of the base's; "
                    "which one is meant is not clear, so merge them one after the other"
                )
            owners[key] = adapter


def _check_reversible(adapter: AdapterSource) -> None:
    held = list(_held(adapter).values())
    if held:
        raise Refused(
            f"--unmerge: {adapter.path} holds {held[0]} in place of the base's own values, which are gone since it "
            "was merged; only low-rank factors can be taken out, so use the base model itself"
        )
