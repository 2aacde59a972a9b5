from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.generation_config import read_generation_defaults


def write(folder: Path, name: str, **values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_a_list_of_end_tokens(tmp_path: Path) -> None:
    write(tmp_path, "config.json", eos_token_id=9)
    write(tmp_path, "generation_config.json", eos_token_id=[3, 4], repetition_penalty=1.05, temperature=0.6)
    defaults = read_generation_defaults(tmp_path)
    assert defaults.eos_token_ids == (3, 4)
    assert defaults.repetition_penalty == 1.05
    assert defaults.not_applied == ()


def test_without_the_file_the_end_token_of_config_json_counts(tmp_path: Path) -> None:
    write(tmp_path, "config.json", eos_token_id=9)
    assert read_generation_defaults(tmp_path).eos_token_ids == (9,)
    assert read_generation_defaults(None).eos_token_ids == ()


def test_rules_that_are_not_there_are_named(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", no_repeat_ngram_size=3, num_beams=1, suppress_tokens=[])
    assert read_generation_defaults(tmp_path).not_applied == ("no_repeat_ngram_size 3",)


@pytest.mark.parametrize("values", [{"eos_token_id": "</s>"}, {"repetition_penalty": 0}])
def test_impossible_values_are_refused(tmp_path: Path, values: dict[str, object]) -> None:
    write(tmp_path, "generation_config.json", **values)
    with pytest.raises(Refused, match=next(iter(values))):
        read_generation_defaults(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(Refused, match=r"generation_config\.json: not readable"):
        read_generation_defaults(tmp_path)
