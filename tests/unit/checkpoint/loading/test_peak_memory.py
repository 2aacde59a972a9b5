"""Peak memory of loading with --qlora: the quantised shard and two matrices, never the model."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.peak import peak
from tests.support.tiny import Tiny

LOAD = """
import os, sys
from mindspeed_lora.config.commands import parse
from mindspeed_lora.parallel.groups import initialize_groups
from mindspeed_lora.training.plan import plan_training
from mindspeed_lora.training.session import TrainingSession

plan = plan_training(parse("posttrain", sys.argv[1:]))
session = TrainingSession(plan, initialize_groups(plan.job.parallel, 1)[0])
os._exit(0)
"""
HIDDEN, LAYERS = 1024, 8
SLACK = 96_000_000
"""Buffers of quantising (some tiles of 2^18 numbers a thread) and freed memory that the allocator keeps."""


def test_loading_takes_the_shard_and_two_matrices(tiny: Tiny, tmp_path: Path) -> None:
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    weights = LAYERS * (4 * HIDDEN**2 + 12 * HIDDEN**2)
    shard, matrix = weights * 4.13 / 8, 2 * 4 * HIDDEN**2
    bound = shard + 2 * matrix + SLACK
    assert bound < 2 * weights * 0.75, "the plain model has to be well above the bound"
    flags = {"qlora": True, "quant_double": True}
    least = peak("-c", LOAD, *tiny.words(**flags))
    found = peak("-c", LOAD, *tiny.words(**flags, load=tmp_path / "model"))
    assert shard < found - least < bound
