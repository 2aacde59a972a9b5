"""The QLoRA scripts at toy sizes: quantise, tune from what was written and from the plain model, with the same numbers.

The command lines are the scripts' own, run on ranks of the pool instead of by torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.pool import WorkerPool
from tests.support.rows import random_rows, write_rows
from tests.support.training import train
from tests.unit.data.made_tokenizers import make_tokenizer

ROOT = Path(__file__).parents[3]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_THE_CHECKPOINT = (
    *(
        "NUM_LAYERS",
        "HIDDEN_SIZE",
        "FFN_HIDDEN_SIZE",
        "NUM_ATTENTION_HEADS",
        "NUM_QUERY_GROUPS",
        "VOCAB_SIZE",
    ),
    *(
        "PADDED_VOCAB_SIZE",
        "MAX_POSITION_EMBEDDINGS",
        "ROTARY_BASE",
        "NORM_EPSILON",
        "NUM_EXPERTS",
        "PROMPT_TYPE",
    ),
    *("MODEL_TYPE_HF", "TOKENIZER_MODEL", "TOKENIZER_PATH", "MOE_ROUTER_TOPK"),
)
SMALL = {
    **dict.fromkeys(AS_THE_CHECKPOINT, ""),
    **{"BF16": "0", "DISTRIBUTED_BACKEND": "gloo", "TOKENIZER_NOT_USE_FAST": "0", "EVAL_ITERS": "0"},
    **{"SEQ_LENGTH": "48", "GLOBAL_BATCH_SIZE": "4", "TRAIN_ITERS": "5", "LR": "1e-2", "LORA_R": "4"},
}


@dataclass(frozen=True)
class Family:
    """A pair of scripts, and a toy of the model."""

    model: str
    tune: str
    convert: str
    layout: dict[str, str]


FAMILIES = {
    "llama2": Family(
        "llama",
        "tune_llama2_70b_qlora_ptd.sh",
        "ckpt_convert_llama2_hf2mcore_qlora.sh",
        {"TP": "2", "PP": "1"},
    ),
    "mixtral": Family(
        "mixtral",
        "tune_mixtral_8x22b_qlora_ptd.sh",
        "ckpt_convert_mixtral_hf2mcore_qlora.sh",
        {"TP": "2", "PP": "1", "EP": "2", "ETP": "1"},
    ),
}


def losses_in(save: Path) -> list[float]:
    records = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [record["lm_loss"] for record in records if "lm_loss" in record]


@pytest.mark.parametrize("family", ["llama2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_quantised_before_or_while_loading(
    family: str, script_arguments: Callable[..., list[str]], workers: WorkerPool, tmp_path: Path
) -> None:
    scripts = FAMILIES[family]
    base = make_model(scripts.model, tmp_path / "hf")
    write_rows(tmp_path / "rows", random_rows(4, VOCAB_SIZE))

    def words(script: str, **more: str) -> list[str]:
        told = script_arguments(f"{family}/{script}", **SMALL, **scripts.layout, **more)
        return told[next(place for place, word in enumerate(told) if word.endswith(".py")) + 1 :]

    convert(
        parse("convert", words(scripts.convert, HF_MODEL_PATH=str(base), CKPT_SAVE_DIR=str(tmp_path / "nf4")))
    )
    losses = {}
    for load in ("nf4", "hf"):
        paths = {"CKPT_LOAD_DIR": str(tmp_path / load), "CKPT_SAVE_DIR": str(tmp_path / f"run-{load}")}
        run = words(scripts.tune, **paths, DATA_PATH=str(tmp_path / "rows"))
        assert "--qlora" in run
        assert workers.run(2, train, run) == [0, 0]
        losses[load] = losses_in(tmp_path / f"run-{load}")
    # The same bits: quantised by the converter, or by each rank while it reads.
    assert losses["nf4"] == losses["hf"] and losses["hf"][-1] < losses["hf"][0]
    plain = words(scripts.tune, **paths | {"CKPT_SAVE_DIR": str(tmp_path / "plain")}, QLORA="0",
                  DATA_PATH=str(tmp_path / "rows"))  # fmt: skip
    assert workers.run(2, train, plain) == [0, 0]
    assert losses_in(tmp_path / "plain")[0] != losses["hf"][0], "in full the first loss is another"


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    """The example as it is, on a toy with a chat template."""
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHATML
    model = make_model("llama", tmp_path / "hf", vocab_size=len(tokenizer), num_hidden_layers=2)
    tokenizer.save_pretrained(model)
    rows = [
        {"instruction": f"say {word}", "input": "", "output": word * 3} for word in ("a", "be", "see", "do")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 25))
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **{"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        **{"HF_MODEL": str(model), "DATA": str(tmp_path / "rows.json"), "OUT": str(tmp_path / "out")},
        **{"TRAIN_ITERS": "2", "SEQ_LENGTH": "64", "MAX_NEW_TOKENS": "3", "GRADIENT_ACCUMULATION_STEPS": "2"},
    }
    ended = subprocess.run(
        [ROOT / "examples" / "qlora_tutorial.sh"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "out"
    assert len(losses_in(out / "run")) == 2
    config = json.loads((out / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (64, 32, 0.1)
    for name in ("before", "adapter", "merged"):
        answer = json.loads((out / f"{name}.jsonl").read_text())
        assert 0 < len(answer["token_ids"]) <= 3
    assert "Done in" in ended.stdout and "Merged model:" in ended.stdout
