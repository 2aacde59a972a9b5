"""The rules that span several flags of quantised weights."""

from __future__ import annotations

from mindspeed_lora.config.quantization import ConversionQuantFlags, QuantFlags
from mindspeed_lora.errors import Refused


def check_quantization(flags: QuantFlags) -> None:
    """Refuse what contradicts itself, and details of what is not asked for."""
    if flags.qlora_nf4 and flags.quant_type not in (None, "nf4"):
        raise Refused(
            f"--qlora-nf4 asks for nf4, but --quant-type is {flags.quant_type}; give --qlora in its place"
        )
    merges = isinstance(flags, ConversionQuantFlags) and flags.merge_dequantized
    for name, value in flags.details.items():
        words = f"{name} {value}" if isinstance(value, (str, int)) and value is not True else name
        if not flags.quantises and not merges:
            raise Refused(f"{words} says how --qlora quantises, which is not given; add it")
        if flags.quant_type == "int8" and name in ("--quant-block-size", "--quant-double"):
            raise Refused(
                f"{words}: --quant-type int8 has one unquantised scale for each row and no blocks; drop one of them"
            )


def check_conversion_quantization(flags: ConversionQuantFlags, target: str | None, merges: bool) -> None:
    """The same of a conversion into format ``target``, which merges an adapter or does not."""
    check_quantization(flags)
    if flags.merge_dequantized and not merges:
        raise Refused(
            "--merge-dequantized is given without --lora-load; name the adapter to merge, or drop it"
        )
    name = "--qlora-nf4" if flags.qlora_nf4 else "--qlora"
    if flags.quantises and target == "peft":
        raise Refused(f"{name} quantises a model, but --save-model-type peft writes an adapter; drop one")
    if flags.quantises and flags.qlora_save_dequantize:
        raise Refused(
            f"{name} writes quantised weights and --qlora-save-dequantize plain ones; drop one of them"
        )
