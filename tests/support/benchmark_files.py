"""Files of questions in the benchmarks' layouts, with made-up content."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = "river stone cloud seven paper light green under morning train copper window salt quiet engine maple"
SUBJECTS = ("abstract_algebra", "world_religions")
LETTERS = "ABCD"


def sentence(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS.split()) for _ in range(count))


def letter_rows(draw: random.Random, count: int) -> list[list[str]]:
    """Question, four choices, right letter; questions with commas, quotes and line feeds among them."""
    rows = []
    for number in range(count):
        question = sentence(draw, draw.randint(3, 9)) + ("?" if number % 3 else ', "or\nnot"?')
        rows.append([question, *(sentence(draw, draw.randint(1, 3)) for _ in LETTERS), draw.choice(LETTERS)])
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_mmlu(folder: Path, questions: int = 6, shots: int = 5, seed: int = 1) -> Path:
    """``dev`` and ``test`` as the benchmark is unpacked; returns the folder ``test``."""
    draw = random.Random(seed)
    for subject in SUBJECTS:
        write_csv(folder / "test" / f"{subject}_test.csv", letter_rows(draw, questions))
        if shots:
            write_csv(folder / "dev" / f"{subject}_dev.csv", letter_rows(draw, shots))
    return folder / "test"


def write_hellaswag(folder: Path, questions: int = 6, seed: int = 2) -> Path:
    draw = random.Random(seed)
    rows = [
        {
            "ind": number,
            "activity_label": sentence(draw, 2),
            "ctx_a": sentence(draw, 5) + ".",
            "ctx_b": sentence(draw, 2),
            "ctx": "",
            "endings": [sentence(draw, draw.randint(2, 12)) + " [step] end." for _ in range(4)],
            "label": draw.randrange(4),
        }
        for number in range(questions)
    ]
    write_jsonl(folder / "hellaswag_val.jsonl", rows)
    return folder


def write_boolq(folder: Path, questions: int = 5, seed: int = 3) -> Path:
    draw = random.Random(seed)
    rows = [
        {
            "question": sentence(draw, 5),
            "title": "t",
            "passage": sentence(draw, 30),
            "answer": bool(draw.randrange(2)),
        }
        for _ in range(questions)
    ]
    write_jsonl(folder / "dev.jsonl", rows)
    return folder


def write_model(folder: Path, seed: int = 3, positions: int = 1024) -> Path:
    """A Llama with a byte-level tokenizer, which has a ChatML template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.unit.data.made_tokenizers import make_tokenizer
    from tests.unit.inference.conftest import CHATML

    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
