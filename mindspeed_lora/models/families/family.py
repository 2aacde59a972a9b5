"""What a model family is: its names for config.json and its table of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Mapping as Dictionary
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.mapping import Mapping

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
QKV_WEIGHT = "decoder.layers.{layer}.self_attention.linear_qkv.weight"


@dataclass(frozen=True)
class Family:
    """One Hugging Face model family."""

    name: str
    model_type: str
    """``model_type`` in config.json."""
    architectures: tuple[str, ...]
    """The classes in ``architectures`` whose weights the table describes."""
    aliases: tuple[str, ...]
    """Values of ``--model-type-hf`` that mean this family."""
    fields: Callable[[Any], dict[str, Any]]
    """Reads a parsed config.json: the fields of the shape, without ``family``."""
    table: tuple[Mapping, ...]
    config_keys: Dictionary[str, str] = field(default_factory=dict)
    """Llama's key of config.json → the family's own, where it is another."""
    also_stored_as: Dictionary[str, str] = field(default_factory=dict)
    """Canonical pattern → another Hugging Face name under which files can have that tensor. A name without ``{expert}``
    for a pattern with it is of a tensor ``[E, rows, columns]`` that stacks the matrices of all experts."""
    ignored: tuple[str, ...] = (r"(.+\.)?rotary_(pos_)?emb\.inv_freq",)
    """Patterns of tensors in a checkpoint that hold nothing learned."""

    @cached_property
    def _found(self) -> dict[str, tuple[Mapping, int | None]]:
        """Answers of :meth:`mapping`; a model of many experts is asked for the same names again and again."""
        return {}

    @cached_property
    def _by_pattern(self) -> dict[str, Mapping]:
        return {mapping.canonical: mapping for mapping in self.table}

    @property
    def packs_qkv(self) -> bool:
        """Whether one Hugging Face tensor holds q, k and v."""
        row = self._by_pattern.get(QKV_WEIGHT)
        return row is not None and len(row.hf) == 1

    def shape(self, config: Dictionary[str, Any]) -> ModelShape:
        """The architecture that a parsed config.json describes."""
        renamed = {key: config[own] for key, own in self.config_keys.items() if own in config}
        return ModelShape(family=self.name, **self.fields({**config, **renamed}))

    def mapping(self, canonical: str) -> tuple[Mapping, int | None]:
        """The table's row for a canonical name, and the layer number in that name.

        The row of an expert has that expert's number in its names already.
        """
        found = self._found.get(canonical)
        if found is None:
            found = self._found[canonical] = self._find(canonical)
        return found

    def row(self, pattern: str) -> Mapping:
        """The table's row for a canonical pattern."""
        return self._by_pattern[pattern]

    def _find(self, canonical: str) -> tuple[Mapping, int | None]:
        layer, expert = _LAYER.match(canonical), _EXPERT.search(canonical)
        pattern = _LAYER.sub("decoder.layers.{layer}.", canonical)
        row = self._by_pattern[_EXPERT.sub(".local_experts.{expert}.", pattern)]
        if expert is not None:
            row = row.of_expert(int(expert.group(1)))
        return row, int(layer.group(1)) if layer else None

    def is_ignored(self, hf_name: str) -> bool:
        """Whether a checkpoint's tensor holds nothing learned and may be left out."""
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)
