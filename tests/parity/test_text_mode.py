"""``--loss-on all`` gives the losses of TRL's text mode, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data.preprocess import preprocess
from tests.support.differences import LOSS_BETWEEN_LAYOUTS
from tests.support.layouts import Layout
from tests.support.parity import ParityBench
from tests.support.text_model import make_text_model, write_conversations

STEPS, ROWS_A_STEP, LENGTH = 20, 4, 64
"""Some rows are longer, and cut."""
LR = 5e-3


def trl_losses(model: Path, adapter: Path, texts: list[str], folder: Path) -> list[float]:
    """The loss of every step of TRL's ``SFTTrainer`` over a column of text."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []

    class Watched(SFTTrainer):
        def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*args, **options)
            losses.append(float(loss))
            return loss

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    samples = [texts[i % len(texts)] for i in range(STEPS * ROWS_A_STEP)]
    config = SFTConfig(
        output_dir=str(folder),
        dataset_text_field="text",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ROWS_A_STEP // 2,
        max_steps=STEPS,
        max_length=LENGTH,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_epsilon=1e-6,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Watched(
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True),
        args=config,
        train_dataset=Dataset.from_dict({"text": samples}),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [sum(losses[first : first + 2]) for first in range(0, len(losses), 2)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("text")
    model = make_text_model(folder / "model")
    rows = write_conversations(folder / "rows.jsonl")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(5)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "start")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    expected = trl_losses(model, folder / "start", texts, folder / "trl")
    return {"model": model, "start": folder / "start", "rows": folder / "rows.jsonl", "expected": expected}


def argv(job: dict[str, Any], layout: Layout, data: Path, *flags: str) -> list[str]:
    return [
        *("--stage", "sft", "--load", str(job["model"]), "--lora-load", str(job["start"])),
        *("--data-path", str(data), *flags),
        *("--seq-length", str(LENGTH), "--variable-seq-lengths", "--no-shuffle", "--micro-batch-size", "2"),
        *("--global-batch-size", str(ROWS_A_STEP), "--train-iters", str(STEPS), "--lr", str(LR)),
        *(
            "--lr-decay-style",
            "constant",
            "--lr-warmup-iters",
            "0",
            "--weight-decay",
            "0",
            "--adam-eps",
            "1e-6",
        ),
        *("--distributed-timeout-minutes", "3", *layout.flags),
    ]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True)], ids=str)
def test_losses_are_trls(job: dict[str, Any], layout: Layout, bench: ParityBench) -> None:
    """The raw rows go straight to the training. TRL ends a text with the end token, as --append-eod does."""
    flags = ("--hf-chat-template", "--loss-on", "all", "--append-eod")
    outcome = bench.run(argv(job, layout, job["rows"], *flags), layout)
    assert len(job["expected"]) == STEPS
    # Twenty updates apart, fp32 rounding has grown somewhat beyond that between two layouts.
    assert outcome.losses == pytest.approx(job["expected"], rel=10 * LOSS_BETWEEN_LAYOUTS)


@pytest.mark.parametrize("flags", [(), ("--neat-pack",)], ids=str)
def test_raw_rows_train_as_prepared_by_hand(
    job: dict[str, Any], flags: tuple[str, ...], bench: ParityBench, tmp_path: Path
) -> None:
    """Found by their first row, prepared by one of two ranks; the losses are the same bits."""
    layout = Layout(dp=2)
    found = bench.run(argv(job, layout, job["rows"], "--prompt-type", "chatml", *flags), layout)
    words = [
        "--input",
        str(job["rows"]),
        "--output-prefix",
        str(tmp_path / "rows"),
        "--seq-length",
        str(LENGTH),
    ]
    words += ["--tokenizer-name-or-path", str(job["model"]), "--prompt-type", "chatml", *flags]
    preprocess(parse("preprocess", words))
    expected = bench.run(argv(job, layout, tmp_path / "rows"), layout)
    assert found.losses == expected.losses
    assert any("is prepared as" in notice for notice in found.ranks[0].notices)
