"""Every example script through ``--dry-run``, all in one process.

Jobs that need no files run as published, on no inputs; conversions read a toy of their family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora import entry
from mindspeed_lora.data import prompt_template
from tests.support.example_scripts import FOLDER, TOYS, random_adapter, scripts_of, toy
from tests.unit.tools.test_make_examples import command_line, world

Arguments = Callable[..., list[str]]
TEMPLATES = json.loads(Path(prompt_template.__file__).with_name("templates.json").read_text(encoding="utf-8"))
SMALL = {
    **{"TP": "2", "PP": "1", "EP": "1", "NUM_LAYER_LIST": "", "MODEL_TYPE_HF": "", "TOKENIZER_MODEL": ""},
    **{"OVERWRITE": "1", "LORA_R": "", "LORA_ALPHA": "", "LORA_TARGET_MODULES": ""},
}
"""Of conversions: a toy's layers divide by few sizes, and its adapter's configuration tells the rest."""

LARGE = ("deepseek3",)
"""Planning 671 billion parameters four times takes longer than all the others."""


def dry_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> tuple[int, str]:
    """Exit status, and what is told."""
    command, own = command_line(words)
    functions: dict[str, Callable[[Any], Any]] = {
        "posttrain": entry._train,
        "convert": entry._convert,
        "preprocess": entry._preprocess,
        "inference": entry._infer,
    }
    if command not in functions:
        function = getattr(entry, "_evaluate", None)
        if command is None or function is None:
            return 0, "dry run: the command is not there"
        functions[command] = function
    for name, value in world(words).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        entry.run(command, own, functions[command])
    told = capsys.readouterr()
    monkeypatch.undo()
    return int(ended.value.code or 0), told.out + told.err


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, script_arguments: Arguments) -> Callable[[str], Path]:
    """A family's toy in ``hf``, converted by the family's script in ``mg``, an adapter in ``lora``."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        name = TOYS[family]
        if name not in made:
            from mindspeed_lora.checkpoint.conversion.convert import convert
            from mindspeed_lora.config.commands import parse

            made[name] = folder = tmp_path_factory.mktemp("toy")
            toy(family, folder / "hf")
            script = next(one for one in scripts_of(family) if one.endswith("_hf2mcore.sh"))
            paths = {"HF_MODEL_PATH": str(folder / "hf"), "CKPT_SAVE_DIR": str(folder / "mg")}
            convert(parse("convert", command_line(script_arguments(script, **SMALL | paths))[1]))
            random_adapter(folder / "hf", folder / "lora")
        return made[name]

    return of


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=pytest.mark.slow) if one in LARGE else one for one in TOYS]
)
def test_dry_runs(
    family: str,
    script_arguments: Arguments,
    converted: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert scripts_of(family)
    for script in scripts_of(family):
        # The published script for generation with Llama-2-7B leaves the vocabulary to the checkpoint.
        variables = {"TOKENIZER_MODEL": ""} | ({"VOCAB_SIZE": "32000"} if "generate_llama2" in script else {})
        if "convert_" in script and "data_convert" not in script:
            folder = converted(family)
            load = "lora" if "lora2hf.sh" in script and "merge" not in script else "mg"
            variables = SMALL | {
                **{"HF_MODEL_PATH": str(folder / "hf"), "CKPT_LOAD_DIR": str(folder / load)},
                **{"LORA_LOAD": str(folder / "lora"), "CKPT_SAVE_DIR": str(tmp_path / "out")},
                "HF_CFG_DIR": str(folder / "hf"),
            }
        words = script_arguments(script, "--dry-run", **variables)
        if "--prompt-type" in words and words[words.index("--prompt-type") + 1] not in TEMPLATES:
            words = script_arguments(script, "--dry-run", **variables, PROMPT_TYPE="")
        status, told = dry_run(capsys, monkeypatch, words)
        assert status == 0, f"{script}: {told}"
        assert "dry run" in told, script
        assert not (tmp_path / "out").exists()


def test_every_family_has_a_toy() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/model.sh")} - {"tables"} == {*TOYS}
