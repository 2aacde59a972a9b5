"""The scripts of all families: as the table makes them, with known flags that can each be overridden, and the models.

The scripts run once each, with their programs replaced; their command lines are parsed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_examples
import pytest

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.config.accepted import NO_EFFECT
from mindspeed_lora.config.commands import COMMANDS, grammar, parse
from mindspeed_lora.config.moe import experts_from_flags
from mindspeed_lora.config.shape_flags import shape_from_flags
from tests.unit.tools.test_expert_scripts import options

Arguments = Callable[..., list[str]]
FOLDER = Path(__file__).parents[3] / "examples" / "mcore"
FAMILIES = sorted(path.parent.name for path in FOLDER.glob("*/model.sh") if path.parent.name != "tables")
SCRIPTS = {
    family: [f"{family}/{path.name}" for path in sorted((FOLDER / family).glob("*_*.sh"))]
    for family in FAMILIES
}
PATHS = ("CKPT_LOAD_DIR", "CKPT_SAVE_DIR", "DATA_PATH", "TOKENIZER_PATH", "LORA_LOAD", "HF_MODEL_PATH")
KINDS = {
    "tune": "qwen25/tune_qwen25_7b_4k_lora_ptd.sh",
    "generate": "deepseek3/generate_deepseek3_671b_4k_lora_ptd.sh",
    "evaluate": "llama2/evaluate_llama2_7B_lora_mmlu_ptd.sh",
    "data": "llama2/data_convert_llama2_instruction.sh",
    "convert": "mixtral/ckpt_convert_mixtral_hf2mcore_qlora.sh",
}
NUMBERS = ("TP", "PP", "CP", "EP", "ETP", "HF_TP", "HF_PP", "OUTPUT_PREFIX")
COMMAND_OF = {command.script: name for name, command in COMMANDS.items()}
WANTED = (
    "llama2 llama3 llama31 llama32 llama33 qwen15 qwen2 qwen25 qwen3 qwen2_moe qwen3_moe mixtral mistral codellama "
    "deepseek2_lite deepseek3 gemma2 glm4 internlm25 phi35 yi minicpm"
)
MODELS = {
    "llama2/tune_llama2_7b_lora_ptd": 6.74e9,
    "llama2/tune_llama2_70b_qlora_ptd": 69.0e9,
    "llama3/tune_llama3_8b_lora_ptd": 8.03e9,
    "llama31/tune_llama31_8b_4k_lora_ptd": 8.03e9,
    "llama32/tune_llama32_1b_lora_ptd": 1.236e9,
    "llama32/tune_llama32_3b_lora_ptd": 3.213e9,
    "llama33/tune_llama33_70b_lora_ptd": 70.55e9,
    "qwen15/tune_qwen15_32b_lora_pad": 32.5e9,
    "qwen2/tune_qwen2_7b_lora_ptd": 7.616e9,
    "qwen2/tune_qwen2_72b_lora_pad_4k": 72.7e9,
    "qwen25/tune_qwen25_0point5b_4k_lora_ptd": 0.494e9,
    "qwen25/tune_qwen25_1point5b_4k_lora_ptd": 1.544e9,
    "qwen25/tune_qwen25_3b_4k_lora_ptd": 3.086e9,
    "qwen25/tune_qwen25_7b_4k_lora_ptd": 7.616e9,
    "qwen25/tune_qwen25_14b_4k_lora_ptd": 14.77e9,
    "qwen25/tune_qwen25_32b_4k_lora_ptd": 32.76e9,
    "qwen25/tune_qwen25_72b_4k_lora_ptd": 72.7e9,
    "qwen3/tune_qwen3_0point6b_4K_lora_ptd": 0.596e9,
    "qwen3/tune_qwen3_1point7b_4K_lora_ptd": 1.72e9,
    "qwen3/tune_qwen3_4b_4K_lora_ptd": 4.02e9,
    "qwen3/tune_qwen3_8b_4K_lora_ptd": 8.19e9,
    "qwen3/tune_qwen3_14b_4K_lora_ptd": 14.77e9,
    "qwen3/tune_qwen3_32b_4K_lora_ptd": 32.76e9,
    "mistral/tune_mistral_7b_lora_ptd": 7.24e9,
    "codellama/tune_codellama_34b_lora_ptd": 33.74e9,
    "deepseek2_lite/tune_deepseek2_lite_16b_lora_ptd": 15.7e9,
    "gemma2/tune_gemma2_9b_lora_ptd": 9.24e9,
    "glm4/tune_glm4_9b_lora_ptd": 9.4e9,
    "internlm25/tune_internlm25_7b_lora_ptd": 7.74e9,
    "phi35/tune_phi35_mini_lora_ptd": 3.82e9,
    "yi/tune_yi_34b_lora_ptd": 34.39e9,
    "minicpm/tune_minicpm_2b_lora_ptd": 2.725e9,
}
"""Parameters that the models' authors tell (embeddings counted once where they are tied)."""


def rows_of(kind: str) -> list[tuple[str, str, str]]:
    """Kind, flag and variable of the lines that a script of a kind can read."""
    tables = ("model", kind) if kind in ("tune", "generate", "evaluate") else (kind,)
    text = "\n".join((FOLDER / "tables" / f"{name}.sh").read_text() for name in tables)
    return re.findall(r"^ +(flag|words|switch) +(--\S+) +(\w+) ", text, re.MULTILINE)


def command_line(words: list[str]) -> tuple[str | None, list[str]]:
    """The command, None where it is not there, and its own words."""
    entry = next(word for word in words if word.endswith(".py"))
    return COMMAND_OF.get(entry), words[words.index(entry) + 1 :]


def world(words: list[str]) -> dict[str, str]:
    """The number of processes that the launcher starts."""
    if "--nproc_per_node" not in words:
        return {}
    sizes = (int(words[words.index(name) + 1]) for name in ("--nproc_per_node", "--nnodes"))
    return {"WORLD_SIZE": str(math.prod(sizes))}


def test_committed_scripts_are_what_the_table_makes() -> None:
    made, there = make_examples.examples(), make_examples.committed()
    differing = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    assert not differing, "run tools/make_examples.py"


def test_every_family_has_every_kind_of_script() -> None:
    assert {*WANTED.split()} <= {*FAMILIES}
    for family in WANTED.split():
        for kind in (
            "data_convert",
            "tune",
            "generate",
            "evaluate",
            "hf2mcore",
            "mcore2hf",
            "mg2mg_lora",
            "lora2hf",
        ):
            assert any(kind in name for name in SCRIPTS[family]), (family, kind)


def test_a_changed_script_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = make_examples.committed()
    name = "llama3/tune_llama3_8b_lora_ptd.sh"
    monkeypatch.setattr(make_examples, "committed", lambda: {**there, name: there[name] + "\n"})
    monkeypatch.setattr("sys.argv", ["make_examples.py", "--check"])
    assert make_examples.main() == 1
    assert capsys.readouterr().out == f"{name}\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_flags_are_all_known_and_agree(script_arguments: Arguments, family: str) -> None:
    for script in SCRIPTS[family]:
        paths = (*PATHS, "TOKENIZER_MODEL") if "llama2_7b_lora" in script else PATHS
        given = {path: f"some/{path}" for path in paths}
        words = script_arguments(script, **given, ALLOW_CODE_EXECUTION="1")
        command, own = command_line(words)
        if command is not None:
            job = parse(command, own, environ=world(words))
            assert not [notice for notice in job.notices if "not known" in notice], script


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_of_the_tables_is_a_known_flag(script_arguments: Arguments, kind: str) -> None:
    command, _ = command_line(script_arguments(KINDS[kind]))
    if command is None:
        pytest.skip("the command is not there")
    known = grammar(command)
    for _, name, _ in rows_of(kind):
        assert name in known.options or name in known.ignored or name in NO_EFFECT, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_of_the_tables_is_overridable(script_arguments: Arguments, kind: str) -> None:
    # Degrees are reckoned with, and flags of a conversion to Hugging Face share their names; a path is made.
    table = [row for row in rows_of(kind) if row[2] not in NUMBERS]
    usual = options(script_arguments(KINDS[kind], LORA_LOAD="some/adapter"))
    own = {variable: f"value-{number}" for number, (_, _, variable) in enumerate(table)}
    found = options(script_arguments(KINDS[kind], **own))
    for form, name, _ in table:
        if any(one.split()[0] == name for one in usual):
            values = {f"{name} {own[variable]}" for _, other, variable in table if other == name}
            assert found & ({name} if form == "switch" else values), name
    none = options(script_arguments(KINDS[kind], **dict.fromkeys(own, "")))
    assert not {name for _, name, _ in table} & {one.split()[0] for one in none}


@pytest.mark.parametrize("script", MODELS)
def test_the_flags_alone_tell_the_published_model(script_arguments: Arguments, script: str) -> None:
    words = script_arguments(f"{script}.sh", "--dry-run")
    command, own = command_line(words)
    job: Any = parse(command or "", own, world(words))
    shape = experts_from_flags(job.experts, shape_from_flags(job.model))
    found = sum(math.prod(size) for size in canonical_tensors(shape).values())
    assert found == pytest.approx(MODELS[script], rel=5e-3)
