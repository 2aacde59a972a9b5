"""Prepare rows, fine-tune, save, merge and ask, from Python.

    .venv/bin/python examples/python_api.py MODEL ROWS
    .venv/bin/torchrun --standalone --nproc_per_node 2 examples/python_api.py MODEL ROWS --tp 2

MODEL is a Hugging Face folder with a chat template, ROWS a file of instruction rows. Every process runs all of this.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from mindspeed_lora import load, merge, prepare, trainer


def main() -> None:
    """The whole way of one adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, default=Path("first_run_api"))
    parser.add_argument("--tp", type=int, default=1, help="processes that share each matrix")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompt", default="Name three colours.")
    options = parser.parse_args()

    is_first = int(os.environ.get("RANK", "0")) == 0
    if "RANK" in os.environ:  # started by torchrun: the library takes the world that is there
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    if is_first:
        summary = prepare(
            options.rows,
            options.out / "rows",
            tokenizer_name_or_path=options.model,
            hf_chat_template=True,
            seq_length=512,
            overwrite=True,
        )
        print(f"{summary.kept} rows, {summary.tokens} tokens")
    wait_for_all()

    # Load the model in its layout and inject the adapter. What is left out is as the command has it.
    with trainer(
        options.model,
        options.out / "rows",
        tensor_model_parallel_size=options.tp,
        lora_r=16,
        lora_target_modules=["linear_qkv", "linear_proj"],
        lr=5e-4,
        global_batch_size=4,
        train_iters=options.steps,
        seq_length=512,
        variable_seq_lengths=True,
        split="97,3,0",
        eval_iters=1,
        save=options.out / "run",
        overwrite=True,
    ) as run:
        before = run.evaluate().eval_loss
        while run.iteration < run.num_steps:
            record = run.step()
            if run.is_main:
                print(f"step {record.iteration}: loss {record.lm_loss:.4f}")
        after = run.evaluate().eval_loss
        adapter = run.save()
        if run.is_main:
            print(f"loss {before:.4f} before, {after:.4f} after {run.iteration} steps; adapter: {adapter}")

    with load(
        options.model,
        lora_load=adapter,
        tensor_model_parallel_size=options.tp,
        hf_chat_template=True,
        max_new_tokens=24,
    ) as model:
        answers = model.generate([options.prompt])
    if is_first:
        print(f"{options.prompt} -> {answers[0]!r}")
        print(f"merged: {merge(options.model, adapter, options.out / 'merged', overwrite=True)}")
    wait_for_all()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wait_for_all() -> None:
    """Until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
