"""The words and flags of ``convert_ckpt.py inspect`` and ``convert_ckpt.py verify``."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import NOT_NEGATIVE, Section, flag


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Section):
    """Which folder is looked at, and how the answer is printed."""

    dir: str | None = flag("the folder to look at: a checkpoint of any format", metavar="DIR", is_word=True)
    tensors: bool = flag("also list every tensor with shape, dtype, file and shards", False)
    json: bool = flag("print one JSON object", False)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Section):
    """Which checkpoints are compared, and what counts as equal."""

    first: str | None = flag("a checkpoint or adapter of any format and layout", metavar="A", is_word=True)
    second: str | None = flag(
        "what to compare it with; left out: only A's own checksums are checked", metavar="[B]", is_word=True
    )
    tolerance: float | None = flag(
        "largest difference within a tensor, as a share of its largest magnitude, that still counts as equal, "
        "in any dtype; left out: the bits must be the same",
        check=NOT_NEGATIVE,
    )
    json: bool = flag("print one JSON object", False)
