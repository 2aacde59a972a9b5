"""In which form a conversion reads and writes its linears: as the flags and the source say together."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from mindspeed_lora.checkpoint.canonical import expert_number
from mindspeed_lora.checkpoint.conversion.quantize import MeasuredSource, QuantizingSource
from mindspeed_lora.checkpoint.loading.quantization import QuantPlan, plan_quantization
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.config.jobs import ConversionJob
from mindspeed_lora.config.quantization import QuantFlags, QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.run_folder import find_saved_run


def dequantized_base(job: ConversionJob, base: Source) -> Source:
    """What adapters are merged into: the base, or by ``--merge-dequantized`` what its quantised weights stand for."""
    flags = job.quantization
    if base.quantization is not None:
        _notice(
            f"{base.path} is quantised ({base.quantization}): merged into the values that it stands for; the original "
            "weights as --load-dir give a closer result"
        )
        return base
    if flags.merge_dequantized:
        plan = _plan(job, base, None)
        return QuantizingSource(base, plan.settings, plan.weights, measure=True)
    seen = next(filter(None, map(_trained_on, job.conversion.lora_load or ())), None)
    if seen is None or job.conversion.unmerge:
        return base
    _notice(
        f"the adapter was trained on weights quantised as {seen}; merged into the original ones, which is the better "
        "result (--merge-dequantized takes what it was trained on)"
    )
    open_flags = QuantFlags(qlora=True, quant_skip_modules=flags.quant_skip_modules)
    measured = plan_quantization(open_flags, base, base.shape, None)
    assert measured is not None
    return MeasuredSource(base, seen, measured.weights)


def _trained_on(path: str) -> QuantSettings | None:
    """How the base was quantised in the run that an adapter is of, if it is one of a run and it was."""
    saved = find_saved_run(Path(path))
    found = saved.state.get("quantization") if saved is not None else None
    if not isinstance(found, dict) or not {"kind", "block_size", "double"} <= found.keys():
        return None
    return QuantSettings(found["kind"], found["block_size"], found["double"])


def in_target_form(job: ConversionJob, source: Source, stored: QuantSettings | None) -> Source:
    """The source as it is written; ``stored`` says how ``--load-dir`` is quantised.

    Raises:
        Refused: the target's format has no quantised weights, or the flags say otherwise than a quantised source.
    """
    conversion, flags = job.conversion, job.quantization
    if not flags.quantises:
        if source.quantization is None:
            return source
        if not flags.qlora_save_dequantize:
            _notice(f"{source.path} is quantised ({stored}): written dequantised; --qlora keeps it quantised")
        return QuantizingSource(source, None, ())
    if conversion.save_model_type == "torch_dist":
        raise Refused(
            "--qlora writes quantised weights, which the torch_dist format has no form for; use --save-model-type hf, "
            "or mg with --ckpt-format torch"
        )
    is_stacked = conversion.moe_grouped_gemm and conversion.transformer_impl != "transformer_engine"
    if conversion.save_model_type == "mg" and is_stacked and source.shape.moe is not None:
        _notice(
            "--moe-grouped-gemm: quantised experts are written each by itself, not stacked in weight1 and weight2; "
            "training computes them grouped all the same"
        )
    plan = _plan(job, source, stored)
    weights = plan.weights
    if conversion.save_model_type == "hf":
        weights = frozenset(name for name in weights if expert_number(name) is None)
        if weights != plan.weights:
            _notice(
                "experts are written plain: transformers holds them as parameters of three axes, which bitsandbytes "
                "does not quantise (an mg target has them quantised)"
            )
    return QuantizingSource(source, plan.settings, weights, measure=bool(conversion.lora_load))


def _plan(job: ConversionJob, source: Source, stored: QuantSettings | None) -> QuantPlan:
    """What of a source is quantised, and how; what no flag says is as it is stored."""
    flags = dataclasses.replace(job.quantization, qlora=True)
    plan = plan_quantization(flags, source, source.shape, None)
    assert plan is not None
    is_open = not {"--quant-type", "--quant-block-size", "--quant-double"} & set(flags.details)
    if stored is not None and is_open and (not flags.qlora_nf4 or stored.kind == "nf4"):
        plan = dataclasses.replace(plan, settings=stored)
    return plan


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr)
