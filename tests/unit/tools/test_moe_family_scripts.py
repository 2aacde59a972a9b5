"""The scripts of the other families with experts, at toy sizes: tuned at EP 2, merged, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.pool import WorkerPool
from tests.support.rows import random_rows, write_rows
from tests.support.training import train

SMALL = {
    **{"TP": "1", "PP": "1", "EP": "2", "NNODES": "1", "BF16": "0", "DISTRIBUTED_BACKEND": "gloo"},
    **{"SEQ_LENGTH": "48", "MICRO_BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "4", "TRAIN_ITERS": "6"},
    **{"LR": "1e-2", "MIN_LR": "1e-3", "LR_WARMUP_ITERS": "", "SPEC": "", "PROMPT_TYPE": ""},
    **{"LORA_R": "4", "LORA_ALPHA": "8", "NO_PAD_TO_SEQ_LENGTHS": "1", "TOKENIZER_NOT_USE_FAST": "0"},
}
SCRIPTS = {
    "qwen3_moe": ("qwen3-moe", "tune_qwen3_30b_a3b_4K_lora_ptd.sh", "qwen3_moe_mcore2hf_lora"),
    "qwen2_moe": ("qwen2-moe", "tune_qwen2_57b_a14b_4k_lora.sh", "qwen2_moe_mcore2hf_lora"),
    "deepseek3": ("deepseek-v3-moe", "tune_deepseek3_671b_4k_lora_ptd.sh", "deepseek3_merge_lora2hf"),
}


def left_out(family: str) -> dict[str, str]:
    """The variables by which the scripts tell the published model: a toy's are as its checkpoint says."""
    folder = Path(__file__).parents[3] / "examples" / "mcore" / family
    rows = [line.split() for line in (folder / "model.sh").read_text().splitlines()]
    kept = ("MOE_TOKEN_DISPATCHER_TYPE", "CP_TYPE")
    names = [
        row[1] if row[0] == "own" else row[2]
        for row in rows
        if row[:1] and row[0] in ("own", "flag", "switch")
    ]
    return {name: "" for name in (*names, "NUM_LAYER_LIST") if name not in kept}


@pytest.mark.parametrize("family", SCRIPTS)
def test_tune_merge_export(
    family: str, script_arguments: Callable[..., list[str]], workers: WorkerPool, tmp_path: Path
) -> None:
    model, tune, merge = SCRIPTS[family]
    base = make_model(model, tmp_path / "hf")
    write_rows(tmp_path / "rows", random_rows(4, VOCAB_SIZE))
    variables = {**left_out(family), **SMALL}
    paths = {"CKPT_LOAD_DIR": str(base), "CKPT_SAVE_DIR": str(tmp_path / "run"), "TOKENIZER_PATH": ""}

    def words(script: str, **more: str) -> list[str]:
        told = script_arguments(f"{family}/{script}", **variables | paths | more)
        return told[next(place for place, word in enumerate(told) if word.endswith(".py")) + 1 :]

    run = words(tune, DATA_PATH=str(tmp_path / "rows"))
    assert {"--moe-grouped-gemm", "--moe-alltoall-overlap-comm", "--lora-fusion"} <= {*run}
    assert workers.run(2, train, run) == [0, 0]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["lm_loss"] for line in lines]
    assert len(losses) == 6 and losses[-1] < losses[0]

    target = {"CKPT_SAVE_DIR": str(tmp_path / "out")}
    mg = {"HF_MODEL_PATH": str(base), "CKPT_SAVE_DIR": str(tmp_path / "mg"), "MODEL_TYPE_HF": ""}
    convert(parse("convert", words(f"ckpt_convert_{family}_hf2mcore.sh", **mg)))
    merged = {
        "CKPT_LOAD_DIR": str(tmp_path / "mg"),
        "LORA_LOAD": str(tmp_path / "run"),
        "LORA_TARGET_MODULES": "",
    }
    convert(parse("convert", words(f"ckpt_convert_{merge}.sh", **target, **merged)))
    changed = load_file(tmp_path / "out" / "mg2hf" / "model.safetensors")
    before = {name: one for path in base.glob("*.safetensors") for name, one in load_file(path).items()}
    assert changed.keys() == before.keys()
    assert any("experts" in name and not torch.equal(changed[name], before[name]) for name in before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "mg2hf")
    assert torch.isfinite(loaded(torch.arange(3, 20).unsqueeze(0)).logits).all()
