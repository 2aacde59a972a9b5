"""What ``benchmarks/convert.py`` runs beside our converter, each in a process of its own.

convert_child.py make FOLDER GIGABYTES      a made-up Llama in bf16, and an adapter for it
convert_child.py copy FROM TO               files copied in blocks of 16 MiB and flushed to disk
convert_child.py transformers FROM TO       from_pretrained, save_pretrained
convert_child.py peft FROM ADAPTER TO       PeftModel, merge_and_unload, save_pretrained
convert_child.py forget FOLDER              its pages leave the cache
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

BLOCK_BYTES = 16 << 20
SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""Llama-3.2-3B's, but for the number of layers."""


def make(folder: Path, gigabytes: float) -> None:
    """Random weights from a repeated block, written tensor by tensor; and a rank-16 adapter on every linear."""
    import torch

    from mindspeed_lora.checkpoint.canonical import LINEARS
    from mindspeed_lora.checkpoint.engine import execute
    from mindspeed_lora.checkpoint.formats.hf_writer import plan_hf
    from mindspeed_lora.checkpoint.peft.plan import plan_adapter
    from mindspeed_lora.checkpoint.peft.source import write_adapter
    from mindspeed_lora.checkpoint.source import CheckpointSource
    from mindspeed_lora.config.lora import LoraConfig
    from mindspeed_lora.models.families import shape_from_config

    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    class Made(CheckpointSource):
        def dtype(self, name: str) -> torch.dtype:
            return torch.bfloat16

        def _fill(self, out: torch.Tensor, name: str, wanted: object) -> None:
            flat = out.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()].copy_(block[: flat.numel() - start])

    embedding = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2
    layer = 2 * (3 * SHAPE["hidden_size"] * SHAPE["intermediate_size"] + SHAPE["hidden_size"] ** 2 * 8 // 3)
    layers = max(2, 2 * round((gigabytes * 1e9 - embedding) / layer / 2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        **SHAPE,
    }
    base = folder / "base"
    base.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shape = shape_from_config(config)
    execute(plan_hf(Made(base, shape, None, folder), folder), base)
    # A model from the hub has none.
    (base / "checksums.json").unlink()
    plan = plan_adapter(LoraConfig(lora_r=16, lora_alpha=32, lora_target_modules=tuple(LINEARS)), shape, 1)
    assert plan is not None
    generator = torch.Generator().manual_seed(1)
    write_adapter(
        folder / "adapter",
        shape,
        plan.config,
        plan.spec,
        lambda name: torch.randn(plan.spec.tensors[name], generator=generator) * 0.02,
    )


def copy(source: Path, target: Path) -> None:
    """Every file of a folder, block by block, flushed to disk as a conversion's files are."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for path in sorted(file for file in source.rglob("*") if file.is_file()):
        written = target / path.relative_to(source)
        written.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb", buffering=0) as one, written.open("wb", buffering=0) as other:
            while count := one.readinto(buffer):
                other.write(buffer[:count])
            os.fsync(other.fileno())


def transformers(source: Path, target: Path) -> None:
    """transformers' own loading and saving."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)


def peft(source: Path, adapter: Path, target: Path) -> None:
    """PEFT's merge."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)


def forget(folder: Path) -> None:
    """Drop a folder's clean pages from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "make":
        make(Path(words[0]), float(words[1]))
    else:
        {"copy": copy, "transformers": transformers, "peft": peft, "forget": forget}[what](*map(Path, words))
