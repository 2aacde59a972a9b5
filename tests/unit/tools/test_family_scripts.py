"""The scripts of each family without experts at toy size: cut, tuned over two ranks, merged, exported, answered.

The command lines are the scripts' own, run on ranks of the pool instead of by torchrun. Families with experts:
``test_moe_family_scripts.py`` and ``test_mixtral_scripts.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from tests.support.example_scripts import TOYS, as_the_checkpoint, own_words, scripts_of, toy
from tests.support.generation import infer_on_rank
from tests.support.pool import WorkerPool
from tests.support.rows import random_rows, write_rows
from tests.support.training import train

Arguments = Callable[..., list[str]]
STEPS = 4
SMALL = {
    **{
        "TP": "2",
        "PP": "1",
        "EP": "1",
        "NUM_LAYER_LIST": "",
        "VPP": "",
        "NNODES": "1",
        "BF16": "0",
        "FP16": "0",
    },
    **{"DISTRIBUTED_BACKEND": "gloo", "SEQ_LENGTH": "48", "MICRO_BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "4"},
    **{
        "TRAIN_ITERS": f"{STEPS}",
        "LR": "1e-2",
        "MIN_LR": "1e-3",
        "EVAL_ITERS": "0",
        "SPEC": "",
        "MODEL_TYPE_HF": "",
    },
    **{
        "LORA_R": "4",
        "LORA_ALPHA": "8",
        "TOKENIZER_MODEL": "",
        "TOKENIZER_NOT_USE_FAST": "0",
        "PROMPT_TYPE": "",
    },
    **{"VOCAB_SIZE": "", "RECOMPUTE_GRANULARITY": "", "RECOMPUTE_METHOD": "", "RECOMPUTE_NUM_LAYERS": ""},
}
FAST = ("qwen25", "gemma2")
DONE_ELSEWHERE = ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek3")
FAMILIES = [
    family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
    for family in TOYS
    if family not in DONE_ELSEWHERE
]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: one
        for path in folder.glob("*.safetensors")
        for name, one in load_file(path).items()
        if "inv_freq" not in name
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_folder_to_answers(
    family: str, script_arguments: Arguments, workers: WorkerPool, tmp_path: Path
) -> None:
    model = toy(family, tmp_path / "hf")
    words = json.loads((model / "config.json").read_text())
    write_rows(tmp_path / "rows", random_rows(4, words.get("vocab_size") or words["padded_vocab_size"]))

    def run(kind: str, **variables: str) -> list[str]:
        scripts = [one for one in scripts_of(family) if "qlora" not in one]
        if kind in ("tune", "generate"):
            name = next(one for one in scripts if f"/{kind}_" in one)
        else:
            name = next(one for one in scripts if one.endswith(f"_{kind}.sh"))
        return own_words(script_arguments, name, **as_the_checkpoint(family) | SMALL | variables)

    def converted(kind: str, load: str, save: str, **variables: str) -> Path:
        paths = {"HF_MODEL_PATH" if kind == "hf2mcore" else "CKPT_LOAD_DIR": str(tmp_path / load)}
        more = {"CKPT_SAVE_DIR": str(tmp_path / save), "LORA_LOAD": str(tmp_path / "run"), **variables}
        convert(parse("convert", run(kind, **paths, **more)))
        return tmp_path / save

    converted("hf2mcore", "hf", "mg")
    assert same(tensors(converted("mcore2hf", "mg", "back") / "mg2hf"), tensors(model))
    job = run(
        "tune",
        **{"CKPT_LOAD_DIR": str(tmp_path / "mg"), "CKPT_SAVE_DIR": str(tmp_path / "run")},
        **{"DATA_PATH": str(tmp_path / "rows"), "TOKENIZER_PATH": ""},
    )
    assert workers.run(2, train, job) == [0, 0]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["lm_loss"] for line in lines]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    merged = tensors(converted("mcore2hf_lora", "mg", "merged") / "mg2hf")
    converted("mg2mg_lora", "mg", "merged-mg", TP="1")
    assert same(merged, tensors(converted("mcore2hf", "merged-mg", "merged-back") / "mg2hf"))
    assert not same(merged, tensors(model))
    converted("lora2hf", "run", "peft")
    assert (tmp_path / "peft" / "mg2hf" / "adapter_model.safetensors").is_file()
    if (model / "tokenizer.json").is_file():
        answers = []
        for load, lora in (("mg", str(tmp_path / "run")), ("merged/mg2hf", "")):
            job = run(
                "generate",
                **{"CKPT_LOAD_DIR": str(tmp_path / load), "LORA_LOAD": lora, "TOKENIZER_PATH": str(model)},
                **{"TASK": "greedy", "MAX_NEW_TOKENS": "8", "PROMPT": "how are you?"},
                OUTPUT_FILE=str(tmp_path / "answers"),
            )
            assert workers.run(2, infer_on_rank, job, str(tmp_path / "out")) == [0, 0]
            answers.append(json.loads((tmp_path / "answers").read_text())["token_ids"])
        assert answers[0] == answers[1] and answers[0]
