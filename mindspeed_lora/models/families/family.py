"""What a model family is: its names for config.json and its table of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.mapping import Mapping

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """One Hugging Face model family."""

    name: str
    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """The class in ``architectures`` whose weights the table describes."""
    aliases: tuple[str, ...]
    """Values of ``--model-type-hf`` that mean this family."""
    from_config: Callable[[Any], ModelShape]
    """Reads a parsed config.json."""
    table: tuple[Mapping, ...]
    ignored: tuple[str, ...] = (r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq",)
    """Patterns of tensors in a checkpoint that hold nothing learned."""

    @cached_property
    def _by_pattern(self) -> dict[str, Mapping]:
        return {mapping.canonical: mapping for mapping in self.table}

    def mapping(self, canonical: str) -> tuple[Mapping, int | None]:
        """The table's row for a canonical name, and the layer number in that name."""
        match = _LAYER.match(canonical)
        pattern = _LAYER.sub("decoder.layers.{layer}.", canonical)
        return self._by_pattern[pattern], int(match.group(1)) if match else None

    def is_ignored(self, hf_name: str) -> bool:
        """Whether a checkpoint's tensor holds nothing learned and may be left out."""
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)
