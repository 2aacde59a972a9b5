"""The user's own templates, in the layout of MindSpeed-LLM and in ours."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.data.chat_template import chat_template, render, to_messages
from mindspeed_lora.data.conversation import Call, Turns
from mindspeed_lora.data.encoding import TemplateEncoder, TokenRow
from mindspeed_lora.data.prompt_template import PROMPT, SpecialTokens, pieces
from mindspeed_lora.data.template_files import (
    chosen_template,
    prompt_template,
    prompt_templates,
    read_templates,
)
from mindspeed_lora.errors import Refused

TURNS = Turns("S", ("Q", "R"), ("A", "B"))
QWEN = {
    "format_user": {"slots": ["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]},
    "format_system": {"slots": ["<|im_start|>system\n{{content}}<|im_end|>\n"]},
    "format_observation": {"slots": ["<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]},
    "format_separator": {"slots": ["\n"]},
    "default_system": "You are a helpful assistant.",
    "stop_words": ["<|im_end|>"],
    "replace_eos": True,
}
LLAMA2 = {
    "format_user": {"slots": [["bos_token"], "[INST] {{content}} [/INST]"]},
    "format_system": {"slots": ["<<SYS>>\n{{content}}\n<</SYS>>\n\n"]},
    "template_class": "Llama2Template",
}
CHATGLM3 = {
    "format_prefix": {"slots": [{"token": "[gMASK]"}, {"token": "sop"}]},
    "format_system": {"slots": [{"token": "<|system|>"}, "\n", "{{content}}"]},
    "format_user": {"slots": [{"token": "<|user|>"}, "\n", "{{content}}", {"token": "<|assistant|>"}]},
    "format_assistant": {"slots": ["\n", "{{content}}"]},
    "format_observation": {
        "slots": [{"token": "<|observation|>"}, "\n", "{{content}}", {"token": "<|assistant|>"}]
    },
    "format_function": {"slots": ["{{name}}\n{{arguments}}"]},
    "format_tools": {"tool_format": "glm4"},
    "stop_words": ["<|user|>", "<|observation|>"],
    "efficient_eos": True,
}
CHATGLM2 = {
    "format_user": {"slots": ["[Round {{idx}}]\n\n问：{{content}}\n\n答："]},
    "format_prefix": {"slots": [{"token": "[gMASK]"}, {"token": "sop"}]},
    "format_separator": {"slots": ["\n\n"]},
    "efficient_eos": True,
    "force_system": True,
}
QWEN3 = {
    "format_user": {"slots": ["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]},
    "format_assistant": {"slots": ["{{content}}<|im_end|>\n"]},
    "format_system": {"slots": ["<|im_start|>system\n{{content}}<|im_end|>\n"]},
    "format_function": {"slots": ["{{content}}<|im_end|>\n"], "tool_format": "qwen"},
    "format_observation": {
        "slots": [
            "<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        ]
    },
    "format_tools": {"tool_format": "qwen"},
    "stop_words": ["<|im_end|>"],
    "replace_eos": True,
    "template_class": "ReasoningTemplate",
}
GIVEN = {"qwen": QWEN, "llama2": LLAMA2, "chatglm3": CHATGLM3, "chatglm2": CHATGLM2, "qwen3": QWEN3}


def write(tmp_path: Path, templates: Any) -> str:
    path = tmp_path / "templates.json"
    path.write_text(templates if isinstance(templates, str) else json.dumps(templates), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", GIVEN)
def test_the_published_layout_gives_the_built_in_tokens(
    tmp_path: Path, family_tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    tokenizer = family_tokenizers["llama3"]
    path = write(tmp_path, [{"name": "other"}, {"name": name, **GIVEN[name]}])
    theirs, ours = prompt_template(name, path), prompt_template(name)
    tools = ({"name": "f", "parameters": {}},)
    called = Turns("", ("Q", ""), ("", "A"), tools, {1: ("r",)}, {0: (Call("f", "{}"),)})
    for turns in (
        TURNS,
        Turns("", ("Q",), ("A",)),
        Turns("", ("Q",), ("<think>\nh\n</think>\n\nA",)),
        called,
    ):
        if turns is called and name in ("llama2", "chatglm2"):
            continue
        messages = to_messages(turns)
        if turns.tools:
            messages = [{"role": "system", "content": "", "tools": list(tools)}, *messages]
        rows = [TemplateEncoder(tokenizer, template).encode([messages])[0] for template in (theirs, ours)]
        assert isinstance(rows[0], TokenRow) and isinstance(rows[1], TokenRow)
        assert rows[0].input_ids.tolist() == rows[1].input_ids.tolist()
        assert rows[0].labels.tolist() == rows[1].labels.tolist()
        assert render(tokenizer, chat_template(theirs, tokenizer), turns) == rows[0].input_ids.tolist()
    assert (theirs.end_token, theirs.stop_words) == (ours.end_token, ours.stop_words)


def test_what_a_template_may_leave_out(tmp_path: Path) -> None:
    template = prompt_template("plain", write(tmp_path, [{"name": "plain"}]))
    found = list(pieces(template, TURNS, SpecialTokens(1, 2)))
    assert found == [("S", PROMPT), ("Q", PROMPT), ("A", 0), (2, 0), ("R", PROMPT), ("B", 1), (2, 1)]
    efficient = prompt_template("plain", write(tmp_path, [{"name": "plain", "efficient_eos": True}]))
    found = list(pieces(efficient, TURNS, SpecialTokens(1, 2)))
    assert found == [("S", PROMPT), ("Q", PROMPT), ("A", 0), ("R", PROMPT), ("B", 1), (2, 1)]


def test_our_own_layout(tmp_path: Path) -> None:
    own = {"system": ["{content}!"], "user": ["{idx}: {content}\n"], "assistant": ["{content}", "{end}"]}
    path = write(tmp_path, {"mine": own})
    found = list(pieces(prompt_template("mine", path), TURNS, SpecialTokens(1, 2)))
    assert found[:3] == [("S!", PROMPT), ("0: Q\n", PROMPT), ("A", 0)]
    with pytest.raises(
        Refused, match=r"--prompt-type qwen: unknown in --prompt-type-path .*expected one of mine"
    ):
        prompt_template("qwen", path)


def test_the_published_path_means_the_built_in_templates_where_there_is_no_such_file(tmp_path: Path) -> None:
    absent = str(tmp_path / "configs/finetune/templates.json")
    assert prompt_template("qwen", absent) is prompt_templates()["qwen"]
    (tmp_path / "configs/finetune").mkdir(parents=True)
    (tmp_path / "configs/finetune/templates.json").write_text('[{"name": "mine"}]')
    assert prompt_template("mine", absent).name == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "expected a list of templates, or an object"),
        ([{"format_user": {}}], "template 1: expected an object with a name"),
        (
            [{"name": "x", "format_usr": {}}],
            "template x: unknown field format_usr; expected some of name, format_user",
        ),
        (
            [{"name": "x", "format_user": {"slots": "a"}}],
            "format_user is .*expected an object with a list of slots",
        ),
        ([{"name": "x", "format_user": {"slots": ["hi"]}}], r"format_user needs a slot with \{\{content\}\}"),
        ([{"name": "x", "format_user": {"slots": [["pad_token"]]}}], r'has the slot \["pad_token"\]'),
        (
            [{"name": "x", "template_class": "Mine"}],
            "template_class Mine is unknown; expected one of Template",
        ),
        ([{"name": "x", "replace_eos": True}], "replace_eos needs stop_words"),
        ([{"name": "x", "efficient_eos": "yes"}], 'efficient_eos is "yes"; expected true or false'),
        ([{"name": "x", "stop_words": "a"}], "stop_words is .*expected a list of texts"),
        ([{"name": "x", "format_tools": {"tool_format": "fancy"}}], "tool format fancy is unknown"),
        ([{"name": "x", "format_function": {"slots": ["{{name}}", "{{arguments}}"]}}], "in one slot"),
        ({"x": 3}, "template x: expected an object"),
        ({"x": {"users": []}}, "template x: unknown field users"),
        ({"x": {"user": ["a"], "system": ["{content}"], "assistant": ["{content}"]}}, "user needs a slot"),
        ({"x": {"efficient_eos": 1}}, "efficient_eos is 1; expected bool"),
    ],
)
def test_wrong_files(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        read_templates(write(tmp_path, content))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(Refused, match="--prompt-type-path nowhere.json: cannot be read"):
        prompt_template("x", "nowhere.json")


THOUGHT = "<think>\nhm\n</think>\n\nA"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("none", [(EMPTY, PROMPT), ("Q<|im_end|>\n", 0), (THOUGHT + "<|im_end|>\n", 1)]),
        ("true", [(EMPTY, 0), ("Q<|im_end|>\n", 0), (THOUGHT + "<|im_end|>\n", 1)]),
        ("false", [(EMPTY, PROMPT), ("Q<|im_end|>\n", 0), (EMPTY, PROMPT), ("A<|im_end|>\n", 1)]),
    ],
)
def test_thinking(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], thinking: str, expected: list[tuple[str, int]]
) -> None:
    template = chosen_template(TokenizerConfig(prompt_type="qwen3", enable_thinking=thinking))
    turns = Turns("", ("1", "2"), ("Q", THOUGHT))
    found = [piece for piece in pieces(template, turns, SpecialTokens(1, 2)) if "user" not in str(piece[0])]
    assert found == expected
    tokenizer = family_tokenizers["llama3"]
    (row,) = TemplateEncoder(tokenizer, template).encode([to_messages(turns)])
    assert isinstance(row, TokenRow)
    assert render(tokenizer, chat_template(template, tokenizer), turns) == row.input_ids.tolist()


@pytest.mark.parametrize("kind", ["spm-legacy", "spm-first"])
def test_the_chat_template_writes_a_trained_empty_thought_before_the_slots_of_the_answer(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], kind: str
) -> None:
    tokenizer = family_tokenizers[kind]
    template = chosen_template(TokenizerConfig(prompt_type="glm4_moe", enable_thinking="true"))
    turns = Turns("", ("1", "2"), ("Q", "R"))
    (row,) = TemplateEncoder(tokenizer, template).encode([to_messages(turns)])
    assert isinstance(row, TokenRow)
    assert render(tokenizer, chat_template(template, tokenizer), turns) == row.input_ids.tolist()


def test_thinking_is_refused_where_a_template_knows_none() -> None:
    with pytest.raises(Refused, match="--enable-thinking true: the template llama2 knows no thoughts"):
        chosen_template(TokenizerConfig(prompt_type="llama2", enable_thinking="true"))
