"""Prompts as they are read, and as the model was trained to see them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.config.inference import InferenceConfig
from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.data.conversation import UnusableRow
from mindspeed_lora.data.encoding import TemplateEncoder
from mindspeed_lora.data.template_files import prompt_template, prompt_templates
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.prompts import PromptEncoder, read_prompts
from tests.unit.data.made_tokenizers import make_tokenizer
from tests.unit.inference.conftest import CHATML

CONVERSATION = [
    {"role": "user", "content": "Name three fruits."},
    {"role": "assistant", "content": "apple, pear, plum"},
    {"role": "user", "content": "And a bread?"},
    {"role": "assistant", "content": "Mix flour and water."},
]


@pytest.fixture(scope="module", params=["gpt2", "spm-legacy"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = make_tokenizer(request.param)
    made.chat_template = CHATML
    return made


def from_file(path: Path, content: str) -> list[str]:
    path.write_text(content, encoding="utf-8")
    return read_prompts(InferenceConfig(prompt_file=str(path)))


def test_prompts_of_the_command_line() -> None:
    assert read_prompts(InferenceConfig(prompt=("a", "b c"))) == ["a", "b c"]
    assert read_prompts(InferenceConfig(prompt=("\udcff",))) == ["?"]


def test_one_prompt_a_line(tmp_path: Path) -> None:
    assert from_file(tmp_path / "p.txt", "one\r\n\n two \u2028 lines \n{not json\n") == [
        "one",
        " two \u2028 lines ",
        "{not json",
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    rows = [json.dumps({"prompt": text}) for text in ("two\nlines", "ü")]
    assert from_file(tmp_path / name, "\n".join(rows)) == ["two\nlines", "ü"]


def test_a_list_of_prompts_is_no_lines(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"p\.json: is one JSON list; write its objects as JSONL"):
        from_file(tmp_path / "p.json", '[\n{"prompt": "a"}\n]')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n\n{"text": "b"}', "row 3: expected an object"),
        ('{"prompt": "a"}\n{"prompt": 3}', "row 2: expected an object"),
        ('{"prompt": "a"}\nb', "row 2: not JSON"),
        ("[" * 100_000, "row 1: not JSON"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        from_file(tmp_path / "p.jsonl", content)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No such file"):
        read_prompts(InferenceConfig(prompt_file=str(tmp_path / "none")))
    (tmp_path / "latin").write_bytes("ü".encode("latin-1"))
    with pytest.raises(Refused, match="not UTF-8"):
        read_prompts(InferenceConfig(prompt_file=str(tmp_path / "latin")))


def test_raw_prompts_are_what_the_tokenizer_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tokenizer, TokenizerConfig())
    assert encoder.encode("how are you?") == tokenizer("how are you?")["input_ids"]
    assert encoder.encode("") == [tokenizer.bos_token_id]
    assert encoder.stop_sequences() == []


def test_the_end_token_can_be_added(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PromptEncoder(tokenizer, TokenizerConfig()).encode("a")
    assert PromptEncoder(tokenizer, TokenizerConfig(), add_eos_token=True).encode("a") == [
        *plain,
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize("prompt_type", sorted(prompt_templates()))
def test_a_prompt_is_the_beginning_of_a_training_row(
    tokenizer: PreTrainedTokenizerFast, prompt_type: str
) -> None:
    (row,) = TemplateEncoder(tokenizer, prompt_template(prompt_type), "last-assistant").encode([CONVERSATION])
    assert not isinstance(row, UnusableRow)
    encoder = PromptEncoder(tokenizer, TokenizerConfig(prompt_type=prompt_type))
    prompt = encoder.encode_conversation(CONVERSATION[:-1])
    assert row.input_ids[: len(prompt)].tolist() == prompt
    assert (row.labels[: len(prompt)] == -100).all() and row.labels[len(prompt)] != -100


@pytest.mark.parametrize("prompt_type", ["chatml", "llama2", "llama3"])
def test_an_answer_ends_where_training_ended_it(tokenizer: PreTrainedTokenizerFast, prompt_type: str) -> None:
    (row,) = TemplateEncoder(tokenizer, prompt_template(prompt_type), "last-assistant").encode([CONVERSATION])
    assert not isinstance(row, UnusableRow)
    encoder = PromptEncoder(tokenizer, TokenizerConfig(prompt_type=prompt_type))
    last_trained = row.labels[row.labels != -100][-1]
    assert (last_trained,) in encoder.stop_sequences()


def test_what_may_surprise_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    [raw] = PromptEncoder(tokenizer, TokenizerConfig()).notices()
    assert "--hf-chat-template asks by its chat template" in raw
    assert PromptEncoder(tokenizer, TokenizerConfig(hf_chat_template=True)).notices() == []
    encoder = PromptEncoder(tokenizer, TokenizerConfig(prompt_type="chatml"))
    assert encoder.template is not None and encoder.notices() == []
    encoder.template = dataclasses.replace(encoder.template, end_token="<|lacking|>")
    [lacking] = encoder.notices()
    assert "the tokenizer has no token <|lacking|>, which --prompt-type chatml uses" in lacking


def test_an_end_that_the_vocabulary_lacks_is_spelled_out(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tokenizer, TokenizerConfig(prompt_type="chatml"))
    assert all(len(stop) == 1 for stop in encoder.stop_sequences())
    assert encoder.template is not None
    encoder.template = dataclasses.replace(encoder.template, end_token="<|lacking|>")
    spelled = tuple(tokenizer.encode("<|lacking|>", add_special_tokens=False))
    start = (tokenizer.convert_tokens_to_ids("<|im_start|>"),)
    assert encoder.stop_sequences() == [(tokenizer.eos_token_id,), start, spelled]


def test_the_tokenizers_own_template(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tokenizer, TokenizerConfig(hf_chat_template=True))
    expected = tokenizer.apply_chat_template(CONVERSATION[:-1], add_generation_prompt=True, return_dict=False)
    assert encoder.encode_conversation(CONVERSATION[:-1]) == expected
    assert encoder.encode("x") == tokenizer.encode(
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )


def test_a_template_that_refuses_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    try:
        with pytest.raises(Refused, match="no users here"):
            PromptEncoder(tokenizer, TokenizerConfig(hf_chat_template=True)).encode("x")
    finally:
        tokenizer.chat_template = CHATML


def test_a_missing_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    try:
        with pytest.raises(Refused, match="no chat template"):
            PromptEncoder(tokenizer, TokenizerConfig(hf_chat_template=True))
    finally:
        tokenizer.chat_template = CHATML
    with pytest.raises(Refused, match="--prompt-type lama2: unknown"):
        PromptEncoder(tokenizer, TokenizerConfig(prompt_type="lama2"))
