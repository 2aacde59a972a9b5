"""A tiny model with a tokenizer and a chat template beside its weights, for jobs that begin with raw text."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.unit.data.made_tokenizers import save_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_text_model(folder: Path) -> Path:
    """A Llama of two layers whose vocabulary is its tokenizer's."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    save_tokenizer(folder, chat_template=CHATML)
    words = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(4)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def write_conversations(path: Path, count: int = 12) -> list[list[dict[str, str]]]:
    """A JSONL file of conversations of one to three turns; returns them."""
    rows = []
    for number in range(count):
        messages = []
        for turn in range(1 + number % 3):
            messages += [
                {"role": "user", "content": f"Count to {number + turn}, " + "please " * (number % 4)},
                {"role": "assistant", "content": "one two three " * (1 + (number * 7 + turn) % 5)},
            ]
        rows.append(messages)
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")
    return rows
