"""``inference.py --dry-run``: what it prints, what it does without, and that it writes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.main import infer

SHAPE = [
    *("--num-layers", "32", "--hidden-size", "4096", "--num-attention-heads", "32"),
    *("--ffn-hidden-size", "11008", "--max-position-embeddings", "4096", "--padded-vocab-size", "32000"),
    "--untie-embeddings-and-output-weights",
]


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, str], str]:
    """The rows of the table, and the notices."""
    assert infer(parse("inference", [*words, "--dry-run"], {})) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("dry run: everything checked, nothing written\n")
    return dict(re.findall(r"^ (\S.*?) +\| (.*)$", shown.out, re.MULTILINE)), shown.err


def test_a_job_that_is_whole(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load", str(model_folder), "--prompt", "a", "how are you?", "--max-new-tokens", "7"]
    words += ["--output-file", str(tmp_path / "answers"), "--pipeline-model-parallel-size", "2"]
    rows, _ = told(words, capsys)
    assert rows["world size"] == "2 (cpu)" and rows["pipeline parallel"] == "2"
    assert "layers by stage" in rows and "memory: keys and values" in rows
    assert rows["weights"] == str(model_folder)
    assert rows["prompts"].startswith("2, of at most ") and rows["answers"] == "of at most 7 tokens"
    assert not any(tmp_path.iterdir())


def test_nothing_that_the_flags_name_has_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load", "your", "model", "ckpt", "path", "--tokenizer-name-or-path", "your tokenizer path"]
    words += ["--lora-load", "/none", "--prompt-file", "/no/prompts", *SHAPE, "--world-size", "16"]
    rows, err = told([*words, "--tensor-model-parallel-size", "8"], capsys)
    for what in ("--load your model ckpt path", "your tokenizer path", "--lora-load /none", "/no/prompts"):
        assert f"{what} is not there" in err
    assert rows["model"] == "llama, 32 layers, hidden 4096" and rows["weights"] == "not there"
    assert (rows["world size"], rows["tensor parallel"], rows["replicas"]) == ("16 (cpu)", "8", "2")
    assert rows["adapter"].startswith("r 16, alpha 32")


def test_an_adapter_that_is_not_there_is_assumed(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, err = told(["--load", str(model_folder), "--prompt", "a", "--lora-load", "/none"], capsys)
    assert "--lora-load /none is not there: an adapter of rank 16 is assumed" in err
    assert rows["adapter"].startswith("r 16")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_memory_is_told_by_part(capsys: pytest.CaptureFixture[str], tp: int, pp: int) -> None:
    """Llama 2 7B in float32; the keys and values of 4,096 positions, as no prompt is known."""
    words = ["--load", "/none", *SHAPE, "--tensor-model-parallel-size", str(tp)]
    rows, _ = told([*words, "--pipeline-model-parallel-size", str(pp)], capsys)
    parts = {
        name.removeprefix("memory: "): float(value.split(" MiB")[0].replace(",", ""))
        for name, value in rows.items()
        if name.startswith("memory: ")
    }
    total = parts.pop("total")
    assert total == pytest.approx(sum(parts.values()), abs=len(parts))
    assert parts["weights"] == pytest.approx(6_738_415_616 * 4 / 2**20 / (tp * pp), rel=1e-3)
    assert parts["keys and values"] == 32 * 4096 * 2 * 4096 * 4 / 2**20 / (tp * pp)
    assert parts["logits"] <= 1
    assert ("stages:" in rows["memory: total"]) is (pp > 1)


def test_experts_of_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load", "/none", *SHAPE, "--num-experts", "8", "--expert-model-parallel-size", "4"]
    words += ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1", "--world-size", "4"]
    rows, _ = told(words, capsys)
    assert rows["model"].startswith("mixtral") and rows["expert parallel"] == "4, each over 1"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--load", "/none"], "--num-layers, --hidden-size"),
        (["--load", "/none", *SHAPE, "--tensor-model-parallel-size", "3"], "tensor-model-parallel-size 3"),
        (["--load", "/none", *SHAPE, "--output-file", "/no/folder/file"], "there is no folder /no/folder"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(Refused, match=re.escape(sentence)):
        infer(parse("inference", [*words, "--dry-run"], {}))


def test_a_prompt_that_is_too_long_is_refused(model_folder: Path) -> None:
    words = ["--load", str(model_folder), "--prompt", "how " * 80, "--dry-run"]
    with pytest.raises(Refused, match="prompt 1 has"):
        infer(parse("inference", words, {}))
