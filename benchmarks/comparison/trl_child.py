"""Child process: one repetition of TRL's ``SFTTrainer`` with PEFT.

Defaults of TRL are kept but for what the comparison holds equal on both sides (precision, gradient
checkpointing, optimizer numbers, row order, padding multiple, start adapter), and for work beside training
that would only cost it time (saving, reports, progress bars). Its fused output layer and loss stay on.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from comparison.setting import Setting


class StepWatch(TrainerCallback):
    """Time and loss of each optimizer step.

    A step lasts from before its first micro-batch is moved to the model until the gradients are cleared after
    the update; collation is outside, as the trainer has done it by then.
    """

    def __init__(self) -> None:
        self.elapsed_ms: list[float] = []
        self.losses: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """The trainer begins a step."""
        _wait()
        self._started = time.perf_counter()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """The trainer has updated the parameters."""
        _wait()
        self.elapsed_ms.append((time.perf_counter() - self._started) * 1000)

    def on_log(self, *_args: Any, logs: dict[str, float] | None = None, **_kwargs: Any) -> None:
        """The trainer tells the loss of the step; its last message, on the whole run, has none."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Read the request, train, write losses and times."""
    request = json.loads(Path(sys.argv[1]).read_text())
    setting = Setting(**request["setting"])
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    chosen = {**_attention(setting), **_experts(request["experts"])}
    if request["quantised"]:
        chosen["quantization_config"] = _nf4(dtype)
    base = AutoModelForCausalLM.from_pretrained(setting.model, dtype=dtype, **chosen)
    if request["quantised"]:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = PeftModel.from_pretrained(base, request["start_adapter"], is_trainable=True)
    watch = StepWatch()
    trainer = SFTTrainer(
        model=model,
        args=_config(setting, request["per_device_batch"], request["output_dir"]),
        train_dataset=_dataset(setting, Path(request["rows_file"])),
        processing_class=AutoTokenizer.from_pretrained(request["tokenizer"] or setting.model),
        callbacks=[watch],
    )
    trainer.train()
    trainer.model.save_pretrained(Path(request["output_dir"]) / "adapter")
    packed = request["per_device_batch"] is None
    result = {
        "losses": watch.losses,
        "elapsed_ms": watch.elapsed_ms,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if setting.cuda else None,
        "tokens": _packed_tokens(setting, trainer.train_dataset) if packed else None,
    }
    Path(request["result"]).write_text(json.dumps(result))


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _attention(setting: Setting) -> dict[str, Any]:
    """FlashAttention where it is importable, which packed rows need; else as transformers chooses."""
    if setting.cuda and importlib.util.find_spec("flash_attn") is not None:
        return {"attn_implementation": "flash_attention_2"}
    return {}


def _experts(implementation: str | None) -> dict[str, str]:
    """How transformers computes experts; else as it chooses."""
    return {} if implementation is None else {"experts_implementation": implementation}


def _dataset(setting: Setting, rows_file: Path) -> Dataset:
    """The samples of the run in order, one after the other, tokenised and labelled."""
    rows = json.loads(rows_file.read_text())
    samples = [rows[number % len(rows)] for number in range(setting.num_samples)]
    return Dataset.from_list(samples)


def _packed_tokens(setting: Setting, dataset: Dataset) -> list[tuple[int, int]]:
    """Of each step the tokens, and those that carry loss, of the rows that TRL has packed."""
    rows = [(len(labels), sum(label != -100 for label in labels[1:])) for labels in dataset["labels"]]
    steps = []
    for step in range(setting.num_steps):
        first = step * setting.packed_rows
        taken = [rows[number % len(rows)] for number in range(first, first + setting.packed_rows)]
        steps.append((sum(tokens for tokens, _ in taken), sum(loss for _, loss in taken)))
    return steps


def _config(setting: Setting, per_device_batch: int | None, output_dir: str) -> SFTConfig:
    packed = per_device_batch is None
    return SFTConfig(
        output_dir=output_dir,
        packing=packed,
        per_device_train_batch_size=per_device_batch or 1,
        gradient_accumulation_steps=(
            setting.packed_rows if per_device_batch is None else setting.global_batch_size // per_device_batch
        ),
        max_steps=setting.num_steps,
        max_length=setting.seq_length,
        pad_to_multiple_of=setting.pad_to_multiple_of,
        train_sampling_strategy="sequential",
        learning_rate=setting.lr,
        lr_scheduler_type="constant",
        weight_decay=setting.weight_decay,
        max_grad_norm=setting.clip_grad,
        adam_beta1=setting.adam_beta1,
        adam_beta2=setting.adam_beta2,
        adam_epsilon=setting.adam_eps,
        seed=setting.seed,
        # Of a mixture of experts; left out it would be that of config.json, which ours does not train with.
        router_aux_loss_coef=0.0,
        bf16=setting.bf16,
        gradient_checkpointing=False,
        use_cpu=not setting.cuda,
        # On a CPU its kernels, which are Triton's, cannot run.
        use_liger_kernel=setting.cuda and importlib.util.find_spec("liger_kernel") is not None,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
