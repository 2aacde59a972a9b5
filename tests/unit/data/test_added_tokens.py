"""--add-tokens: the file of tokens, and the tokenizer that knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.data.added_tokens import job_tokenizer, read_added_tokens, token_numbers
from mindspeed_lora.data.tokenizer import tokenizer_fingerprint
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import save_tokenizer


def write(folder: Path, text: str) -> str:
    (folder / "tokens").write_text(text, encoding="utf-8")
    return str(folder / "tokens")


@pytest.mark.parametrize("text", ["<|a|>\n\n  Brötchen \r\n", '["<|a|>", "Brötchen"]'])
def test_one_a_line_or_a_json_list(tmp_path: Path, text: str) -> None:
    assert read_added_tokens(write(tmp_path, text)) == ["<|a|>", "Brötchen"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected tokens, one a line"),
        ("[1]", "expected tokens, one a line, or a JSON list of texts"),
        ('["a", ""]', "expected tokens"),
        ('["a"', "starts as a JSON list, but is none"),
        ("a\nb\na\n", "'a' is there twice"),
    ],
)
def test_what_is_no_list_of_tokens(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        read_added_tokens(write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--add-tokens .*absent: cannot be read"):
        read_added_tokens(str(tmp_path / "absent"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="not UTF-8"):
        read_added_tokens(str(tmp_path / "bytes"))


def test_the_tokenizer_learns_them_once(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    plain = job_tokenizer(TokenizerConfig(), folder)
    assert token_numbers(TokenizerConfig(), plain) == ()
    known = len(plain.loaded)
    config = TokenizerConfig(add_tokens=write(tmp_path, "<|a|>\n<think>\nZucker\n"))
    grown = job_tokenizer(config, folder)
    numbers = token_numbers(config, grown)
    assert numbers == (known, plain.loaded.convert_tokens_to_ids("<think>"), known + 1)
    assert grown.loaded("ein Zucker<|a|>")["input_ids"][-2:] == [known + 1, known]
    assert grown.files_digest not in (None, plain.files_digest)
    grown.loaded.save_pretrained(tmp_path / "saved")
    again = job_tokenizer(config, tmp_path / "saved")
    assert token_numbers(config, again) == numbers
    assert tokenizer_fingerprint(again.loaded) == tokenizer_fingerprint(grown.loaded)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no tokenizer beside the weights; name its folder"):
        token_numbers(TokenizerConfig(add_tokens=write(tmp_path, "a")), None)
