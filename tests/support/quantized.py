"""Quantised models of transformers: by transformers itself with bitsandbytes, or weight by weight by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.shards import Shard

_NEVER = ("embed_tokens", "lm_head", "router", "mlp.gate.", "shared_expert_gate")


@dataclass(frozen=True)
class Quant:
    """How the base of a case is quantised."""

    kind: str = "nf4"
    block_size: int = 64
    double: bool = False
    by_library: bool = True
    """transformers quantises while it loads; else a plain model gets dequantised weights: of other block sizes, of
    int8 (whose activations bitsandbytes would quantise too) and of experts, which it leaves as they are."""

    @property
    def flags(self) -> list[str]:
        """The command-line flags."""
        words = ["--qlora", "--quant-type", self.kind]
        words += [] if self.kind == "int8" else ["--quant-block-size", str(self.block_size)]
        return words + (["--quant-double"] if self.double else [])

    def __str__(self) -> str:
        return f"{self.kind}-{self.block_size}{'-double' if self.double else ''}"


def load_quantized(folder: Path, quant: Quant, dtype: torch.dtype) -> Any:
    """A model of transformers over quantised weights, on the CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # bitsandbytes compiles some of its functions, which takes longer than running them.
    torch.compiler.set_stance("force_eager")
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if quant.by_library:
        assert quant.block_size == 64 and quant.kind != "int8"
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.kind,
            bnb_4bit_use_double_quant=quant.double,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **settings)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Else it computes in bfloat16 where nothing is trained.
                module.support_avx512bf16_for_cpu = False
        return model
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    with torch.no_grad():
        for matrix in _matrices(model):
            matrix.copy_(dequantized(matrix, quant))
    return model


def dequantized(matrix: torch.Tensor, quant: Quant) -> torch.Tensor:
    """What bitsandbytes makes of ``[out, in]`` and back."""
    from bitsandbytes import functional

    matrix = matrix.detach().contiguous()
    if quant.kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(matrix)
        return functional.int8_vectorwise_dequant(codes, scales).to(matrix.dtype)
    packed, state = functional.quantize_4bit(
        matrix, blocksize=quant.block_size, compress_statistics=quant.double, quant_type=quant.kind
    )
    back: torch.Tensor = functional.dequantize_4bit(packed, state)
    return back


def library_matrices(model: Any) -> dict[str, torch.Tensor]:
    """Dequantised weights of every 4-bit linear, by module name."""
    from bitsandbytes import functional, nn

    return {
        name: functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear4bit)
    }


def quantized_shards(argv: Sequence[str]) -> list[Shard]:
    """On a rank of the pool: what it holds quantised of the job of this command line, dequantised."""
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
    from mindspeed_lora.training.plan import plan_training
    from mindspeed_lora.training.session import TrainingSession
    from tests.support.training import shards

    job = parse("posttrain", argv)
    groups, _ = initialize_groups(job.parallel, job.training.seed)
    try:
        held = [p for p in TrainingSession(plan_training(job), groups).parameters if p.is_quantized]
        quantized: list[tuple[Any, Any]] = [(parameter, parameter.param) for parameter in held]
        return [
            shard
            for p, weight in quantized
            for shard in shards(p, 0, weight.numel(), weight.dense().view(-1))
        ]
    finally:
        destroy_groups()


def _matrices(model: Any) -> Iterator[torch.Tensor]:
    """Every matrix that is quantised: of linears, and of each expert gate, up and down."""
    for name, parameter in model.named_parameters():
        if any(word in f"{name}." for word in _NEVER) or not name.startswith("model.layers."):
            continue
        if parameter.dim() == 2:
            yield parameter
        elif name.endswith("experts.gate_up_proj"):
            for expert in parameter:
                yield from expert.chunk(2)
        elif parameter.dim() == 3:
            yield from parameter
