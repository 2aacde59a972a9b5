import json
from pathlib import Path

import pytest

from mindspeed_lora.data.prepared_info import (
    PreparedInfo,
    check_tokenizer,
    info_path,
    read_info,
    text_info_path,
    to_json,
)
from mindspeed_lora.data.tokenizer import LazyTokenizer, tokenizer_fingerprint
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import make_tokenizer

INFO = PreparedInfo(tokenizer_fingerprint="f" * 64, handler_name="h", chat_template="ä\n", num_tokens=3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    assert read_info(prefix) is None
    text_info_path(prefix).write_text(to_json(INFO), encoding="utf-8")
    assert read_info(prefix) == INFO
    info_path(prefix).write_text(to_json(PreparedInfo(tokenizer_fingerprint="", handler_name="i")))
    found = read_info(prefix)
    assert found is not None and found.handler_name == "i"


def test_keys_of_later_versions_are_no_obstacle(tmp_path: Path) -> None:
    content = {**json.loads(to_json(INFO)), "more": 1}
    info_path(tmp_path / "data").write_text(json.dumps(content))
    assert read_info(tmp_path / "data") == INFO


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 99}', "{}"])
def test_unreadable_information(tmp_path: Path, content: str) -> None:
    info_path(tmp_path / "data").write_text(content)
    with pytest.raises(Refused, match=r"data_packed_info\.json: not readable"):
        read_info(tmp_path / "data")


def test_files_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"123")
    info = PreparedInfo(tokenizer_fingerprint="", handler_name="", files={"a.bin": 4})
    info_path(tmp_path / "data").write_text(to_json(info))
    with pytest.raises(Refused, match=r"a\.bin: 3 bytes, but data_packed_info\.json was written for 4"):
        read_info(tmp_path / "data")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(Refused, match=r"a\.bin: missing"):
        read_info(tmp_path / "data")


def test_another_tokenizer_is_refused() -> None:
    tokenizer = make_tokenizer("gpt2")
    info = PreparedInfo(tokenizer_fingerprint=tokenizer_fingerprint(tokenizer), handler_name="")
    check_tokenizer(info, LazyTokenizer(lambda: tokenizer), "data")
    check_tokenizer(None, LazyTokenizer(lambda: tokenizer), "data")
    with pytest.raises(Refused, match="--data-path data were prepared with another tokenizer"):
        check_tokenizer(info, LazyTokenizer(lambda: make_tokenizer("llama3")), "data")
