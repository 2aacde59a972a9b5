"""Child process: a model of random weights, a tokenizer, and rows of random tokens in given lengths."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from comparison.shapes import SHAPES
from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.sft_dataset import packed_prefix


def main() -> None:
    """Read the request; write model (unless it is there), tokenizer and rows."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    model_type, fields = SHAPES[request["shape"]]
    model = Path(request["model"])
    if not (model / "config.json").is_file():
        torch.manual_seed(1234)
        config = AutoConfig.for_model(model_type, **fields)
        with torch.device(request["device"]):
            made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, request["dtype"]))
        made.save_pretrained(model)
    _write_tokenizer(Path(request["tokenizer"]))
    _write_rows(Path(request["prefix"]), request["lengths"], fields["vocab_size"])


def _write_tokenizer(folder: Path) -> None:
    """TRL must have one; nothing is ever tokenised by it."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def _write_rows(prefix: Path, lengths: list[tuple[int, int]], vocab_size: int) -> None:
    """``(tokens, loss-carrying tokens)`` of each row; its first tokens carry no loss."""
    generator = np.random.RandomState(1234)
    keys = ("input_ids", "attention_mask", "labels")
    builders = {key: IndexedDatasetBuilder(packed_prefix(prefix, key)) for key in keys}
    for length, with_loss in lengths:
        tokens = generator.randint(3, vocab_size, size=length).tolist()
        builders["input_ids"].add_document(tokens)
        builders["attention_mask"].add_document([1] * length)
        silent = length - with_loss
        builders["labels"].add_document([-100] * silent + tokens[silent:])
    for builder in builders.values():
        builder.publish()


if __name__ == "__main__":
    main()
