"""Bytes that a layer keeps for the backward pass, per token: predicted, and measured on a real model.

    python benchmarks/activation_memory.py --output docs/memory.md

What autograd saves is collected by its hooks, every storage once; parameters and the rotary tables are left out. One
layer is told from the difference of two models that differ in their number of layers, so that neither the embedding
nor the loss enters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from comparison.assets import assets
from comparison.inputs import make_inputs
from comparison.machine import commit, versions
from comparison.setting import Setting
from comparison.table import table

from mindspeed_lora.adapters.dropout import token_keys
from mindspeed_lora.atomic import atomic_file
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.rope import rotary_tables
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from mindspeed_lora.training.dry_run import memory_question
from mindspeed_lora.training.layer_memory import layer_bytes
from mindspeed_lora.training.plan import plan_training
from mindspeed_lora.training.session import TrainingSession

TOKENS = 256


@dataclass(frozen=True)
class Variant:
    """A way to train, and the flags that ask for it."""

    name: str
    flags: tuple[str, ...]


LORA = ("--lora-r", "16")
VARIANTS = (
    Variant("LoRA on all four linears", LORA),
    Variant("LoRA, attention recomputed", (*LORA, "--recompute-granularity", "selective")),
    Variant("LoRA, layers recomputed", (*LORA, "--recompute-granularity", "full")),
    Variant("LoRA on linear_qkv alone", (*LORA, "--lora-target-modules", "linear_qkv")),
    Variant("LoRA on q_proj and v_proj", (*LORA, "--lora-target-modules", "q_proj", "v_proj")),
    Variant("LoRA, dropout 0.1", (*LORA, "--lora-dropout", "0.1")),
    Variant("all parameters", ()),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="also write the page to this file")
    options = parser.parse_args(arguments)
    found = assets()
    setting = Setting(model=found["MODEL"], data=f"{found['DATA']}/alpaca_en_demo.json", rows=8, threads=1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="activation_memory-") as folder:
        prefix = make_inputs(setting, Path(folder)).data_prefix
        for variant in VARIANTS:
            words = ["--load", setting.model, "--data-path", prefix, "--train-iters", "1", *variant.flags]
            predicted, measured = _layer(parse("posttrain", [*words, "--seq-length", str(TOKENS)]))
            rows.append(
                [variant.name, f"{predicted:,.0f}", f"{measured:,.0f}", f"{predicted / measured - 1:+.1%}"]
            )
    text = _page(rows)
    print(text)
    if options.output is not None:
        with atomic_file(options.output) as temporary:
            Path(temporary).write_text(text + "\n", encoding="utf-8")
    return 0


def _layer(job: TrainJob) -> tuple[float, float]:
    """Bytes per token of one layer, predicted and measured."""
    plan = plan_training(job)
    groups, _ = initialize_groups(job.parallel, job.training.seed)
    try:
        session = TrainingSession(plan, groups)
        question = memory_question(plan, 1, 4)
        boundary = question.shape.hidden_size * 4
        full = job.training.recompute_granularity == "full"
        predicted = boundary if full else layer_bytes(question, 1) / question.tokens
        block = session.chunks[0].decoder
        layers = list(block.layers)
        kept = []
        for count in (2, 6):
            block.layers = torch.nn.ModuleList(layers[:count])
            block.num_layers_per_pipeline_rank = count
            kept.append(_kept(session))
        return predicted, (kept[1] - kept[0]) / 4 / TOKENS
    finally:
        destroy_groups()


def _kept(session: TrainingSession) -> int:
    """Bytes that the layers of the first chunk keep of one micro-batch."""
    chunk = session.chunks[0]
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    tokens = torch.randint(0, 1000, (1, TOKENS))
    rotary = rotary_tables(chunk.rotary.frequencies, torch.arange(TOKENS), torch.float32)
    places = torch.arange(TOKENS).unsqueeze(1)
    context = ForwardContext(token_keys=token_keys(1, 1, torch.zeros_like(places), places))
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {*own, rotary.untyped_storage().data_ptr()}:
            storages[storage.data_ptr()] = storage
        return tensor

    chunk.train()
    hidden = chunk.embedding(input_ids=tokens, position_ids=None).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=context
        )
    return sum(storage.nbytes() for storage in storages.values())


def _page(rows: Sequence[Sequence[str]]) -> str:
    facts = commit()
    sha = facts.get("sha", "unknown")[:12] + (" and changes" if facts.get("changed") else "")
    return "\n".join(
        [
            "# Memory",
            "",
            "`--dry-run` prints, for each pipeline stage, what a rank will hold at the peak of a step, by part:",
            "weights, adapters, gradients, optimizer, activations, logits, passing buffers, and on the CPU what the",
            "heap holds beside them. `training/layer_memory.py` has the formulas; `pytest -m slow",
            "tests/e2e/test_predicted_memory.py` trains SmolLM2-135M in eight layouts and compares the sum with the",
            "largest resident size of a process: within a tenth. What is alive at the peak is told within 2%; the",
            "rest is holes in the C library's heap (`training/heap_memory.py`), by which two runs of one job differ",
            "by up to 5%.",
            "",
            "With `--paged-optimizer` the optimizer's state counts by the window that is updated; all of it is told",
            "below the total ([qlora.md](qlora.md#the-paged-optimizer)).",
            "",
            "## What a layer keeps for the backward pass",
            "",
            f"Bytes per token and layer of SmolLM2-135M in float32, {TOKENS} tokens, one rank. Measured is what",
            "autograd saves, every storage once. Frozen linears keep their input only where the gradient of a factor",
            "A needs it. Made by `python benchmarks/activation_memory.py --output docs/memory.md`, commit",
            f"{sha}, torch {versions()['torch']}.",
            "",
            table(["", "predicted", "measured", "difference"], rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
