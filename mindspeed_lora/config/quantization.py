"""Quantised frozen weights: what is asked for (the flags), and what that means (the settings)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mindspeed_lora.config.flags import Check, Section, flag

QUANT_TYPES = ("nf4", "fp4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK_SIZE = 64

_BLOCK_SIZE = Check(f"one of {', '.join(map(str, BLOCK_SIZES))}", lambda value: value in BLOCK_SIZES)


@dataclass(frozen=True)
class QuantSettings:
    """How weights are quantised: 4 bits in blocks (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), or 8 in rows."""

    kind: str = "nf4"
    """``nf4``, ``fp4`` or ``int8``."""
    block_size: int = DEFAULT_BLOCK_SIZE
    """Numbers that share a scale, of nf4 and fp4; int8 has one scale a row."""
    double: bool = False
    """The scales are quantised too, 8 bits in blocks of 256."""

    def __str__(self) -> str:
        if self.kind == "int8":
            return self.kind
        nested = ", nested statistics" if self.double else ""
        return f"{self.kind}, blocks of {self.block_size}{nested}"


@dataclass(frozen=True, kw_only=True)
class QuantFlags(Section):
    """Whether and how the frozen weights are quantised."""

    qlora: bool = flag(
        "quantise the frozen linears while loading, or take a quantised checkpoint (docs/qlora.md)", False
    )
    qlora_nf4: bool = flag("the same as --qlora --quant-type nf4", False)
    quant_type: str | None = flag(
        "4-bit NormalFloat or floating point in blocks, or 8-bit integers in rows; left out: as a quantised "
        "checkpoint has it, else nf4",
        choices=QUANT_TYPES,
    )
    quant_block_size: int | None = flag(
        "numbers of a matrix that share a scale; left out: as a quantised checkpoint has it, else 64",
        check=_BLOCK_SIZE,
        metavar="N",
    )
    quant_double: bool = flag("quantise the scales too: 4.13 bits a weight in place of 4.5", False)
    quant_skip_modules: tuple[str, ...] | None = flag(
        "linears that stay as they are, by Megatron's or Hugging Face's names or expressions, as "
        "--lora-target-modules takes them (embeddings, output layer, norms and routers always do)",
        metavar="NAME",
    )

    @property
    def quantises(self) -> bool:
        """Whether weights are to be quantised, or to be read as they were."""
        return self.qlora or self.qlora_nf4

    @property
    def details(self) -> dict[str, object]:
        """What was asked for beyond that, flag → value."""
        asked = {
            "--quant-type": self.quant_type,
            "--quant-block-size": self.quant_block_size,
            "--quant-double": self.quant_double or None,
            "--quant-skip-modules": self.quant_skip_modules,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def settings(self) -> QuantSettings:
        """How a plain checkpoint is quantised."""
        asked = QuantSettings(self.quant_type or "nf4", double=self.quant_double)
        if self.quant_block_size is None:
            return asked
        return dataclasses.replace(asked, block_size=self.quant_block_size)


@dataclass(frozen=True, kw_only=True)
class TrainQuantFlags(QuantFlags):
    """What training takes."""

    qlora_save_dequantize: bool = flag(
        "with --lora-save-base: save the frozen model in the compute dtype, not quantised", False
    )


@dataclass(frozen=True, kw_only=True)
class ConversionQuantFlags(QuantFlags):
    """What a conversion takes."""

    qlora_save_dequantize: bool = flag(
        "write a quantised --load-dir in a plain dtype (what is written is plain without --qlora-nf4 anyway)",
        False,
    )
    merge_dequantized: bool = flag(
        "merge --lora-load into the dequantised weights, which is what the adapter was trained on, in place of the "
        "original ones",
        False,
    )
