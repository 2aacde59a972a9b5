"""The benchmarks are scripts, not part of the package: their folder is put on the path, as when they run."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.data.made_tokenizers import make_tokenizer

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

WORDS = [
    "flour",
    "water",
    "bread",
    "apple",
    "pear",
    "plum",
    "Voici",
    "la",
    "phrase",
    "add",
    "return",
    "print",
    "text",
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer("gpt2")
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Alpaca rows of 1 to 30 words."""
    generator = random.Random(4)
    rows = [
        {
            key: " ".join(generator.choices(WORDS, k=generator.randint(1, 30)))
            for key in ("instruction", "output")
        }
        for _ in range(20)
    ]
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(rows))
    return str(file)
